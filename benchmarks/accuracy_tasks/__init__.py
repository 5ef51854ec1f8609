"""The nine networks of `accuracy.py`: a module for each kind of data, and what they share.

- `task`: what a row is made of, and the procedure that every row goes through;
- `record`: the rows in a file, and the running of what is not in it yet;
- `images`: five kinds of networks that classify Fashion-MNIST;
- `canvases`: several items of Fashion-MNIST on a canvas;
- `detection`: an SSD on the canvases;
- `segmentation`: a U-Net on the canvases;
- `translation`: an encoder-decoder Transformer on generated sentences;
- `language`: a masked language model on Python's standard library.
"""

from accuracy_tasks import detection, images, language, segmentation, translation
from accuracy_tasks.task import Task

TASKS: tuple[Task, ...] = (
    *images.TASKS, *detection.TASKS, *segmentation.TASKS, *translation.TASKS, *language.TASKS
)  # fmt: skip
