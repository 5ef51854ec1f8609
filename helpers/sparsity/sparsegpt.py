"""One-shot pruning that makes up for what it removes: SparseGPT.

Explained in `02b_better_pruning.ipynb`.
"""

import inspect
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.errors import InputError
from helpers.layers import ModelInputs, in_mode
from helpers.parameters import no_grad_for, require_numbers, require_unsharded, unwrapped
from helpers.products import Product, aten, storage_of, watch_products
from helpers.progress_bar import progress_bar
from helpers.sparsity.eligibility import (
    Candidate,
    Selection,
    select_weights,
    why_none_eligible,
)
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
    float64 for each group of the layer, or for each part of it that has inputs of its own,
    such as queries and keys.

    Args:
        model: any model; it runs in evaluation mode and gets its mode back.
        calibration_data: batches of inputs, each a tensor; a dictionary of named inputs; or a
            tuple or list, of which `forward` gets as many items as it requires, and at least
            one. What follows them, such as labels, is ignored, with a warning if it could be an
            input: inputs that `forward` does not require have to be named. The batches are read
            once for every layer and moved to the model's device: pass a list, or a loader that
            yields the same batches every time.
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
        InputError: a weight or its input is NaN or infinite, the calibration data is not
            multiplied with a weight as linear layers, attention and convolutions do it, the
            calibration data cannot be read, or a Hessian is singular. After this or any other
            error the model is as it was.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774.
    """
    if isinstance(calibration_data, Iterator):
        raise InputError(
            "`calibration_data` is an iterator, which is exhausted after one pass, but is read "
            "once for every layer. Pass a list or a DataLoader."
        )
    model = unwrapped(model)
    candidates = select_weights(model, rules, include, exclude)
    weights = {weight.name: weight for weight in candidates if weight.eligible}
    if not weights:
        _logger.warning("Nothing was pruned: %s", why_none_eligible(model, rules, candidates))
        return {}
    for name, weight in weights.items():
        require_unsharded(weight.parameter, name)
        require_numbers(weight.parameter, name)
        if not weight.parameter.detach().isfinite().all():
            raise diverged(name)
    masks = {}
    parameters = [weight.parameter for weight in weights.values()]
    with no_grad_for(parameters), in_mode(model, training=False), _all_or_nothing(weights):
        uses = _count_uses(model, weights, calibration_data)
        for name in progress_bar(uses, desc="SparseGPT"):
            hessians = _hessians(model, weights[name], uses[name], calibration_data)
            masks[name] = _prune_weight_(weights[name], hessians, dampening, block_size)
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
        weight: `(*, rows, columns)`; every four columns form a group.
        hessian: `(*, columns, columns)`, the sum of x xᵀ over all inputs x, in float64.
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
    weight: Candidate, hessians: "_Hessians", dampening: float, block_size: int
) -> Tensor:
    """Prune a layer's weight in place and return its mask."""
    tensor = weight.parameter.detach()
    mask = torch.empty_like(tensor, dtype=torch.bool)
    by_rows = _by_rows(weight, tensor)
    # (rows, kernel positions * input channels): four columns in a row are four input
    # channels at one position, which is the pattern that sparse kernels read.
    channels_last = by_rows.reshape(*by_rows.shape[:3], -1).transpose(2, 3)
    matrix = channels_last.flatten(2).flatten(0, 1)
    pruned = matrix.new_empty(matrix.shape, dtype=torch.float64)
    kept = matrix.new_empty(matrix.shape, dtype=torch.bool)
    for first, last, hessian in _rows_with_hessians(hessians, matrix):
        parts = matrix[first:last].unflatten(0, (len(hessian), -1))
        results = sparsegpt_2to4(parts, hessian, dampening, block_size, weight.name)
        for whole, result in zip((pruned, kept), results, strict=True):
            whole[first:last] = result.flatten(0, 1)
    for target, result in ((tensor, pruned), (mask, kept)):
        ordered = result.view(channels_last.shape).transpose(2, 3)
        _by_rows(weight, target).copy_(ordered.reshape(by_rows.shape))
    if not tensor.isfinite().all():
        raise InputError(
            f"{weight.name} has become too large for {tensor.dtype}. Use more calibration data or "
            f"a dampening above {dampening}."
        )
    return mask


def _by_rows(weight: Candidate, tensor: Tensor) -> Tensor:
    """View a tensor in the shape of a weight as (groups, output channels, input channels, ...)."""
    grouped = tensor.unflatten(0, (weight.groups, -1))
    return grouped.transpose(1, 2) if weight.input_dim == 0 else grouped


def _rows_with_hessians(hessians: "_Hessians", matrix: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first and last of consecutive rows, and the Hessian of each equal part of them."""
    rows, columns = matrix.shape
    seen = [
        (start + group * size, start + (group + 1) * size, hessian)
        for (start, size), sums in hessians.items()
        for group, hessian in enumerate(sums.split(1))
    ]
    edges = sorted({0, rows, *(edge for first, last, _ in seen for edge in (first, last))})
    for _, run in groupby(pairwise(edges), key=lambda part: part[1] - part[0]):
        parts = list(run)
        totals = []
        for first, last in parts:
            own = [hessian for start, stop, hessian in seen if start <= first and last <= stop]
            # Rows that nothing is multiplied with may lose any weights; here, the smallest.
            own = own or [matrix.new_zeros(1, columns, columns, dtype=torch.float64)]
            totals.append(reduce(torch.add, own))
        yield parts[0][0], parts[-1][1], totals[0] if len(totals) == 1 else torch.cat(totals)


# --- what a weight is multiplied with ---

# Sums of x xᵀ, each for consecutive parts of the rows of a weight: by the first row and the
# number of rows in a part, (parts, columns, columns).
_Hessians = dict[tuple[int, int], Tensor]


class _StopForwardError(Exception):
    """Ends a forward pass whose remaining layers are not needed.

    Nothing but an exception leaves a `forward` that is not ours; `_hessians` catches it.
    """


class _OtherUseError(Exception):
    """Says how a weight is used where its rows are not multiplied with inputs."""


def _outputs(product: Product, weight: Candidate) -> range:
    """Return which of the outputs that a weight can compute a product computes.

    Raises:
        _OtherUseError: they are not the sums over inputs that the layer's outputs are.
    """
    whole, factor = weight.parameter, product.factor
    if product.operator is aten.convolution:
        is_transposed, groups = bool(product.arguments[6]), product.arguments[8]
        if is_transposed != weight.transposed or (is_transposed and groups != weight.groups):
            raise _OtherUseError("as the filters of another kind of convolution")
    elif factor.dim() > 2 or weight.transposed:
        raise _OtherUseError("in a product of another form than the layer's")
    elif factor.dim() == 1:
        factor = factor[None]
    elif product.factor_first == (weight.input_dim == 0):
        factor = factor.mT  # x Wᵀ, as linear layers and attention compute it
    rows, part = whole.flatten(1).to(factor.dtype), factor.flatten(1)
    starts = []
    if storage_of(factor) == storage_of(whole):
        starts = [int(factor.storage_offset() - whole.storage_offset()) // whole.stride(0)]
    elif len(part) and rows.shape[1] == part.shape[1]:  # a copy, such as autocast makes
        starts = (rows == part[0]).all(1).nonzero().flatten().tolist()
    # In the same memory there may still be a transpose, or only some of the columns.
    found = [start for start in starts if torch.equal(rows[start : start + len(part)], part)]
    inputs_first = weight.input_dim == 0
    if len(found) != 1 or len(part) < (len(rows) if inputs_first else 1):
        raise _OtherUseError("transposed, or in other parts than whole rows")
    if inputs_first:
        return range(weight.groups * whole.shape[1])
    return range(found[0], found[0] + len(part))


def _count_uses(
    model: nn.Module, weights: Mapping[str, Candidate], calibration_data: Iterable[Any]
) -> Counter[str]:
    """Return how often a batch is multiplied with each weight at most, in order of execution."""
    most: Counter[str] = Counter()
    reasons: dict[str, str] = {}

    def count(product: Product) -> None:
        name = product.weight
        if not name:
            return
        try:
            _outputs(product, weights[name])
        except _OtherUseError as reason:
            reasons[name] = f"it is used {reason}"
        else:
            uses[name] += 1

    tensors = {name: weight.parameter for name, weight in weights.items()}
    for args, kwargs in _batches(model, calibration_data, tensors):
        uses: Counter[str] = Counter()
        with watch_products(tensors, count):
            model(*args, **kwargs)
        most |= uses
    unused = [name for name in weights if name not in most]
    if unused:
        reason = reasons.get(unused[0], _NEVER)
        alike = [name for name in unused if reasons.get(name, _NEVER) == reason]
        names = ", ".join(alike[:5]) + (f" and {len(alike) - 5} more" if len(alike) > 5 else "")
        raise InputError(
            f"SparseGPT cannot prune {names}: {reason}. Leave such weights dense with `exclude`."
        )
    return most


_NEVER = (
    "no calibration batch is multiplied with it, since its layer does not run or computes "
    "another weight from it"
)


def _hessians(
    model: nn.Module, weight: Candidate, uses: int, calibration_data: Iterable[Any]
) -> _Hessians:
    """Return the sums of x xᵀ over what the rows of a weight are multiplied with.

    In float64: thousands of terms are added up, and the result, with a condition in the
    thousands too, is inverted.
    """
    hessians: _Hessians = {}
    left = 0

    def add(product: Product) -> None:
        nonlocal left
        if not product.weight:
            return
        try:
            outputs = _outputs(product, weight)
        except _OtherUseError:  # `_count_uses` has found others that count
            return
        for inputs in _inputs(product, weight):
            part = outputs.start, len(outputs) // len(inputs)
            hessians[part] = hessians.get(part, 0) + inputs.mT @ inputs
        left -= 1
        if left == 0:
            raise _StopForwardError

    tensors = {weight.name: weight.parameter}
    for args, kwargs in _batches(model, calibration_data, tensors):
        left = uses
        with suppress(_StopForwardError), watch_products(tensors, add):
            model(*args, **kwargs)
    if not all(hessian.isfinite().all() for hessian in hessians.values()):
        raise InputError(
            f"The inputs of {weight.name} have NaN or infinite values. Look for them in the "
            "calibration data and in the layers before it."
        )
    return hessians


def _inputs(product: Product, weight: Candidate) -> Iterator[Tensor]:
    """Yield what rows of a weight are multiplied with, as (groups, inputs, columns) in float64.

    The columns are ordered as in `_prune_weight_`: position by position of the kernel, all
    channels of a group together.
    """
    groups, positions = 1, 1
    if product.operator is aten.convolution:
        groups, positions = product.arguments[8], math.prod(product.factor.shape[2:])
        windows = _windows(product)
    else:
        columns_first = product.factor_first and product.input.dim() > 1  # W X
        vectors = product.input.mT if columns_first else product.input
        windows = vectors.reshape(-1, vectors.shape[-1], 1)
    channels = weight.input_channels
    if not windows.numel():  # as for an expert that no token of a batch is sent to
        outputs = len(_by_rows(weight, weight.parameter).flatten(0, 1))
        yield windows.new_zeros(groups, 0, weight.parameter.numel() // outputs).double()
        return
    for image in windows.split(max(1, _CHUNK // windows[0].numel())):
        for part in image.split(max(1, _CHUNK // image[:, :, 0].numel()), dim=2):
            columns = part.reshape(
                len(part), groups, -1, part[0, 0].numel() // positions, positions
            )
            if weight.transposed:  # an output meets the last position of the kernel first
                columns = columns.flip(-1)
            # As the weight has them: filters may be used as a matrix, or the other way round.
            columns = columns.permute(1, 0, 3, 2, 4).flatten(3).unflatten(3, (channels, -1))
            yield columns.transpose(3, 4).flatten(3).flatten(1, 2).double()


def _windows(product: Product) -> Tensor:
    """View what a kernel sees at each place: `(images, channels, *output, *kernel)`.

    `F.unfold` would do the same, for images of two dimensions only. A transposed convolution is
    an ordinary one of its inputs with zeros between them, in which the kernel is reversed.
    """
    kernel = product.factor.shape[2:]
    images = product.input
    strides, paddings, dilations, outer = (
        tuple(each) * (len(kernel) // len(each))  # one number counts for all
        for each in (*product.arguments[3:6], product.arguments[7])
    )
    # `F.pad` takes the zeros before and after each axis, the last axis first; below zero it cuts.
    zeros = [(size, size) for size in paddings]
    if product.arguments[6]:
        spread = [
            1 + (size - 1) * stride for size, stride in zip(images.shape[2:], strides, strict=True)
        ]
        images = images.new_zeros(*images.shape[:2], *spread)
        places = tuple(slice(None, None, stride) for stride in strides)
        images[:, :, *places] = product.input
        edges = [
            dilation * (size - 1) - padding
            for size, dilation, padding in zip(kernel, dilations, paddings, strict=True)
        ]
        zeros = [(edge, edge + more) for edge, more in zip(edges, outer, strict=True)]
        strides = (1,) * len(kernel)
    windows = F.pad(images, [size for each in reversed(zeros) for size in each])
    for axis, (size, stride, dilation) in enumerate(
        zip(kernel, strides, dilations, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return windows


# --- the model around it ---


def _batches(
    model: nn.Module, calibration_data: Iterable[Any], weights: Mapping[str, Tensor]
) -> Iterator[ModelInputs]:
    """Yield what to call the model with for each batch, on the device of the weights."""
    device = next(iter(weights.values())).device
    signature = inspect.signature(model.forward)
    count = 0
    for batch in calibration_data:
        count += 1
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
            raise InputError(
                f"A calibration batch is a {type(batch).__name__} without a tensor. Pass tensors, "
                "tuples of inputs, or dictionaries of named inputs."
            )
        args, kwargs = _arguments(batch, signature)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"A calibration batch does not fit {type(model).__name__}.forward{signature}: "
                f"{error}. Pass tuples with all inputs that it requires, or dictionaries of named "
                "inputs."
            ) from error
        yield tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    if count == 0:
        raise InputError("There is no calibration data: `calibration_data` is empty.")


def _arguments(batch: Any, signature: inspect.Signature) -> ModelInputs:
    """Return the positional and the named arguments that a batch of calibration data holds."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, tuple | list):
        return (batch,), {}
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = [each for each in signature.parameters.values() if each.kind in kinds]
    required = [each for each in positional if each.default is each.empty]
    taken = max(1, len(required))
    if min(len(batch), len(positional)) > taken:
        warnings.warn(
            f"The model gets {taken} of the {len(batch)} items of a calibration batch, because its "
            f"forward requires no more: {signature}. If others are inputs too, and not labels, "
            "pass dictionaries of named inputs.",
            stacklevel=2,
        )
    return tuple(batch[:taken]), {}


@contextmanager
def _all_or_nothing(weights: Mapping[str, Candidate]) -> Iterator[None]:
    """Restore the weights if anything goes wrong, an interruption too."""
    before = {
        name: weight.parameter.detach().to("cpu", copy=True) for name, weight in weights.items()
    }
    try:
        yield
    except BaseException:
        for name, weight in weights.items():
            weight.parameter.copy_(before[name])
        raise
