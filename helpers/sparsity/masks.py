"""The mask of one weight tensor: 2:4, N:M, and 2:4 both ways. Explained in `02_prune_2_4.ipynb`."""

from functools import cache
from itertools import combinations, product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.errors import InputError
from helpers.parameters import require_local, require_numbers

# Integers of the same width, the magnitude's bits, and the smallest that is not finite.
_BITS = {
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
}


def groups_of_four(weight: Tensor, name: str = "the weight", dim: int = 1) -> Tensor:
    """View a weight with its input channels in groups of four.

    Args:
        weight: (out, in) of a linear layer or `(out, in, *kernel)` of a convolution.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution. Negative
            dimensions count from the last.

    Returns:
        A view of shape (before, in / 4, 4, after), where `before` and `after` are the
        sizes of the dimensions on either side of the input channels.

    Raises:
        InputError: the weight has fewer than two dimensions, there is no dimension `dim`,
            or `in` is not a multiple of four.
    """
    return _groups(weight, 4, name, dim)


def _groups(weight: Tensor, m: int, name: str, dim: int) -> Tensor:
    dim = _input_dim(weight, m, name, dim)
    before, after = weight.shape[:dim].numel(), weight.shape[dim + 1 :].numel()
    return weight.reshape(before, weight.shape[dim] // m, m, after)


def _input_dim(weight: Tensor, m: int, name: str, dim: int) -> int:
    """Return the dimension of the input channels, 0 or more, if it holds whole groups of m."""
    shape = tuple(weight.shape)
    if len(shape) >= 2 and not -len(shape) <= dim < len(shape):
        raise InputError(
            f"{name} has shape {shape}, and so no dimension {dim}. Give the dimension of its "
            "input channels: 1, or 0 for a transposed convolution."
        )
    if len(shape) < 2 or shape[dim] % m:
        raise InputError(
            f"{name} has shape {shape}: the pattern needs input channels (dimension {dim}) in "
            f"a multiple of {m}. Leave this layer dense."
        )
    return dim % len(shape)


def _rankable(weight: Tensor, name: str) -> Tensor:
    """Return a weight, without its gradient, in a floating-point type."""
    require_local(weight, name)
    require_numbers(weight, name)
    weight = weight.detach()
    if weight.dtype == torch.int8:
        return weight.half()  # exact, and unlike INT8 it has a number for the magnitude of -128
    if weight.dtype not in _BITS:
        raise InputError(
            f"{name} is of type {weight.dtype}, and only FP64, FP32, FP16, BF16 and INT8 can be "
            "ranked by magnitude. Convert it first, for example with .float()."
        )
    return weight


def mask_2to4(
    weight: Tensor, name: str = "the weight", dim: int = 1, out: Tensor | None = None
) -> Tensor:
    """Keep the two largest magnitudes of every four weights along the input channels.

    Of equal magnitudes the one with the lower channel is kept, so exactly two of
    every four survive.

    Args:
        weight: (out, in) or `(out, in, *kernel)` in FP64, FP32, FP16, BF16 or INT8, on any
            device.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution.
        out: where to write the mask, a contiguous boolean tensor of the same shape on the
            same device.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        InputError: `in` is not a multiple of four, a value is NaN or infinite, the weight
            has another data type or no numbers (on the device `meta`), or the mask cannot be
            written to `out`.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """
    groups = groups_of_four(_rankable(weight, name), name, dim)
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    else:
        _require_fitting(out, weight, name)
    fill_ = _fill_on_cpu_ if weight.device.type == "cpu" else _fill_
    if not fill_(out.view(groups.shape), groups):
        raise diverged(name)
    return out


def _require_fitting(out: Tensor, weight: Tensor, name: str) -> None:
    same = (out.dtype, out.shape, out.device) == (torch.bool, weight.shape, weight.device)
    if not (same and out.is_contiguous()):
        raise InputError(
            f"The mask of {name} cannot be written to `out`: it must be a contiguous boolean "
            f"tensor of shape {tuple(weight.shape)} on {weight.device}, and is of type "
            f"{out.dtype}, shape {tuple(out.shape)} and strides {out.stride()} on {out.device}."
        )


def _fill_on_cpu_(mask: Tensor, groups: Tensor) -> bool:
    """Fill the mask of groups (before, n, 4, after); return whether all values are finite."""
    from helpers.sparsity.compiled import mask_adjacent_, mask_strided_

    integer, magnitude, infinite = _BITS[groups.dtype]
    bits = as_array(groups.contiguous().view(integer))
    keep = mask.view(torch.uint8).numpy()
    magnitude = bits.dtype.type(magnitude)
    before, n, _, after = bits.shape
    if after == 1:
        largest = mask_adjacent_(bits.reshape(-1), keep.reshape(-1), magnitude)
    else:
        shape = (before * n, 4, after)
        largest = mask_strided_(bits.reshape(shape), keep.reshape(shape), magnitude)
    return bool(largest < infinite)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return the memory of a tensor on the CPU as an array.

    `tensor.numpy()` would for ever keep FSDP from freeing the memory, once it has gathered it.
    """
    return np.from_dlpack(tensor)


def _fill_(mask: Tensor, groups: Tensor) -> bool:
    """Do the same with operators of PyTorch, on any device.

    On a CPU this takes 4 times (3x3 convolution) to 20 times (matrix) as long as the loops.
    """
    a, b, c, d = groups.abs().unbind(2)
    # Six comparisons decide every rank. `>=` lets the lower channel win a tie; a
    # weight survives if it beats at least two of its three neighbours.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    keep = [
        _two_of_three(ab, ac, ad),
        _two_of_three(~ab, bc, bd),
        _two_of_three(~ac, ~bc, cd),
        _two_of_three(~ad, ~bd, ~cd),
    ]
    torch.stack(keep, dim=2, out=mask)
    return bool(torch.isfinite(groups).all())


def _two_of_three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


def mask_nm(weight: Tensor, n: int, m: int, name: str = "the weight", dim: int = 1) -> Tensor:
    """Keep the n largest magnitudes of every m weights along the input channels.

    Of equal magnitudes the one with the lower channel is kept. `mask_2to4` is the same
    for two of four, and faster.

    Args:
        weight: (out, in) or `(out, in, *kernel)`, in FP64, FP32, FP16, BF16 or INT8, on any
            device.
        n: how many weights of a group are kept, from 0 to `m`.
        m: size of a group.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        InputError: `n` is not from 0 to `m`, `in` is not a multiple of `m`, a value is NaN
            or infinite, or the weight has another data type.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks",
    arXiv 2102.04010.
    """
    if not (m > 0 and 0 <= n <= m):
        raise InputError(f"{n} of every {m} weights cannot be kept: n:m needs 0 <= n <= m.")
    groups = _groups(_rankable(weight, name), m, name, dim)
    if not torch.isfinite(groups).all():
        raise diverged(name)
    largest = groups.abs().sort(dim=2, descending=True, stable=True).indices[:, :, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, largest, True)
    return mask.view(weight.shape)


def mask_2to4_transposable(weight: Tensor, name: str = "the weight") -> Tensor:
    """Keep eight of every 4x4 weights so that rows and columns are 2:4.

    The transposed weight, which the backward pass multiplies by, is then 2:4 as well. Of
    the 90 patterns with two weights in each row and each column, every 4x4 tile of
    (out, in) gets the one that keeps the largest sum of magnitudes.

    Args:
        weight: (out, in) or `(out, in, *kernel)`, in FP64, FP32, FP16, BF16 or INT8, on any
            device; a convolution is masked at each position of its kernel.
        name: what to call it in an error.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        InputError: `out` or `in` is not a multiple of four, a value is NaN or infinite, or
            the weight has another data type.

    Source: Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient
    Method to Find N:M Transposable Masks", arXiv 2102.08124.
    """
    if weight.dim() < 2 or weight.shape[0] % 4 or weight.shape[1] % 4:
        raise InputError(
            f"{name} has shape {tuple(weight.shape)}: a mask that can be transposed needs "
            "output and input channels in multiples of four. Leave this layer dense."
        )
    weight = _rankable(weight, name)
    if not torch.isfinite(weight).all():
        raise diverged(name)
    rows, columns = weight.shape[0] // 4, weight.shape[1] // 4
    by_tile = weight.reshape(rows, 4, columns, 4, -1).permute(0, 2, 4, 1, 3)
    tiles = by_tile.reshape(-1, 16).abs()
    patterns = _transposable_patterns().to(weight.device)
    # In FP64, so that no sum is rounded to that of another pattern, and in pieces, because
    # the sums take 45 times the memory of the weights.
    best = [(piece.double() @ patterns.double().T).argmax(1) for piece in tiles.split(1 << 16)]
    mask = patterns[torch.cat(best)] if best else tiles.bool()
    return mask.view(by_tile.shape).permute(0, 3, 1, 4, 2).reshape(weight.shape)


@cache
def _transposable_patterns() -> Tensor:
    """Return the 90 patterns (90, 16), those that keep the lowest indices first."""
    rows = [[i in pair for i in range(4)] for pair in combinations(range(4), 2)]
    tiles = torch.tensor(list(product(rows, repeat=4)))
    return tiles[(tiles.sum(1) == 2).all(1)].flatten(1)


def diverged(name: str) -> InputError:
    """Return the error of a weight that has no magnitudes to rank."""
    return InputError(
        f"{name} has NaN or infinite values, which have no magnitude to rank. "
        "Go back to a checkpoint from before the training diverged."
    )


def is_2to4(weight: Tensor, dim: int = 1) -> bool:
    """Return whether every four weights along the input channels hold at most two non-zeros.

    Args:
        weight: (out, in) or `(out, in, *kernel)` of any data type, floating-point or integer;
            `in` must be a multiple of four.
        dim: the dimension of the input channels; 0 for a transposed convolution.

    Raises:
        InputError: the weight has fewer than two dimensions or no numbers (on the device
            `meta`), there is no dimension `dim`, or `in` is not a multiple of four.
    """
    require_local(weight, "the weight")
    require_numbers(weight, "the weight")
    dim = _input_dim(weight, 4, "the weight", dim)
    return holds_2to4((weight.detach() != 0).swapaxes(dim, 1))


_Nonzero = TypeVar("_Nonzero", Tensor, NDArray[np.bool_])


def holds_2to4(nonzero: _Nonzero) -> bool:
    """Return whether every four along dimension 1 hold at most two non-zeros.

    Args:
        nonzero: where a weight `(out, in, *kernel)` is not zero, as a tensor or an array.
            If `in` is not a multiple of four the weight is not 2:4.
    """
    if nonzero.shape[1] % 4:
        return False
    a, b, c, d = (nonzero[:, lane::4] for lane in range(4))
    three_or_more: Any = (a & b & (c | d)) | (c & d & (a | b))
    return not three_or_more.any()


def kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Return the share of the summed magnitude that survives a mask, in per cent.

    If the whole weight is zero, all of it survives.
    """
    weight = weight.detach()
    if not weight.is_floating_point():
        weight = weight.double()
    total = torch.linalg.vector_norm(weight, 1, dtype=torch.float64)
    kept = torch.linalg.vector_norm(weight * mask, 1, dtype=torch.float64)
    return 100 * float(kept / total) if total else 100.0


def kept_magnitude_2to4(weight: Tensor, name: str = "the weight", dim: int = 1) -> float:
    """Return `kept_magnitude` of a weight under its own 2:4 mask, in per cent.

    On a CPU no mask is made, and it takes a third of the time. A weight that is 2:4 already
    keeps exactly 100.

    Args:
        weight: as `mask_2to4` takes it.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution.

    Raises:
        InputError: as `mask_2to4`.
    """
    if weight.device.type != "cpu":
        return kept_magnitude(weight, mask_2to4(weight, name, dim))
    from helpers.sparsity.compiled import kept_and_removed

    groups = groups_of_four(_rankable(weight, name), name, dim).flatten(0, 1)
    if groups.dtype in (torch.float16, torch.bfloat16):
        groups = groups.float()
    kept, removed, total = kept_and_removed(as_array(groups.contiguous()))
    if not np.isfinite(total):
        raise diverged(name)
    return 100 * kept / (kept + removed) if removed else 100.0
