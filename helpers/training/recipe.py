"""How a model is trained: the recipe, and the learning rate of each step.

Explained in `03_retrain.ipynb`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the retraining repeats it unchanged.

    The learning rate rises linearly over `warmup` (a share of all steps), then falls
    along a half cosine, or by a factor of ten every `step_epochs` epochs.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    momentum: float = 0.9
    warmup: float = 0.0
    step_epochs: int | None = None


def schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the factor on the learning rate for each step of a training."""
    total = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.step_epochs is not None:
            return 0.1 ** (step // steps_per_epoch // recipe.step_epochs)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))

    return factor
