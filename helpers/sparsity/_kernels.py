"""The CPU kernels of the 2:4 mask, compiled by numba on first use and kept on disk.

They take floats as integers of the same width. With the sign bit cleared, a larger
integer is a larger magnitude, and the largest of all tells whether every value was
finite: infinity and NaN have all exponent bits set and rank above the rest.
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


@njit(nogil=True, cache=True, error_model="numpy")
def mask_adjacent(bits: NDArray, mask: NDArray, magnitude: np.integer) -> np.integer:
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
def mask_strided(bits: NDArray, mask: NDArray, magnitude: np.integer) -> np.integer:
    """Fill the mask of groups along the middle dimension, as `mask_adjacent` does.

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
