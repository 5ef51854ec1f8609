"""Train, retrain and evaluate. Explained in `03_retrain.ipynb`."""

import copy
import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from helpers.errors import InputError
from helpers.files import atomic_write
from helpers.layers import in_mode
from helpers.machine import device
from helpers.metrics import Accuracy, Comparison
from helpers.sparsity.prune import hold_masks
from helpers.training.data import Splits
from helpers.training.recipe import Recipe, schedule


def evaluate(model: nn.Module, loader: DataLoader) -> Accuracy:
    """Return the top-1 accuracy of a network over a loader, in evaluation mode.

    The network is moved to the GPU, if there is one, and to channels-last, and stays so.
    """
    (right,) = _right([model], loader)
    return Accuracy(int(right.sum()), len(right))


def compare(first: nn.Module, second: nn.Module, loader: DataLoader) -> Comparison:
    """Return how much better the second network is on the images of a loader.

    Both are moved as `evaluate` does. Explained in `03_retrain.ipynb`.
    """
    one, other = _right([first, second], loader)
    return Comparison(int((one & ~other).sum()), int((other & ~one).sum()), len(one))


def _right(networks: Sequence[nn.Module], loader: DataLoader) -> Tensor:
    """Return for each network (rows) and image (columns) whether it is classified correctly."""
    where, right = device(), []
    with ExitStack() as modes:
        for network in networks:
            # Not in inference mode: weights made inside it could not be trained any more.
            network.to(where, memory_format=torch.channels_last)
            modes.enter_context(in_mode(network, training=False))
        modes.enter_context(torch.inference_mode())
        for images, labels in tqdm(loader, desc="evaluate", leave=False):
            images = images.to(where, memory_format=torch.channels_last)
            answers = [network(images).argmax(1) for network in networks]
            right.append(torch.stack(answers).cpu() == labels)
    return torch.cat(right, dim=1)


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave."""

    number: int  # from 1
    loss: float  # mean over the epoch
    validation: float  # top-1 on the validation images, per cent
    seconds: float


@dataclass
class _Progress:
    """Everything that a resumed training needs to go on as if never stopped."""

    procedure: str
    start: str  # checksum of the weights it began with
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    scheduler: dict = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)


def train(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    seed: int,
    masks: dict[str, Tensor] | None = None,
    progress_file: Path | None = None,
) -> list[Epoch]:
    """Train a network and leave it with its best weights.

    The best weights are those of the epoch with the highest accuracy on the
    validation images; of equal epochs the earlier one. A copy is trained: until the
    end the network stays as it was, so that an interrupted call can be repeated.

    Args:
        model: the network to start from; it receives the best weights at the end.
        splits: training and validation images.
        recipe: the procedure, the same for training and retraining.
        seed: sets the order and the augmentation of the images.
        masks: weights to hold at zero, as `prune_2to4_` returned them.
        progress_file: written after every epoch. A training that was interrupted goes
            on from it; one that is finished is loaded from it.

    Returns:
        One `Epoch` for each epoch.

    Raises:
        InputError: the loss is no longer a number.

    Source: the procedure is that of Mishra et al., arXiv 2104.08378: repeat the
    original training with the zeros fixed.
    """
    where = device()
    trained = copy.deepcopy(model).to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        trained.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(recipe, len(splits.train)))
    masks = {name: mask.to(where) for name, mask in (masks or {}).items()}
    progress = _Progress(f"{recipe} {seed} {sorted(masks)}", _checksum(model.state_dict()))
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
        print(
            f"epoch {number}/{recipe.epochs}: loss {loss:.4f}, "
            f"validation {validation:.2f} %, {epoch.seconds:.0f} s"
        )
        if validation > max((past["validation"] for past in progress.history), default=-1.0):
            progress.best = copy.deepcopy(trained.state_dict())
        progress.history.append(asdict(epoch))
        progress.model = trained.state_dict()
        progress.optimizer = optimizer.state_dict()
        progress.scheduler = scheduler.state_dict()
        if progress_file is not None:
            with atomic_write(progress_file) as part:
                torch.save(vars(progress), part)
    model.load_state_dict(progress.best)
    model.eval()
    return [Epoch(**epoch) for epoch in progress.history]


def _train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    title: str,
) -> float:
    """Train for one pass over the loader and return the mean loss."""
    model.train()
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
        raise InputError(
            f"The loss became {mean} in {title}: the training diverged. Lower "
            "recipe's learning rate and train again."
        )
    return mean


def _checksum(state: dict[str, Tensor]) -> str:
    """Return a checksum of all weights of a network."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resume(
    path: Path,
    fresh: _Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> _Progress:
    """Load an interrupted training; say so, and start afresh if it was another one."""
    try:
        stored = _Progress(**torch.load(path, map_location=device(), weights_only=True))
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise InputError(
            f"{path.name} is damaged ({type(error).__name__}). Delete it and run this step "
            "again: the training then starts from its first epoch."
        ) from error
    # A finished training may be asked for again by a network that it has already changed.
    if stored.procedure != fresh.procedure or fresh.start not in (
        stored.start,
        _checksum(stored.best),
    ):
        print(f"{path.name} is of another training (weights, recipe or seed); starting afresh.")
        return fresh
    print(f"{path.name}: going on after epoch {len(stored.history)}. Delete it to start afresh.")
    model.load_state_dict(stored.model)
    optimizer.load_state_dict(stored.optimizer)
    scheduler.load_state_dict(stored.scheduler)
    return stored
