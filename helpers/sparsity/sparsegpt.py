"""One-shot pruning that makes up for what it removes: SparseGPT.

Explained in `02_prune_2_4.ipynb`.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.errors import InputError
from helpers.layers import ModelInputs, in_mode
from helpers.parameters import no_grad_for, require_numbers, require_unsharded, unwrapped
from helpers.products import Product, aten, watch_products
from helpers.sparsity.eligibility import Selection, select_weights, why_none_eligible
from helpers.sparsity.masks import diverged, mask_2to4
from helpers.sparsity.prune import Masks

_logger = logging.getLogger(__name__)

# How many numbers of an input are unfolded at a time: 128 MiB in double precision.
_CHUNK = 2**24


def prune_sparsegpt_(
    model: nn.Module,
    calibration_data: Iterable[Any],
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    dampening: float = 0.01,
    block_size: int = 128,
) -> Masks:
    """Prune 2:4 in place, and change the kept weights so that each layer's outputs stay close.

    One layer after another, in the order of execution, loses the weights that matter
    least for its outputs on the calibration data, which reaches it through the layers that
    are pruned already. No gradient is computed, and nothing else in the model changes.

    Memory: a copy of the eligible weights on the CPU, to restore the model from; on
    the model's device what one layer needs, above all its Hessian of (columns, columns)
    float64 for each group of the layer.

    Args:
        model: any model; it runs in evaluation mode and gets its mode back.
        calibration_data: batches of inputs: tensors, tuples whose first item is one, or
            dictionaries of named inputs. They are read once for every layer and moved to
            the model's device: pass a list, or a loader that yields the same batches every
            time.
        rules: which weights are eligible, as in `prune_2to4_`.
        include: as in `prune_2to4_`.
        exclude: as in `prune_2to4_`.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: how many columns are pruned before the others are updated, a multiple
            of four; it changes the speed, and the result only by rounding.

    Returns:
        The mask of each pruned weight, by the parameter's name; empty, with a warning, if no
        weight is eligible.

    Raises:
        InputError: a weight or its input is NaN or infinite, a weight is used in no linear
            layer, attention layer or convolution that is not transposed, the calibration data
            cannot be read, or a Hessian is singular. After this or any other error the model
            is as it was.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774.
    """
    from tqdm.auto import tqdm

    if isinstance(calibration_data, Iterator):
        raise InputError(
            "`calibration_data` is an iterator, which is exhausted after one pass, but is read "
            "once for every layer. Pass a list or a DataLoader."
        )
    model = unwrapped(model)
    candidates = select_weights(model, rules, include, exclude)
    weights = {weight.name: weight.parameter for weight in candidates if weight.eligible}
    if not weights:
        _logger.warning("Nothing was pruned: %s", why_none_eligible(model, rules, candidates))
        return {}
    for name, weight in weights.items():
        require_unsharded(weight, name)
        require_numbers(weight, name)
        if not weight.detach().isfinite().all():
            raise diverged(name)
    masks = {}
    with no_grad_for(weights.values()), in_mode(model, training=False), _all_or_nothing(weights):
        uses = _count_uses(model, weights, calibration_data)
        for name in tqdm(uses, desc="SparseGPT", leave=False):
            hessian = _hessian(model, name, weights[name], uses[name], calibration_data)
            masks[name] = _prune_weight_(weights[name], hessian, dampening, block_size, name)
    return {name: masks[name] for name in weights}


def sparsegpt_2to4(
    weight: Tensor,
    hessian: Tensor,
    dampening: float = 0.01,
    block_size: int = 128,
    name: str = "the weight",
) -> tuple[Tensor, Tensor]:
    """Prune a matrix 2:4, and change the kept weights to keep its products close.

    The columns are visited from left to right. At every fourth, each row gives up the
    two weights of the group whose loss costs least; the columns to the right of each make
    up for its loss as well as they can.

    Args:
        weight: (*, rows, columns); every four columns form a group.
        hessian: (*, columns, columns), the sum of x xᵀ over all inputs x, in float64.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: how many columns are pruned before the others are updated.
        name: what to call the weight in an error.

    Returns:
        The pruned matrix in float64, and its mask; true where a weight is kept.

    Raises:
        InputError: the Hessian is singular, or `dampening` or `block_size` is out of range.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, algorithm 1.
    """
    if block_size < 4 or block_size % 4:
        raise InputError(f"block_size is {block_size}; it must be a multiple of four.")
    factor = _inverse_factor(hessian, dampening, name)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    pruned = weight.detach().to(torch.float64, copy=True)
    mask = torch.ones_like(pruned, dtype=torch.bool)
    columns = weight.shape[-1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.zeros_like(pruned[..., start:stop])
        for column in range(start, stop):
            if column % 4 == 0:
                group = slice(column, column + 4)
                # The square of this is what the outputs lose when the weight goes.
                loss = pruned[..., group] / pivots[..., None, group]
                mask[..., group] = mask_2to4(loss.reshape(-1, 4), name).view_as(loss)
            removed = pruned[..., column].masked_fill(mask[..., column], 0)
            error = (removed / pivots[..., None, column]).unsqueeze(-1)
            pruned[..., column:stop] -= error * factor[..., column, None, column:stop]
            errors[..., column - start] = error.squeeze(-1)
        pruned[..., stop:] -= errors @ factor[..., start:stop, stop:]
    return pruned.masked_fill_(~mask, 0), mask


def _inverse_factor(hessian: Tensor, dampening: float, name: str) -> Tensor:
    """Return the upper triangular U with UᵀU = inverse of the dampened Hessian.

    Row j of U, divided by its pivot, says how the columns right of j make up for a change
    of column j when those to its left stay fixed.
    """
    if not 0 <= dampening < math.inf:
        raise InputError(f"dampening is {dampening}; it must be a finite number of at least zero.")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    # A layer whose inputs were all zero may lose any weights; with 1 it is the smallest.
    dampened = hessian.clone()
    dampened.diagonal(dim1=-2, dim2=-1).add_(dampening * torch.where(mean > 0, mean, 1))
    # Factored from the last column to the first, H = V Vᵀ has an upper triangular V, and U
    # is its inverse: no inverse of H itself is formed.
    factor, failed = torch.linalg.cholesky_ex(dampened.flip(-1, -2))
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    rounding = hessian.shape[-1] * torch.finfo(hessian.dtype).eps * diagonal.amax(-1)
    if failed.any() or not (pivots > rounding).all():
        raise InputError(
            f"The Hessian of {name} is singular: some of its inputs are always zero or follow "
            f"from the others. Use more calibration data or a dampening above {dampening}."
        )
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor.flip(-1, -2), identity, upper=True)


def _prune_weight_(
    weight: Tensor, hessian: Tensor, dampening: float, block_size: int, name: str
) -> Tensor:
    """Prune a layer's weight in place and return its mask."""
    # (groups, rows, kernel positions * input channels): four columns in a row are four
    # input channels at one position, which is the pattern that sparse kernels read.
    groups, channels = len(hessian), weight.shape[1]
    split = weight.detach().reshape(groups, len(weight) // groups, channels, -1)
    matrix = split.transpose(2, 3).flatten(2)
    pruned, mask = (
        result.unflatten(2, (-1, channels)).transpose(2, 3).reshape(weight.shape)
        for result in sparsegpt_2to4(matrix, hessian, dampening, block_size, name)
    )
    weight.copy_(pruned)
    if not weight.isfinite().all():
        raise InputError(
            f"{name} has become too large for {weight.dtype}. Use more calibration data or a "
            f"dampening above {dampening}."
        )
    return mask


# --- what a weight is multiplied with ---


class _StopForwardError(Exception):
    """Ends a forward pass whose remaining layers are not needed.

    Nothing but an exception leaves a `forward` that is not ours; `_hessian` catches it.
    """


def _why_not(product: Product, weight: Tensor) -> str:
    """Return why a product is not one of the weight's rows with its inputs; empty if it is."""
    factor = product.factor
    if product.operator is aten.convolution:
        if product.arguments[6]:
            return "transposed, as the filters of a transposed convolution"
    elif factor.dim() == 2 and not product.factor_first:
        factor = factor.mT  # x Wᵀ, as linear layers and attention compute it
    elif not product.factor_first or product.input.dim() > 1:  # W x does, for a single vector x
        return "in another product than x Wᵀ"
    if factor.shape != weight.shape or factor.stride(1) != weight.stride(1):
        return "in parts, transposed or in another shape"
    return ""


_NEVER = (
    "the first calibration batch is not multiplied with it, since its layer does not run or "
    "computes another weight from it"
)


def _count_uses(
    model: nn.Module, weights: Mapping[str, Tensor], calibration_data: Iterable[Any]
) -> Counter[str]:
    """Return how often the first batch is multiplied with each weight, in that order."""
    uses: Counter[str] = Counter()
    reasons: dict[str, str] = {}

    def count(product: Product) -> None:
        if not product.weight:
            return
        if reason := _why_not(product, weights[product.weight]):
            reasons[product.weight] = reason
        else:
            uses[product.weight] += 1

    args, kwargs = next(_batches(calibration_data, weights))
    with watch_products(weights, count):
        model(*args, **kwargs)
    for name in weights:
        if name in uses:
            continue
        reason = f"it is used {reasons[name]}" if name in reasons else _NEVER
        raise InputError(f"SparseGPT cannot prune {name}: {reason}. Leave it dense with `exclude`.")
    return uses


def _hessian(
    model: nn.Module, name: str, weight: Tensor, uses: int, calibration_data: Iterable[Any]
) -> Tensor:
    """Return the sum of x xᵀ over what a weight is multiplied with, (groups, columns, columns).

    In float64: thousands of terms are added up, and the result, with a condition in the
    thousands too, is inverted.
    """
    hessian = torch.zeros((), dtype=torch.float64, device=weight.device)
    left = 0

    def add(product: Product) -> None:
        nonlocal hessian, left
        if not product.weight or _why_not(product, weight):
            return
        for rows in _rows(product):
            hessian = hessian + rows.mT @ rows
        left -= 1
        if left == 0:
            raise _StopForwardError

    for args, kwargs in _batches(calibration_data, {name: weight}):
        left = uses
        with suppress(_StopForwardError), watch_products({name: weight}, add):
            model(*args, **kwargs)
    if not hessian.isfinite().all():
        raise InputError(
            f"The inputs of {name} have NaN or infinite values. Look for them in the calibration "
            "data and in the layers before it."
        )
    return hessian


def _rows(product: Product) -> Iterator[Tensor]:
    """Yield what a weight is multiplied with, as (groups, rows, columns) in float64.

    The columns are ordered as in `_prune_weight_`: position by position of the kernel, all
    channels of a group together.
    """
    if product.operator is aten.convolution:
        groups = product.arguments[-1]
        channels, *kernel = product.factor.shape[1:]
        windows = _windows(product)
    else:
        groups, kernel = 1, []
        channels = product.input.shape[-1]
        windows = product.input.reshape(-1, channels)
    for part in windows.split(max(1, _CHUNK // windows[0].numel())):
        part = part.reshape(len(part), groups, channels, -1, math.prod(kernel))
        yield part.permute(1, 0, 3, 4, 2).flatten(3).flatten(1, 2).double()


def _windows(product: Product) -> Tensor:
    """View what a kernel sees at each place: (images, channels, *output, *kernel).

    `F.unfold` would do the same, for images of two dimensions only.
    """
    kernel = product.factor.shape[2:]
    _, _, _, *settings = product.arguments[:6]
    strides, paddings, dilations = (
        tuple(each) * (len(kernel) // len(each))
        for each in settings  # one number counts for all
    )
    # `F.pad` takes the zeros before and after each axis, the last axis first.
    windows = F.pad(product.input, [zeros for each in reversed(paddings) for zeros in (each, each)])
    for axis, (size, stride, dilation) in enumerate(
        zip(kernel, strides, dilations, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return windows


# --- the model around it ---


def _batches(
    calibration_data: Iterable[Any], weights: Mapping[str, Tensor]
) -> Iterator[ModelInputs]:
    """Yield what to call the model with for each batch, on the device of the weights."""
    device = next(iter(weights.values())).device
    count = 0
    for batch in calibration_data:
        count += 1
        if isinstance(batch, Mapping):
            yield (), {name: _moved(value, device) for name, value in batch.items()}
            continue
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(inputs, Tensor):
            raise InputError(
                f"A calibration batch is a {type(inputs).__name__}. Pass tensors, tuples whose "
                "first item is one, or dictionaries of named inputs."
            )
        yield (inputs.to(device),), {}
    if count == 0:
        raise InputError("There is no calibration data: `calibration_data` is empty.")


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _all_or_nothing(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Restore the weights if anything goes wrong, an interruption too."""
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    try:
        yield
    except BaseException:
        for name, weight in weights.items():
            weight.copy_(before[name])
        raise
