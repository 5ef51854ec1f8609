"""One-shot pruning that makes up for what it removes: SparseGPT.

Explained in `02_prune_2_4.ipynb`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from helpers.errors import InputError
from helpers.layers import in_mode
from helpers.sparsity.eligibility import Selection, eligible_weights
from helpers.sparsity.masks import diverged, mask_2to4

# So many numbers of an input are unfolded at a time: 128 MiB in double precision.
_CHUNK = 2**24


def prune_sparsegpt_(
    model: nn.Module,
    batches: Iterable,
    target: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    dampening: float = 0.01,
    block_size: int = 128,
) -> dict[str, Tensor]:
    """Prune 2:4 in place, and change the kept weights so that each layer's outputs stay close.

    One layer after another, in the order of execution, loses the weights that matter
    least for its outputs on the calibration images, as the layers already pruned hand
    them on. No gradient is computed, and nothing else in the network changes.

    Memory: a copy of the eligible weights on the CPU, to restore the network from; on
    the model's device what one layer needs, above all its Hessian of (columns, columns)
    float64 for each group of the layer.

    Args:
        model: any network; it runs in evaluation mode and gets its mode back.
        batches: tensors of images, or tuples whose first item is one. They are read
            once for every layer and moved to the model's device: a list, or a loader
            that yields the same images every time.
        target: what the layers are to be eligible for, as in `prune_2to4_`.
        include: as in `prune_2to4_`.
        exclude: as in `prune_2to4_`.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: so many columns are pruned before the others are updated, a
            multiple of four; it changes the speed, and nothing else but the rounding.

    Returns:
        The mask of each pruned weight, by the parameter's name.

    Raises:
        InputError: a weight or its input is NaN or infinite, a weight is used in
            neither a convolution nor a linear layer, `batches` cannot be read, or a
            Hessian is singular. After this or any other error the network is as it was.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774. Explained in
    `02_prune_2_4.ipynb`.
    """
    if isinstance(batches, Iterator):
        raise InputError(
            "`batches` is an iterator, which is exhausted after one pass, and the calibration "
            "images are read once for every layer. Pass a list or a DataLoader."
        )
    weights = eligible_weights(model, target, include, exclude)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise diverged(name)
    masks = {}
    with torch.no_grad(), in_mode(model, training=False), _all_or_nothing(weights):
        uses = _count_uses(model, weights, batches)
        for name in tqdm(uses, desc="SparseGPT", leave=False):
            hessian = _hessian(model, name, weights[name], uses[name], batches)
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
    two weights of the group whose loss costs least; for the error of each, the columns
    to its right make up as well as they can.

    Args:
        weight: (*, rows, columns); every four columns form a group.
        hessian: (*, columns, columns), the sum of x xᵀ over all inputs x, in float64.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: so many columns are pruned before the others are updated.
        name: what to call the weight in an error.

    Returns:
        The pruned matrix in float64, and its mask; true where a weight is kept.

    Raises:
        InputError: the Hessian is singular, or `dampening` or `block_size` is no
            sensible number.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, algorithm 1. Explained
    in `02_prune_2_4.ipynb`.
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
        raise InputError(f"dampening is {dampening}; it must be a number from zero on.")
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
            f"from the others. Use more calibration images or a dampening above {dampening}."
        )
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor.flip(-1, -2), identity, upper=True)


def _prune_weight_(
    weight: Tensor, hessian: Tensor, dampening: float, block_size: int, name: str
) -> Tensor:
    """Prune a layer's weight in place and return its mask."""
    # (groups, rows, kernel positions * input channels): four columns in a row are four
    # input channels at one position, which is the pattern that the hardware reads.
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
            f"{name} has become too large for {weight.dtype}. Use more calibration images or a "
            f"dampening above {dampening}."
        )
    return mask


# What a weight is multiplied with.
@dataclass(frozen=True)
class _Product:
    """A product with a weight; the fields are the arguments of `F.linear` and `F.conv2d`."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    def rows(self) -> Iterator[Tensor]:
        """Yield what the weight is multiplied with, as (groups, rows, columns) in float64.

        The columns are ordered as in `_prune_weight_`: position by position of the
        kernel, all channels of a group together.
        """
        channels, *kernel = self.weight.shape[1:]
        windows = self._windows() if kernel else self.input.reshape(-1, channels)
        for part in windows.split(max(1, _CHUNK // windows[0].numel())):
            part = part.reshape(len(part), self.groups, channels, -1, math.prod(kernel))
            yield part.permute(1, 0, 3, 4, 2).flatten(3).flatten(1, 2).double()

    def _windows(self) -> Tensor:
        """View what a kernel sees at each place: (images, channels, *output, *kernel)."""
        kernel = self.weight.shape[2:]
        strides, dilations = _each(self.stride, kernel), _each(self.dilation, kernel)
        single_image = self.input.dim() == len(kernel) + 1
        windows = self.input.unsqueeze(0) if single_image else self.input
        windows = F.pad(windows, self._padding())
        for axis, (size, stride, dilation) in enumerate(
            zip(kernel, strides, dilations, strict=True), start=2
        ):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return windows

    def _padding(self) -> list[int]:
        """Return the zeros around an image as `F.pad` takes them: last axis first."""
        kernel = self.weight.shape[2:]
        if self.padding == "same":  # the odd zero goes after
            dilations = _each(self.dilation, kernel)
            totals = [d * (size - 1) for d, size in zip(dilations, kernel, strict=True)]
            pairs = [(total // 2, total - total // 2) for total in totals]
        else:
            both = 0 if self.padding == "valid" else self.padding
            pairs = [(zeros, zeros) for zeros in _each(both, kernel)]
        return [zeros for pair in reversed(pairs) for zeros in pair]


def _each(value: int | tuple[int, ...], kernel: torch.Size) -> tuple[int, ...]:
    """Return a number for each axis of a kernel; one number counts for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


class _Watch(TorchFunctionMode):
    """Shows each product with one of these weights, before it is computed.

    A hook of a layer would see its input before a `forward` of the reader's own pads or
    scales it, and nothing of a weight that is used without its layer.
    """

    def __init__(
        self, weights: dict[str, nn.Parameter], see: Callable[[str, _Product], None]
    ) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.see = see

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            product = _Product(*args, **kwargs)
            if id(product.weight) in self.names:
                self.see(self.names[id(product.weight)], product)
        return function(*args, **kwargs)


class _InputsSeen(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    """The rest of the network need not be computed."""


def _count_uses(
    model: nn.Module, weights: dict[str, nn.Parameter], batches: Iterable
) -> Counter[str]:
    """Return how often the first batch is multiplied with each weight, in that order."""
    uses: Counter[str] = Counter()
    with _Watch(weights, lambda name, _: uses.update([name])):
        model(next(_images(model, batches)))
    for name in weights:
        if name not in uses:
            raise InputError(
                f"{name} was in no linear layer or convolution that the first calibration batch "
                "came through, so its inputs are not known. Leave it dense with `exclude`."
            )
    return uses


def _hessian(
    model: nn.Module, name: str, weight: nn.Parameter, uses: int, batches: Iterable
) -> Tensor:
    """Return the sum of x xᵀ over what a weight is multiplied with, (groups, columns, columns).

    In float64: thousands of terms are added up, and the result, with a condition in the
    thousands too, is inverted.
    """
    hessian: Tensor | int = 0
    left = 0

    def add(_: str, product: _Product) -> None:
        nonlocal hessian, left
        for rows in product.rows():
            hessian = hessian + rows.mT @ rows
        left -= 1
        if left == 0:
            raise _InputsSeen

    for images in _images(model, batches):
        left = uses
        with suppress(_InputsSeen), _Watch({name: weight}, add):
            model(images)
    if not hessian.isfinite().all():
        raise InputError(
            f"The inputs of {name} have NaN or infinite values. Look for them in the calibration "
            "images and in the layers before it."
        )
    return hessian


# The network around it.
def _images(model: nn.Module, batches: Iterable) -> Iterator[Tensor]:
    """Yield the images of each batch on the model's device."""
    device = next(model.parameters()).device
    count = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(images, Tensor):
            raise InputError(
                f"A calibration batch is a {type(images).__name__}. Pass tensors of images, or "
                "tuples whose first item is one."
            )
        count += 1
        yield images.to(device)
    if count == 0:
        raise InputError("There are no calibration images: `batches` is empty.")


@contextmanager
def _all_or_nothing(weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Restore the weights if anything goes wrong, an interruption too."""
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    try:
        yield
    except BaseException:
        for name, weight in weights.items():
            weight.copy_(before[name])
        raise
