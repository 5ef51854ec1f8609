"""Train, retrain (fine-tune) and evaluate a model. Explained in `03_retrain.ipynb`.

The same call trains in one process and in several that `torchrun` has started;
docs/retraining.md says how.
"""

import copy
import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.errors import HelpersError, InputError
from helpers.files import atomic_write, remove_unfinished, shown
from helpers.layers import in_mode
from helpers.machine import device
from helpers.metrics import Accuracy, Comparison, predictions
from helpers.progress_bar import progress_bar
from helpers.sparsity.compressed import state_checksum
from helpers.sparsity.prune import Masks
from helpers.training.data import Splits, evaluation_share, training_share
from helpers.training.distributed import Processes, processes
from helpers.training.progress import Epoch, EpochWatch, Pass
from helpers.training.recipe import Recipe
from helpers.training.step import Step

_logger = logging.getLogger(__name__)

# Of the progress file; a file of another format belongs to another training.
_FORMAT = 2


class TrainingError(HelpersError, RuntimeError):
    """Training diverged."""


class TrainingInterrupted(KeyboardInterrupt):
    """Somebody stopped a training, as by Ctrl-C; the message says what is kept of it."""


def evaluate(model: nn.Module, loader: DataLoader, channels_last: bool = True) -> Accuracy:
    """Return the top-1 accuracy of a model over a loader, in evaluation mode.

    The model is moved to the GPU, if there is one, and to channels-last unless that is False,
    and stays there. Every process evaluates all images; `evaluate_together` shares them.

    Raises:
        InputError: the loader gives no images.
    """
    (right,) = _right([model], loader, channels_last)
    return Accuracy(int(right.sum()), len(right))


def evaluate_together(model: nn.Module, loader: DataLoader, channels_last: bool = True) -> Accuracy:
    """Return the accuracy of a model over a loader whose images the processes share.

    Each image is counted once, whatever the number of processes. All of them must call this, and
    all receive the same result. The rest is as in `evaluate`.
    """
    together = processes()
    if together.count == 1 or not len(loader):
        return evaluate(model, loader, channels_last)
    own = evaluation_share(loader, together)
    counted = evaluate(model, own, channels_last) if len(own) else Accuracy(0, 0)
    correct, total = together.sum(counted.correct, counted.total)
    return Accuracy(int(correct), int(total))


def compare(first: nn.Module, second: nn.Module, loader: DataLoader) -> Comparison:
    """Return how much better the second model is on the images of a loader.

    Both are moved as `evaluate` does it.

    Raises:
        InputError: the loader gives no images.
    """
    one, other = _right([first, second], loader)
    return Comparison(int((one & ~other).sum()), int((other & ~one).sum()), len(one))


def _right(models: Sequence[nn.Module], loader: DataLoader, channels_last: bool = True) -> Tensor:
    """Return for each model (rows) and image (columns) whether it is classified correctly."""
    if not len(loader):
        raise InputError("There are no images to evaluate on: the loader is empty.")
    where, right = device(), []
    layout = torch.channels_last if channels_last else torch.preserve_format
    with ExitStack() as modes:
        for model in models:
            # Outside of inference mode: weights that are moved inside it cannot be trained.
            _move(model, where, channels_last)
            modes.enter_context(in_mode(model, training=False))
        modes.enter_context(torch.inference_mode())
        batches = loader
        if processes().is_first:
            batches = progress_bar(loader, desc="evaluate")
        for images, labels in batches:
            images = images.to(where, memory_format=layout)
            answers = [predictions(model(images)) for model in models]
            right.append(torch.stack(answers).cpu() == labels)
    return torch.cat(right, dim=1)


def _move(model: nn.Module, where: torch.device, channels_last: bool = True) -> nn.Module:
    """Move a model to a device and, if wanted, to channels-last, in place."""
    model.to(where)
    return model.to(memory_format=torch.channels_last) if channels_last else model


@dataclass
class _Progress:
    """What a training needs to continue as if it had never stopped."""

    procedure: str
    start: str  # checksum of the weights it began with
    state: dict[str, dict] = field(default_factory=dict)  # of the step
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)

    def add(self, epoch: Epoch, step: Step) -> None:
        """Record a finished epoch."""
        if epoch.validation > max((past["validation"] for past in self.history), default=-1.0):
            self.best = copy.deepcopy(step.evaluated.state_dict())
        self.history.append(asdict(epoch))
        self.state = step.state()

    @property
    def epochs(self) -> list[Epoch]:
        return [Epoch(**epoch) for epoch in self.history]


def train(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    seed: int,
    masks: Masks | None = None,
    progress_file: Path | None = None,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[list[Epoch]], None] | None = None,
) -> list[Epoch]:
    """Train a model and leave it with its best weights, in evaluation mode.

    The best weights are those of the epoch with the highest accuracy on the
    validation images; of equal epochs the earlier one. A copy is trained: until the
    end the model stays as it was, so that an interrupted call can be repeated.

    A layer in evaluation mode inside a model in training mode is frozen, as batch norms often
    are, and stays in evaluation mode. A model that is in evaluation mode is trained as a whole.

    Where a process group is initialised, all processes of it must call this alike. They share
    the images of every batch; the order and the augmentation of the images do not depend on the
    number of processes. The first process writes the files.

    Args:
        model: the model to start from; it receives the best weights at the end.
        splits: training and validation images.
        recipe: the procedure, the same for training and retraining.
        seed: sets the order and the augmentation of the images.
        masks: weights to hold at zero, as `prune_2to4_` returned them.
        progress_file: written after every epoch. An interrupted training continues from it, also
            with another number of processes; a finished one is loaded from it. The file of
            another training is kept beside it, with `.old` before the ending.
        teacher: the model to learn from, if the recipe distils; moved as `evaluate` does it.
        on_epoch: called in the first process with all epochs so far: when a training continues,
            and after every epoch, when the progress file has been written.

    Returns:
        One `Epoch` for each epoch.

    Raises:
        TrainingError: the loss became NaN or infinite.
        TrainingInterrupted: somebody pressed Ctrl-C, or interrupted the notebook's kernel.
        InputError: there is no whole batch of training images, a batch has fewer images than
            there are processes, the recipe distils without a teacher, or the progress file is
            damaged.
        UnavailableError: the recipe needs a GPU and there is none.

    Source: the procedure is that of Mishra et al., arXiv 2104.08378: repeat the
    original training with the zeros fixed.
    """
    if not len(splits.train):
        raise InputError(
            "There is no whole batch of training images. Give more images or a smaller batch."
        )
    together, where = processes(), device()
    loader = training_share(splits.train, together, recipe.accumulation)
    trained = _move(copy.deepcopy(model), where, recipe.channels_last)
    if not trained.training:
        trained.train()
    masks = {name: mask.to(where) for name, mask in (masks or {}).items()}
    if teacher is not None:
        _move(teacher, where, recipe.channels_last)
    with ExitStack() as modes:
        if teacher is not None:
            modes.enter_context(in_mode(teacher, training=False))
        step = Step(trained, recipe, len(loader), masks, together, teacher)
        progress = _Progress(
            f"{_FORMAT} {recipe.procedure} {seed} {sorted(masks)}",
            state_checksum(model.state_dict()),
        )
        if progress_file is not None:
            progress = _resume(progress_file, progress, step, together)
        if progress.history and on_epoch is not None and together.is_first:
            on_epoch(progress.epochs)
        kept = len(progress.history)
        try:
            for number in range(kept + 1, recipe.epochs + 1):
                progress.add(_run_epoch(number, step, loader, splits, recipe, seed), step)
                if progress_file is not None:
                    if together.is_first:
                        # Written by Python's own file: its error says that the disk is full.
                        with atomic_write(progress_file) as part, open(part, "wb") as file:
                            torch.save(vars(progress), file)
                    kept = number
                if together.is_first and on_epoch is not None:
                    on_epoch(progress.epochs)
        except KeyboardInterrupt as error:
            raise TrainingInterrupted(_what_is_kept(kept, recipe.epochs)) from error
    if progress.history:
        model.load_state_dict(progress.best)
    model.eval()
    return progress.epochs


def _run_epoch(
    number: int, step: Step, loader: DataLoader, splits: Splits, recipe: Recipe, seed: int
) -> Epoch:
    """Train for one epoch, measure the accuracy on the validation images, and return both."""
    # One seed per epoch, so that a resumed run sees the same images in the same order.
    torch.manual_seed(seed + number)
    torch.empty((), dtype=torch.int64).random_()  # unused; recorded trainings drew it too
    start = time.perf_counter()
    title = f"epoch {number}/{recipe.epochs}"
    trained_on = _train_epoch(step, loader, splits.train.batch_size, title)
    step.end_epoch()
    validation = _validate(step, splits.validation, recipe).top1
    epoch = Epoch(
        number,
        trained_on.loss,
        validation,
        time.perf_counter() - start,
        trained_on.right,
        float(step.scheduler.get_last_lr()[0]),
        trained_on.images_per_second,
        trained_on.waited,
    )
    if step.together.is_first:
        _logger.info(
            "%s: loss %.4f, validation %.2f %%, %.0f s",
            title,
            epoch.loss,
            validation,
            epoch.seconds,
        )
    return epoch


def _what_is_kept(epoch: int, epochs: int) -> str:
    """Return the message of an interrupted training, by the last epoch in its progress file."""
    if epoch == 0:
        return f"Interrupted; none of {epochs} epochs is kept. Run it again to start over."
    return f"Interrupted; epoch {epoch} of {epochs} is kept. Run it again to go on."


def _validate(step: Step, loader: DataLoader, recipe: Recipe) -> Accuracy:
    return evaluate_together(step.evaluated, loader, recipe.channels_last)


def _train_epoch(step: Step, loader: DataLoader, batch_size: int | None, title: str) -> Pass:
    """Train for one pass over this process's shares of the batches, and return its means."""
    together = step.together
    with EpochWatch(title, len(loader) * (batch_size or 1), together) as watch:
        for images, labels in loader:
            watch.ready()
            whole = len(labels) if together.count == 1 or batch_size is None else batch_size
            loss, right = step(images, labels, whole)
            watch.done(loss, right, len(labels), whole)
        result = watch.result()
    if not math.isfinite(result.loss):
        raise TrainingError(
            f"The loss became {result.loss} in {title}: the training diverged. Lower the "
            "learning_rate of the recipe and train again."
        )
    return result


def _resume(path: Path, fresh: _Progress, step: Step, together: Processes) -> _Progress:
    """Return the progress of an interrupted training, or `fresh` if the file is of another.

    Only the first process reads the file, so the others need not reach its folder.
    """
    content = None
    if together.is_first:
        remove_unfinished(path)
        content = path.read_bytes() if path.exists() else None
    content = together.share(content)
    if content is None:
        return fresh
    try:
        stored = _Progress(**torch.load(io.BytesIO(content), device(), weights_only=True))
    except TypeError:  # keys of another format
        stored = _Progress("", "")
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise InputError(
            f"{shown(path)} is damaged ({type(error).__name__}). Delete it and train again, from "
            "the first epoch."
        ) from error
    # A finished training may be asked for again with a model that already has its weights.
    if stored.procedure != fresh.procedure or fresh.start not in (
        stored.start,
        state_checksum(stored.best),
    ):
        if together.is_first:
            kept = path.with_suffix(f".old{path.suffix}")
            path.replace(kept)
            _logger.warning(
                "%s belongs to another training (weights, recipe or seed) and is now %s; "
                "starting at epoch 1.",
                path.name,
                kept.name,
            )
        return fresh
    if together.is_first and len(stored.history) >= step.recipe.epochs:
        _logger.info(
            "%s has all epochs (%d). Delete it to train again.", path.name, len(stored.history)
        )
    elif together.is_first:
        _logger.info(
            "%s: continuing after epoch %d. Delete it to start at epoch 1.",
            path.name,
            len(stored.history),
        )
    step.load(stored.state)
    return stored
