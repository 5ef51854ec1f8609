"""How a model is trained: the recipe, its YAML file, and the learning rate of each step.

Explained in `03_retrain.ipynb`; docs/retraining.md lists every value.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from helpers.errors import InputError, first_line
from helpers.files import atomic_write, shown

AMP_TYPES = ("bf16", "fp16")

# What the case study's training is made of. The other values are extensions of it, and an
# object's `repr` leaves them out where they change nothing.
_ALWAYS_SHOWN = (
    "epochs", "batch_size", "learning_rate", "weight_decay", "momentum", "warmup", "step_epochs",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Recipe:
    """How a model is trained; retraining repeats it unchanged.

    The learning rate rises linearly over `warmup` (a share of all steps), then falls
    along a half cosine, or by a factor of ten every `step_epochs` epochs.

    Raises:
        InputError: a value is out of its range.
    """

    epochs: int
    batch_size: int  # images of one step, over all processes
    learning_rate: float
    weight_decay: float
    momentum: float = 0.9
    warmup: float = 0.0
    step_epochs: int | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None  # average the weights over the steps, and keep the average
    distillation: float = 0.0  # share of the loss that compares with the teacher
    temperature: float = 1.0  # softens both distributions that distillation compares
    amp: str | None = None  # bf16 or fp16: mixed precision
    sync_batch_norm: bool = False  # statistics over all processes, on GPUs
    accumulation: int = 1  # parts of a batch that are computed one after the other
    channels_last: bool = True
    compile: bool = False  # by torch.compile

    def __post_init__(self) -> None:
        decay = self.ema_decay
        ranges = {
            "epochs": (self.epochs >= 0, "at least 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (self.learning_rate >= 0, "at least 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "momentum": (0 <= self.momentum < 1, "from 0 to below 1"),
            "warmup": (0 <= self.warmup <= 1, "from 0 to 1"),
            "step_epochs": (self.step_epochs is None or self.step_epochs > 0, "above 0 or None"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "from 0 to below 1"),
            "ema_decay": (decay is None or 0 < decay < 1, "between 0 and 1, or None"),
            "distillation": (0 <= self.distillation <= 1, "from 0 to 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "amp": (self.amp is None or self.amp in AMP_TYPES, "bf16, fp16 or None"),
            "accumulation": (self.accumulation >= 1, "at least 1"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"{name} of a recipe must be {wanted}, not {getattr(self, name)}.")

    def __repr__(self) -> str:
        shown_fields = [
            field.name
            for field in fields(self)
            if field.name in _ALWAYS_SHOWN or getattr(self, field.name) != field.default
        ]
        return f"Recipe({', '.join(f'{name}={getattr(self, name)!r}' for name in shown_fields)})"

    @property
    def procedure(self) -> "Recipe":
        """The recipe without what only says how to compute it on one machine or another."""
        return replace(self, accumulation=1, channels_last=True, compile=False)


def read_recipe(path: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a YAML file.

    Args:
        path: a file with one `name: value` on each line, as `write_recipe` writes it.
        changes: values that replace those of the file, by name.

    Raises:
        InputError: the file is missing or no such YAML, or a value is missing, unknown, of the
            wrong type or out of its range.
    """
    import yaml  # here: only who reads a file needs it

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe {shown(path)} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise InputError(
            f"The recipe {shown(path)} is not YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"The recipe {shown(path)} has no values: write one `name: value` on each line, such "
            "as `epochs: 90`."
        )
    try:
        return make_recipe({**values, **(changes or {})})
    except InputError as error:
        raise InputError(f"{shown(path)}: {first_line(error)}") from error


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Return the recipe that has these values.

    Raises:
        InputError: a value is missing, unknown, of the wrong type or out of its range.
    """
    known = {field.name: field for field in fields(Recipe)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"Did you mean {near[0]}?" if near else f"It may have {', '.join(known)}."
            raise InputError(f"A recipe has no value {name!r}. {hint}")
    missing = [
        name for name, field in known.items() if field.default is MISSING and name not in values
    ]
    if missing:
        raise InputError(f"The recipe lacks {', '.join(missing)}.")
    kinds = get_type_hints(Recipe)
    return Recipe(**{name: _typed(name, kinds[name], value) for name, value in values.items()})


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _typed(name: str, kind: Any, value: Any) -> Any:
    """Return a value of a YAML file in the type of its field."""
    choices = get_args(kind) or (kind,)
    if value in (None, "none") and NoneType in choices:
        return None
    wanted = next(choice for choice in choices if choice is not NoneType)
    # YAML 1.1 reads 1e-4, without a dot, as text, and a command line has nothing but text.
    if wanted in (int, float) and isinstance(value, str):
        try:
            return wanted(value)
        except ValueError:
            pass
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise InputError(f"{name} of a recipe must be {_KINDS[wanted]}, not {value!r}.")
    return value


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, in one piece or not at all.

    Raises:
        WriteError: the disk is full or the folder cannot be written to.
    """
    import yaml

    with atomic_write(path) as part:
        part.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")


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
