"""What holding the masks costs in a step, and whether the loader keeps up with the step.

    python benchmarks/training.py --out results/training.json

The steps of the quick network are timed in turns with and without masks, on one thread, by the
time that the processor spends on that thread. The loader and the step are timed for JPEG files of
500x375 pixels that are written first.
"""

import copy
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from helpers import machine
from helpers.files import write_json
from helpers.sparsity import hold_masks, prune_2to4_
from helpers.training.data import folder_splits
from helpers.training.distributed import Processes
from helpers.training.networks import create_model
from helpers.training.progress import EpochWatch
from helpers.training.step import Step
from helpers.tutorial.settings import PRESETS

QUICK = PRESETS["quick"]


def masked_steps(rounds: int) -> dict[str, Any]:
    """Return what holding the masks of the quick network costs in a step."""
    torch.manual_seed(0)
    model = create_model(QUICK.model, QUICK.num_classes).to(memory_format=torch.channels_last)
    masks = prune_2to4_(model)
    ways = {
        name: Step(copy.deepcopy(model).train(), QUICK.recipe, 100, held, Processes())
        for name, held in (("without", {}), ("held", masks), ("without again", {}))
    }
    batch = QUICK.recipe.batch_size
    images = torch.randn(batch, *QUICK.image_shape)
    labels = torch.arange(batch) % QUICK.num_classes
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, step in ways.items():
            start = time.thread_time()
            step(images, labels, batch)
            times[name].append(time.thread_time() - start)
    seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
    ratios = {
        name: [one / other for one, other in zip(times[name], times["without"], strict=True)][1:]
        for name in ("held", "without again")
    }
    return {
        "network": QUICK.model,
        "batch": batch,
        "rounds": rounds,
        "milliseconds": {name: round(1000 * each, 2) for name, each in seconds.items()},
        "extra_percent": {
            name: round(100 * (statistics.median(each) - 1), 2) for name, each in ratios.items()
        },
        "hold_milliseconds": round(1000 * _hold(model, masks), 3),
    }


def _hold(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> float:
    """Return the seconds that a step of an optimizer takes longer with its masks held.

    There are no gradients, so the optimizer itself has nothing to do.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold_masks(optimizer, model, masks)
    times = []
    for _ in range(200):
        start = time.thread_time()
        optimizer.step()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def loading(network: str, count: int, workers: int) -> dict[str, Any]:
    """Return images per second of the loader alone, of the step alone, and of both together."""
    generator = np.random.default_rng(0)
    recipe = PRESETS["imagenette"].recipe
    with TemporaryDirectory() as folder:
        for part, images in (("train", count), ("val", 2)):
            (Path(folder) / part / "all").mkdir(parents=True)
            for number in range(images):
                coarse = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
                photo = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
                photo.save(Path(folder) / part / "all" / f"{number}.jpg", quality=90)
        loader = folder_splits(Path(folder), 1, 16, 16, workers).train
        step = Step(
            create_model(network, 2)
            .to(machine.device())
            .to(memory_format=torch.channels_last)
            .train(),
            recipe,
            len(loader),
            {},
            Processes(),
        )
        batches = [(images, labels) for images, labels in loader]  # the workers have started now
        shown = sum(len(labels) for _, labels in batches)
        start = time.perf_counter()
        for _ in loader:
            pass
        load = shown / (time.perf_counter() - start)
        with EpochWatch("step alone", shown, Processes()) as watch:
            for images, labels in batches:
                watch.ready()
                watch.done(*step(images, labels, len(labels)), len(labels), len(labels))
            alone = watch.result()
        with EpochWatch("loader and step", shown, Processes()) as watch:
            for images, labels in loader:
                watch.ready()
                watch.done(*step(images, labels, len(labels)), len(labels), len(labels))
            both = watch.result()
    return {
        "network": network,
        "images": shown,
        "workers": workers,
        "loader_images_per_second": round(load, 1),
        "step_images_per_second": round(alone.images_per_second, 1),
        "together_images_per_second": round(both.images_per_second, 1),
        "waited_percent": round(100 * both.waited, 1),
    }


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 40,
    images: Annotated[int, typer.Option(min=33)] = 129,
    network: str = "resnet18",
    workers: int = 1,
    out: Path = Path(__file__).parent / "results" / "training.json",
) -> None:
    """Time a step with its masks held, and the loader against the step."""
    torch.set_num_threads(1)
    result = {"masks": masked_steps(rounds), "loading": loading(network, images, workers)}
    print(result)
    write_json(out, {**result, **machine.provenance()})


if __name__ == "__main__":
    typer.run(main)
