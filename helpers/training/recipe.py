"""How a model is trained: the recipe, and the learning rate of each step.

Explained in `03_retrain.ipynb`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from helpers.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; retraining repeats it unchanged.

    The learning rate rises linearly over `warmup` (a share of all steps), then falls
    along a half cosine, or by a factor of ten every `step_epochs` epochs.

    Raises:
        InputError: a value is out of its range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    momentum: float = 0.9
    warmup: float = 0.0
    step_epochs: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "epochs": (self.epochs >= 0, "at least 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "warmup": (0 <= self.warmup <= 1, "from 0 to 1"),
            "step_epochs": (self.step_epochs is None or self.step_epochs > 0, "above 0 or None"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"{name} of a recipe must be {wanted}, not {getattr(self, name)}.")


def schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the factor on the learning rate for each step of a training.

    Args:
        recipe: its epochs, warm-up and decay are used.
        steps_per_epoch: batches in an epoch.

    Raises:
        InputError: there are no steps in an epoch.
    """
    if steps_per_epoch < 1:
        raise InputError(f"An epoch has {steps_per_epoch} steps, and needs at least 1.")
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup * total)
    decay = max(total - warmup, 1)  # a warm-up may last to the end

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.step_epochs is not None:
            return 0.1 ** (step // steps_per_epoch // recipe.step_epochs)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / decay)

    return factor
