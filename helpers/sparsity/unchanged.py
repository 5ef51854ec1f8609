"""Check that a model computes the same before and after a change that should not matter.

Explained in `02b_better_pruning.ipynb`. Any change of order changes how sums are rounded, and a
deep network may amplify that. How much it may change the outputs is therefore measured: the
outputs are compared with those of the same model whose weights are changed by rounding errors.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.errors import InputError

# How many times what rounding does a change may do: sums in another order are rounded in
# another way, and the largest of a few trials is not the largest that can be.
_TIMES_ROUNDING = 100
_TRIALS = 3

# If rounding alone may change an output by this share of its largest value, a comparison of
# this output shows nothing.
_TELLS_NOTHING = 0.1

# The precisions to compare in, the first that runs; None is the model's own.
_PRECISIONS = (torch.float64, torch.float32, None)


@dataclass(frozen=True)
class Outputs:
    """What a model computes, and how far its outputs may be changed by rounding.

    Attributes:
        precision: the datatype that the model was run in, such as `float64`.
        values: its floating-point outputs, in double precision.
        tolerances: for each output, the largest relative error that rounding explains.
    """

    precision: str
    values: list[Tensor]
    tolerances: list[float]
    _model: str
    _dtype: torch.dtype | None
    _inputs: tuple[Any, ...]

    def check(self, model: nn.Module) -> float:
        """Return the largest relative error of the outputs of a changed model.

        Raises:
            InputError: it is larger than rounding explains.
        """
        found = _run(model, self._inputs, self._dtype)[0]
        errors = [
            _relative_error(after, before) for after, before in zip(found, self.values, strict=True)
        ]
        comparable = [pair for pair in zip(errors, self.tolerances, strict=True) if _tells(pair[1])]
        for error, tolerance in comparable:
            if not error <= tolerance:  # NaN too
                raise InputError(
                    f"{self._model} would compute something else with its channels permuted: its "
                    f"outputs differ by {error:.1e} of the largest, where rounding explains "
                    f"{tolerance:.1e}. The model has been restored. Exclude the layers that treat "
                    "single channels differently from the rest with `exclude=`."
                )
        return max(error for error, _ in comparable)


def outputs_of(model: nn.Module, example: tuple[Any, ...]) -> Outputs:
    """Run a copy of a model, in double precision where it can, and find its tolerances.

    Args:
        model: stays as it is.
        example: its positional inputs. Floating-point tensors are replaced by random
            numbers, unless the model fails on those.

    Raises:
        InputError: it cannot run, or its outputs would not show a change.
    """
    name = type(model).__name__
    why_not = ""
    for dtype in _PRECISIONS:
        for inputs in (_random_like(example), example):
            try:
                values, rounding = _run(model, inputs, dtype)
            except Exception as error:  # whatever a model raises
                line = next((line for line in str(error).splitlines() if line.strip()), "")
                why_not = why_not or (
                    f"A copy of {name} does not run ({type(error).__name__}: {line[:200]}), so its "
                    "outputs before and after cannot be compared: leave its channels as they are."
                )
                continue
            problem = _why_not_comparable(values, name)
            if problem:
                why_not = why_not or problem
                continue
            tolerances = _tolerances(model, inputs, dtype, values, rounding)
            if any(
                _tells(each) and value.any() for each, value in zip(tolerances, values, strict=True)
            ):
                precision = str(dtype or _own_dtype(model)).removeprefix("torch.")
                return Outputs(precision, values, tolerances, name, dtype, inputs)
            why_not = why_not or (
                f"Rounding alone may change the outputs of {name} by {min(tolerances):.1e} of the "
                "largest, so nothing would show whether it computes the same with its channels "
                "permuted: leave its channels as they are."
            )
    raise InputError(why_not)


@contextmanager
def zeros_filled(model: nn.Module) -> Iterator[None]:
    """Fill the parameters that are all zero with random numbers, and make them zero again.

    What a layer or a scale that starts from zero multiplies would not show in the outputs.
    """
    generator = torch.Generator().manual_seed(0)
    zeros = [p for p in model.parameters() if p.is_floating_point() and p.numel() and not p.any()]
    try:
        with torch.no_grad():
            for parameter in zeros:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values / math.sqrt(_fan_in(parameter)))
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _tells(tolerance: float) -> bool:
    return tolerance < _TELLS_NOTHING


def _fan_in(parameter: Tensor) -> int:
    return parameter[0].numel() if parameter.dim() > 1 else 1


def _own_dtype(model: nn.Module) -> torch.dtype:
    """Return the least precise datatype of a model's parameters."""
    dtypes = [each.dtype for each in model.parameters() if each.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _random_like(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return random inputs in double precision; all but floating-point tensors as they are."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in example
    )


def _run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    dtype: torch.dtype | None,
    change_: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[list[Tensor], float]:
    """Run a copy of a model, and return its outputs and the coarsest rounding on the way.

    Returns:
        The floating-point and complex outputs in double precision, and the relative
        distance of two numbers of the least precise datatype that values were rounded to.
    """
    # Values that hooks computed from parameters are not copied otherwise.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    copied = copy.deepcopy(model, computed).eval()
    if dtype is not None:
        copied = copied.double() if dtype == torch.float64 else copied.float()
    own = dtype or _own_dtype(model)
    inputs = tuple(
        value.to(own) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )
    change_(copied)
    precision = _Precision(dtype, torch.finfo(own).eps)
    with torch.no_grad(), torch.random.fork_rng(), precision:
        torch.manual_seed(0)  # for what a model draws itself
        outputs = copied(*inputs)
    leaves = [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    return [leaf.double() for leaf in leaves if leaf.is_floating_point()], precision.rounding


class _Precision(TorchDispatchMode):
    """Runs operators in one precision that a model asks to run in a lower one.

    A norm that casts its input to FP32, for instance, rounds at 1e-7. Where a lower precision
    remains, its rounding is noted.
    """

    def __init__(self, dtype: torch.dtype | None, rounding: float) -> None:
        super().__init__()
        self.rounding = rounding
        lower = [torch.float32, torch.float16, torch.bfloat16]
        complex_lower = [torch.complex64, torch.complex32]
        self._wider: dict[torch.dtype, torch.dtype] = {}
        if dtype == torch.float64:
            self._wider = dict.fromkeys(lower, torch.float64)
            self._wider |= dict.fromkeys(complex_lower, torch.complex128)
        elif dtype == torch.float32:
            self._wider = dict.fromkeys(lower[1:], torch.float32)
            self._wider |= dict.fromkeys(complex_lower[1:], torch.complex64)

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in self._wider:
            kwargs["dtype"] = self._wider[kwargs["dtype"]]
        # What an operator writes to, or returns a view of, has to remain the tensor it is.
        if isinstance(func, OpOverload) and not func.is_view and not func._schema.is_mutable:
            args, kwargs = _pytree.tree_map_only(Tensor, self._widen, (args, kwargs))
        outputs = func(*args, **kwargs)
        finest = min(map(_rounding_of, _pytree.tree_leaves((args, kwargs))), default=1.0)
        for leaf in _pytree.tree_leaves(outputs):
            if finest < _rounding_of(leaf) < 1:
                self.rounding = max(self.rounding, _rounding_of(leaf))
        return outputs

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._wider.get(tensor.dtype, tensor.dtype))


def _rounding_of(value: object) -> float:
    """Return the relative distance of two numbers in a tensor; 1 if it has no such numbers."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return torch.finfo(value.dtype).eps
    return 1.0


def _tolerances(
    model: nn.Module,
    inputs: tuple[Any, ...],
    dtype: torch.dtype | None,
    values: list[Tensor],
    rounding: float,
) -> list[float]:
    """Return what rounding may change of each output, relative to its largest value.

    Each weight is changed by as much as a sum over its inputs may be rounded.
    """
    generator = torch.Generator().manual_seed(0)

    def round_(copied: nn.Module) -> None:
        with torch.no_grad():
            for parameter in copied.parameters():
                if parameter.is_floating_point() and parameter.numel():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    noise *= rounding * math.sqrt(_fan_in(parameter))
                    parameter.mul_(1 + noise.to(parameter.device, parameter.dtype))

    largest = [rounding] * len(values)
    for _ in range(_TRIALS):
        changed = _run(model, inputs, dtype, round_)[0]
        for number, (after, before) in enumerate(zip(changed, values, strict=True)):
            largest[number] = max(largest[number], _relative_error(after, before))
    return [_TIMES_ROUNDING * each for each in largest]


def _why_not_comparable(outputs: list[Tensor], model: str) -> str:
    """Return why equal outputs would say nothing; empty if they would."""
    if any(output.isnan().any() for output in outputs):
        return (
            f"{model} returns NaN for random inputs, so nothing would show whether it computes the "
            "same with its channels permuted: load weights from before the training diverged."
        )
    if not any((output[output.isfinite()] != 0).any() for output in outputs):
        return (
            f"All floating-point outputs of {model} are zero for random inputs, or there are none, "
            "so nothing would show whether it computes the same with its channels permuted: load "
            "trained weights first, or leave its channels as they are."
        )
    return ""


def _relative_error(after: Tensor, before: Tensor) -> float:
    """Return the largest difference, relative to the largest of all finite expected values."""
    if not before.numel():
        return 0.0
    # Infinity, of a masked logit for instance, may remain infinity.
    difference = float((after - before).abs().masked_fill(after == before, 0.0).max())
    scale = float(before[before.isfinite()].abs().max()) if before.isfinite().any() else 0.0
    if not difference:
        return 0.0
    return difference / scale if scale else math.inf
