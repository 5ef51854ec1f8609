"""Train, retrain (fine-tune) and evaluate a model. Explained in `03_retrain.ipynb`."""

import copy
import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from helpers.errors import HelpersError, InputError
from helpers.files import atomic_write, shown
from helpers.layers import in_mode
from helpers.machine import device
from helpers.metrics import Accuracy, Comparison, predictions
from helpers.sparsity.compressed import state_checksum
from helpers.sparsity.hold import hold_masks
from helpers.sparsity.prune import Masks
from helpers.training.data import Splits
from helpers.training.recipe import Recipe, schedule

_logger = logging.getLogger(__name__)


class TrainingError(HelpersError, RuntimeError):
    """Training diverged."""


def evaluate(model: nn.Module, loader: DataLoader) -> Accuracy:
    """Return the top-1 accuracy of a model over a loader, in evaluation mode.

    The model is moved to the GPU, if there is one, and to channels-last, and stays there.

    Raises:
        InputError: the loader gives no images.
    """
    (right,) = _right([model], loader)
    return Accuracy(int(right.sum()), len(right))


def compare(first: nn.Module, second: nn.Module, loader: DataLoader) -> Comparison:
    """Return how much better the second model is on the images of a loader.

    Both are moved as `evaluate` does it.

    Raises:
        InputError: the loader gives no images.
    """
    one, other = _right([first, second], loader)
    return Comparison(int((one & ~other).sum()), int((other & ~one).sum()), len(one))


def _right(models: Sequence[nn.Module], loader: DataLoader) -> Tensor:
    """Return for each model (rows) and image (columns) whether it is classified correctly."""
    if not len(loader):
        raise InputError("There are no images to evaluate on: the loader is empty.")
    where, right = device(), []
    with ExitStack() as modes:
        for model in models:
            # Outside of inference mode: weights that are moved inside it cannot be trained.
            _move(model, where)
            modes.enter_context(in_mode(model, training=False))
        modes.enter_context(torch.inference_mode())
        for images, labels in tqdm(loader, desc="evaluate", leave=False):
            images = images.to(where, memory_format=torch.channels_last)
            answers = [predictions(model(images)) for model in models]
            right.append(torch.stack(answers).cpu() == labels)
    return torch.cat(right, dim=1)


def _move(model: nn.Module, where: torch.device) -> nn.Module:
    """Move a model to a device and to channels-last, in place."""
    return model.to(where).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Epoch:
    """The result of one pass over the training images."""

    number: int  # from 1
    loss: float  # mean over the epoch
    validation: float  # top-1 on the validation images, per cent
    seconds: float


@dataclass
class _Progress:
    """What a training needs to continue as if it had never stopped."""

    procedure: str
    start: str  # checksum of the weights it began with
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)

    def add(self, epoch: Epoch, model: nn.Module, optimizer: SGD, scheduler: LambdaLR) -> None:
        """Record a finished epoch."""
        if epoch.validation > max((past["validation"] for past in self.history), default=-1.0):
            self.best = copy.deepcopy(model.state_dict())
        self.history.append(asdict(epoch))
        self.model = model.state_dict()
        self.optimizer = optimizer.state_dict()
        self.scheduler = scheduler.state_dict()


def train(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    seed: int,
    masks: Masks | None = None,
    progress_file: Path | None = None,
) -> list[Epoch]:
    """Train a model and leave it with its best weights, in evaluation mode.

    The best weights are those of the epoch with the highest accuracy on the
    validation images; of equal epochs the earlier one. A copy is trained: until the
    end the model stays as it was, so that an interrupted call can be repeated.

    A layer in evaluation mode inside a model in training mode is frozen, as batch norms often
    are, and stays in evaluation mode. A model that is in evaluation mode is trained as a whole.

    Args:
        model: the model to start from; it receives the best weights at the end.
        splits: training and validation images.
        recipe: the procedure, the same for training and retraining.
        seed: sets the order and the augmentation of the images.
        masks: weights to hold at zero, as `prune_2to4_` returned them.
        progress_file: written after every epoch. An interrupted training continues from it; a
            finished one is loaded from it.

    Returns:
        One `Epoch` for each epoch.

    Raises:
        TrainingError: the loss became NaN or infinite.
        InputError: there is no whole batch of training images, or the progress file is damaged.

    Source: the procedure is that of Mishra et al., arXiv 2104.08378: repeat the
    original training with the zeros fixed.
    """
    if not len(splits.train):
        raise InputError(
            "There is no whole batch of training images. Give more images or a smaller batch."
        )
    where = device()
    trained = _move(copy.deepcopy(model), where)
    if not trained.training:
        trained.train()
    optimizer = SGD(
        trained.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    scheduler = LambdaLR(optimizer, schedule(recipe, len(splits.train)))
    masks = {name: mask.to(where) for name, mask in (masks or {}).items()}
    progress = _Progress(f"{recipe} {seed} {sorted(masks)}", state_checksum(model.state_dict()))
    if progress_file is not None and progress_file.exists():
        progress = _resume(progress_file, progress, trained, optimizer, scheduler)

    if masks:
        hold_masks(optimizer, trained, masks)  # ends with the optimizer, when this returns
    for number in range(len(progress.history) + 1, recipe.epochs + 1):
        # One seed per epoch, so that a resumed run sees the same images in the same order.
        torch.manual_seed(seed + number)
        start = time.perf_counter()
        loss = _train_epoch(trained, splits.train, optimizer, scheduler, f"epoch {number}")
        validation = evaluate(trained, splits.validation).top1
        epoch = Epoch(number, loss, validation, time.perf_counter() - start)
        _logger.info(
            "epoch %d/%d: loss %.4f, validation %.2f %%, %.0f s",
            number,
            recipe.epochs,
            loss,
            validation,
            epoch.seconds,
        )
        progress.add(epoch, trained, optimizer, scheduler)
        if progress_file is not None:
            with atomic_write(progress_file) as part:
                torch.save(vars(progress), part)
    if progress.history:
        model.load_state_dict(progress.best)
    model.eval()
    return [Epoch(**epoch) for epoch in progress.history]


def _train_epoch(
    model: nn.Module, loader: DataLoader, optimizer: SGD, scheduler: LambdaLR, title: str
) -> float:
    """Train for one pass over the loader and return the mean loss."""
    where = device()
    total = torch.zeros((), device=where)
    for images, labels in tqdm(loader, desc=title, leave=False):
        images = images.to(where, memory_format=torch.channels_last)
        loss = F.cross_entropy(model(images), labels.to(where))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.detach()
    mean = float(total) / len(loader)
    if not math.isfinite(mean):
        raise TrainingError(
            f"The loss became {mean} in {title}: the training diverged. Lower the learning_rate of "
            "the recipe and train again."
        )
    return mean


def _resume(
    path: Path, fresh: _Progress, model: nn.Module, optimizer: SGD, scheduler: LambdaLR
) -> _Progress:
    """Return the progress of an interrupted training, or `fresh` if the file is of another."""
    try:
        stored = _Progress(**torch.load(path, map_location=device(), weights_only=True))
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
        _logger.warning(
            "%s belongs to another training (weights, recipe or seed); starting at epoch 1.",
            path.name,
        )
        return fresh
    _logger.info(
        "%s: continuing after epoch %d. Delete it to start at epoch 1.",
        path.name,
        len(stored.history),
    )
    model.load_state_dict(stored.model)
    optimizer.load_state_dict(stored.optimizer)
    scheduler.load_state_dict(stored.scheduler)
    return stored
