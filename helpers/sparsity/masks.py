"""The mask of one weight tensor: 2:4, N:M, and 2:4 both ways. Explained in `02_prune_2_4.ipynb`."""

from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from helpers.errors import InputError

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
        weight: (out, in) of a linear layer or (out, in, *kernel) of a convolution.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution.

    Returns:
        A view of shape (before, in / 4, 4, after), where `before` and `after` are the
        sizes of the dimensions on either side of the input channels.

    Raises:
        InputError: fewer than two dimensions, or `in` is no multiple of four.
    """
    return _groups(weight, 4, name, dim)


def _groups(weight: Tensor, m: int, name: str, dim: int) -> Tensor:
    if weight.dim() < 2 or weight.shape[dim] % m:
        raise InputError(
            f"{name} has shape {tuple(weight.shape)}: the pattern needs input channels "
            f"(dimension {dim}) in a multiple of {m}. Leave this layer dense."
        )
    before, after = weight.shape[:dim].numel(), weight.shape[dim + 1 :].numel()
    return weight.reshape(before, weight.shape[dim] // m, m, after)


def mask_2to4(
    weight: Tensor, name: str = "the weight", dim: int = 1, out: Tensor | None = None
) -> Tensor:
    """Keep the two largest magnitudes of every four weights along the input channels.

    Of equal magnitudes the one with the lower channel is kept, so exactly two of
    every four survive.

    Args:
        weight: (out, in) or (out, in, *kernel) in FP64, FP32, FP16 or BF16, on any device.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution.
        out: where to write the mask, a contiguous boolean tensor of the same shape.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        InputError: `in` is no multiple of four, a value is NaN or infinite, or the
            data type is another one.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv
    2104.08378. Explained in `02_prune_2_4.ipynb`.
    """
    if weight.dtype not in _BITS:
        raise InputError(
            f"{name} is of type {weight.dtype}, whose magnitudes are not ranked here. "
            "Convert it first, for example with .float()."
        )
    groups = groups_of_four(weight.detach(), name, dim)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if out is None else out
    fill_ = _fill_on_cpu_ if weight.device.type == "cpu" else _fill_
    if not fill_(mask.view(groups.shape), groups):
        raise diverged(name)
    return mask


def _fill_on_cpu_(mask: Tensor, groups: Tensor) -> bool:
    """Fill the mask of groups (before, n, 4, after); return whether all values are finite."""
    integer, magnitude, infinite = _BITS[groups.dtype]
    bits = groups.contiguous().view(integer).numpy()
    keep = mask.view(torch.uint8).numpy()
    magnitude = bits.dtype.type(magnitude)
    before, n, _, after = bits.shape
    if after == 1:
        largest = _mask_adjacent_(bits.reshape(-1), keep.reshape(-1), magnitude)
    else:
        shape = (before * n, 4, after)
        largest = _mask_strided_(bits.reshape(shape), keep.reshape(shape), magnitude)
    return bool(largest < infinite)


# The compiled kernels take floats as integers of the same width. With the sign bit
# cleared, a larger integer is a larger magnitude, and the largest of all tells whether
# every value was finite: infinity and NaN have all exponent bits set and rank above the
# rest. They are compiled at first use and kept on disk.
@njit(inline="always")
def _two_largest(a, b, c, d):
    """Return 1 for the two largest of four, 0 for the others; of equals the first."""
    one = np.uint8(1)
    ab, ac, ad = np.uint8(a >= b), np.uint8(a >= c), np.uint8(a >= d)
    bc, bd, cd = np.uint8(b >= c), np.uint8(b >= d), np.uint8(c >= d)
    ba, ca, da, cb, db, dc = one ^ ab, one ^ ac, one ^ ad, one ^ bc, one ^ bd, one ^ cd
    # A weight survives if it beats two of its three neighbours.
    return (
        (ab & ac) | (ad & (ab | ac)),
        (ba & bc) | (bd & (ba | bc)),
        (ca & cb) | (cd & (ca | cb)),
        (da & db) | (dc & (da | db)),
    )


@njit(nogil=True, cache=True, error_model="numpy")
def _mask_adjacent_(bits: NDArray, mask: NDArray, magnitude: np.integer) -> np.integer:
    """Fill the mask of groups whose four weights lie side by side; LLVM vectorises this loop.

    Args:
        bits: the weights, flat, as signed integers.
        mask: uint8 of the same length, to be filled with 0 and 1.
        magnitude: the integer with all bits set but the sign.

    Returns:
        The largest magnitude.
    """
    largest = magnitude & 0
    for i in range(bits.size // 4):
        a, b = bits[4 * i] & magnitude, bits[4 * i + 1] & magnitude
        c, d = bits[4 * i + 2] & magnitude, bits[4 * i + 3] & magnitude
        mask[4 * i], mask[4 * i + 1], mask[4 * i + 2], mask[4 * i + 3] = _two_largest(a, b, c, d)
        largest = max(largest, max(max(a, b), max(c, d)))
    return largest


@njit(nogil=True, cache=True, error_model="numpy")
def _mask_strided_(bits: NDArray, mask: NDArray, magnitude: np.integer) -> np.integer:
    """Fill the mask of groups along the middle dimension, as `_mask_adjacent_` does.

    Args:
        bits: (groups, 4, positions) weights as signed integers.
        mask: uint8 of the same shape, to be filled with 0 and 1.
        magnitude: the integer with all bits set but the sign.
    """
    largest = magnitude & 0
    for i in range(bits.shape[0]):
        for r in range(bits.shape[2]):
            a, b = bits[i, 0, r] & magnitude, bits[i, 1, r] & magnitude
            c, d = bits[i, 2, r] & magnitude, bits[i, 3, r] & magnitude
            keep = _two_largest(a, b, c, d)
            mask[i, 0, r], mask[i, 1, r], mask[i, 2, r], mask[i, 3, r] = keep
            largest = max(largest, max(max(a, b), max(c, d)))
    return largest


def _fill_(mask: Tensor, groups: Tensor) -> bool:
    """Do the same with torch's own operations, on whatever device the groups are."""
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
        weight: (out, in) or (out, in, *kernel), in FP64, FP32, FP16 or BF16, on any device.
        n: how many weights of a group are kept, from 0 to `m`.
        m: size of a group.
        name: what to call it in an error.
        dim: the dimension of the input channels; 0 for a transposed convolution.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        InputError: `n` is not from 0 to `m`, `in` is no multiple of `m`, or a value is
            NaN or infinite.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks",
    arXiv 2102.04010. The pattern is explained in `02_prune_2_4.ipynb`.
    """
    if not (m > 0 and 0 <= n <= m):
        raise InputError(f"{n} of every {m} weights cannot be kept: n:m needs 0 <= n <= m.")
    groups = _groups(weight.detach(), m, name, dim)
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
        weight: (out, in) or (out, in, *kernel), in FP64, FP32, FP16 or BF16, on any device; a
            convolution is masked at each position of its kernel.
        name: what to call it in an error.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        InputError: `out` or `in` is no multiple of four, or a value is NaN or infinite.

    Source: Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient
    Method to Find N:M Transposable Masks", arXiv 2102.08124. The pattern is explained in
    `02_prune_2_4.ipynb`.
    """
    if weight.dim() < 2 or weight.shape[0] % 4 or weight.shape[1] % 4:
        raise InputError(
            f"{name} has shape {tuple(weight.shape)}: a mask that can be transposed needs "
            "output and input channels in multiples of four. Leave this layer dense."
        )
    if not torch.isfinite(weight).all():
        raise diverged(name)
    rows, columns = weight.shape[0] // 4, weight.shape[1] // 4
    by_tile = weight.detach().reshape(rows, 4, columns, 4, -1).permute(0, 2, 4, 1, 3)
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
        weight: (out, in) or (out, in, *kernel) of any data type, floating-point or integer;
            `in` must be a multiple of four.
        dim: the dimension of the input channels; 0 for a transposed convolution.

    Raises:
        InputError: fewer than two dimensions, or `in` is no multiple of four.
    """
    a, b, c, d = (groups_of_four(weight.detach(), dim=dim) != 0).unbind(2)
    three_or_more = (a & b & (c | d)) | (c & d & (a | b))
    return not three_or_more.any()


def kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Return the share of the summed magnitude that survives a mask, in per cent.

    Of a weight that is zero throughout, all survives.
    """
    total = torch.linalg.vector_norm(weight.detach(), 1, dtype=torch.float64)
    kept = torch.linalg.vector_norm(weight.detach() * mask, 1, dtype=torch.float64)
    return 100 * float(kept / total) if total else 100.0
