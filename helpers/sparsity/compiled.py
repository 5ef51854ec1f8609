"""The loops over single weights, compiled by numba; the rest of the package calls them.

They are in a module of their own so that numba is imported when the first of them runs,
and not when `helpers.sparsity` is: that would take longer than all its other imports. They
are compiled at first use and kept on disk. Explained in `02_prune_2_4.ipynb`.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray


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


# The kernels of the mask take floats as integers of the same width. With the sign bit
# cleared, a larger integer is a larger magnitude, and the largest of all shows whether
# every value was finite: infinity and NaN have all exponent bits set and rank above the
# rest. There are two because LLVM vectorises each loop only in its own layout.
@njit(nogil=True, cache=True, error_model="numpy")
def mask_adjacent_(bits: NDArray, mask: NDArray, magnitude: np.integer) -> np.integer:
    """Fill the mask of groups whose four weights lie side by side.

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
def mask_strided_(bits: NDArray, mask: NDArray, magnitude: np.integer) -> np.integer:
    """Fill the mask of groups along the middle dimension, as `mask_adjacent_` does.

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


@njit(inline="always")
def _split_magnitude(first, second, third, fourth):
    """Return the sums of the larger two, of the smaller two and of all four magnitudes."""
    a, b = np.float64(abs(first)), np.float64(abs(second))
    c, d = np.float64(abs(third)), np.float64(abs(fourth))
    larger = max(max(a + b, c + d), max(a, b) + max(c, d))
    smaller = min(min(a + b, c + d), min(a, b) + min(c, d))
    return larger, smaller, (a + b) + (c + d)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def kept_and_removed(groups: NDArray) -> tuple[float, float, float]:
    """Return the summed magnitude that 2:4 keeps of groups, that it removes, and all of it.

    The last is not finite if a value is not; the others leave NaN out. The mask is not
    made: no tie changes a sum.

    Args:
        groups: (groups, 4, positions), contiguous, in float32 or float64.
    """
    kept, removed, total = 0.0, 0.0, 0.0
    if groups.shape[2] == 1:
        flat = groups.reshape(-1)  # LLVM vectorises this loop, and not one of a single position
        for i in range(0, flat.size, 4):
            larger, smaller, both = _split_magnitude(flat[i], flat[i + 1], flat[i + 2], flat[i + 3])
            kept, removed, total = kept + larger, removed + smaller, total + both
        return kept, removed, total
    for i in range(groups.shape[0]):
        for r in range(groups.shape[2]):
            larger, smaller, both = _split_magnitude(
                groups[i, 0, r], groups[i, 1, r], groups[i, 2, r], groups[i, 3, r]
            )
            kept, removed, total = kept + larger, removed + smaller, total + both
    return kept, removed, total


@njit(cache=True)
def keep_two_(groups: NDArray, magnitude: np.integer, values: NDArray, metadata: NDArray) -> bool:
    """Fill `values` and `metadata` from groups of four; return False if one is not 2:4.

    Args:
        groups: (out, fours, 4, positions) weights as signed integers.
        magnitude: the bits that tell a number from zero.
        values: (out, fours, 2, positions), to be filled.
        metadata: uint8, two bits for each value, filled with zeros.
    """
    out, fours, _, kernel = groups.shape
    for row, four, k in np.ndindex(out, fours, kernel):
        first = second = count = 0
        for lane in range(4):
            if groups[row, four, lane, k] & magnitude:
                first, second = second, lane
                count += 1
        if count > 2:
            return False
        second = max(second, 1)  # fewer than two non-zeros: zeros fill up
        for slot, lane in enumerate((first, second)):
            value = groups[row, four, lane, k]
            values[row, four, slot, k] = value if value & magnitude else 0
            place = ((row * fours + four) * 2 + slot) * kernel + k
            metadata[place // 4] |= lane << 2 * (place % 4)
    return True


@njit(cache=True)
def put_back_(values: NDArray, metadata: NDArray, groups: NDArray) -> None:
    """Undo `keep_two_`; `groups` comes filled with zeros."""
    out, fours, _, kernel = groups.shape
    for row, four, slot, k in np.ndindex(out, fours, 2, kernel):
        place = ((row * fours + four) * 2 + slot) * kernel + k
        lane = metadata[place // 4] >> 2 * (place % 4) & 3
        groups[row, four, lane, k] = values[row, four, slot, k]
