"""Find an order of the input channels under which 2:4 keeps more of the magnitude.

Channels may be in any order as long as the layer before delivers them in that order.
Another order groups other weights in fours, and a good one spreads the large weights
over the groups. Explained in `02b_better_pruning.ipynb`.

The columns of a matrix form stripes of four. Two stripes are eight columns, and
there are 35 ways to split eight into two fours: the search applies the best splits
of all pairs of stripes until none gains anything. Source: Pool and Yu, "Channel
Permutations for N:M Sparsity", NeurIPS 2021; it is the search of NVIDIA's ASP.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, prange

from helpers.errors import InputError
from helpers.machine import numba_threads
from helpers.sparsity.compiled import kept_and_removed

# Each word arranges eight columns in four pairs. The same four pairs make three splits
# into fours, so these 13 words make all 35 splits (four of them twice), and the sum and
# the maximum of a pair serve three splits. The first split leaves all columns in place.
_WORDS = (
    "01234567", "05132746", "06152437", "04172536", "01263457", "03162745", "06142357",
    "03172456", "07123546", "02143567", "05132647", "02153647", "04123756",
)  # fmt: skip
_PAIRINGS = np.array([[int(column) for column in word] for word in _WORDS])
_PAIRS_OF_SPLIT = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 2, 3, 6, 7], [0, 1, 6, 7, 2, 3, 4, 5]]
_SPLITS = _PAIRINGS[:, _PAIRS_OF_SPLIT].reshape(-1, 8)

# Rows in a tile. Eight columns of a tile fit the first cache of any processor, and
# their sum in float32 is exact to about 1e-7.
_TILE = 64

# What must be gained, as a share of what is kept: by a split of two stripes, summed in
# float32, and by an escape, summed in float64. Both lie above the rounding error, so that
# every step is a true gain and the search ends.
_LEAST_BY_SPLIT = 2e-6
_LEAST_BY_ESCAPE = 1e-9

# Pairs of stripes times rows below which one thread is faster than waking the others.
_WORTH_THREADS = 131_072


def search_permutation(
    matrix: np.ndarray,
    *,
    escapes: int = 100,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> np.ndarray:
    """Return an order of the columns under which 2:4 keeps at least as much magnitude.

    The greedy search of the paper comes first. Where it is stuck, an escape rotates one
    column of each of three random stripes and continues the search from there; it is
    undone unless more is kept. (No split of two stripes undoes a rotation of three.)

    Args:
        matrix: (rows, columns) weights or their magnitudes, read as float32. The columns
            are the input channels, the rows everything that reads them: the output channels
            and kernel positions of every following layer.
        escapes: how many to try; with 0 this is the plain greedy search.
        seed: of the escapes' random choices; the same seed finds the same order.
        progress: called after every round of the greedy search and every escape.

    Returns:
        The new order, as indices of the columns of `matrix`, (columns,) int64, such that
        `matrix[:, order]` is the permuted matrix.

    Raises:
        InputError: the matrix is not 2-D, has NaN or infinite values, or the number of
            its columns is not a multiple of four.
    """
    matrix = _checked(matrix)
    stripes = np.arange(matrix.shape[1]).reshape(-1, 4)
    if len(stripes) < 2 or not matrix.any():
        return stripes.ravel()
    columns = _tiled_columns(matrix)
    gains = np.zeros((len(stripes), len(stripes)))
    splits = np.zeros(gains.shape, dtype=np.int64)
    report = progress or (lambda: None)

    changed = np.ones(len(stripes), dtype=bool)
    with numba_threads():
        while _improve_(stripes, columns, changed, gains, splits):
            report()
        if len(stripes) > 2:  # of two stripes the best split has been found
            random = np.random.default_rng(seed)
            for _ in range(escapes):
                three = random.choice(len(stripes), 3, replace=False)
                places = random.integers(4, size=3)
                _escape_(stripes, columns, three, places, gains, splits)
                report()

    order = stripes.ravel()
    if kept_2to4(matrix[:, order]) < kept_2to4(matrix):
        raise InputError(
            f"The search lost magnitude on a matrix of shape {matrix.shape}, which it must "
            "never do. Please report it with the matrix, and leave its channels in place."
        )
    return order


def kept_2to4(matrix: np.ndarray) -> float:
    """Return the summed magnitude that 2:4 keeps of a matrix, in groups along its rows.

    Args:
        matrix: (rows, columns), read as float32 and summed in float64.

    Raises:
        InputError: as `search_permutation`.
    """
    kept, _, _ = kept_and_removed(_checked(matrix).reshape(-1, 4, 1))
    return kept


def _checked(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix as contiguous float32, or say why it cannot be searched."""
    if matrix.ndim != 2 or matrix.shape[1] % 4:
        raise InputError(
            f"A matrix of shape {matrix.shape} has no groups of four input channels: it needs two "
            "dimensions, and columns in a multiple of four. Leave this layer's channels in place."
        )
    matrix = np.ascontiguousarray(matrix, dtype=np.float32)
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(
            f"Row {row}, column {column} of the matrix is {matrix[row, column]}, which has no "
            "magnitude to compare. Load the weights again, or find the training step that "
            "diverged."
        )
    return matrix


def _tiled_columns(matrix: np.ndarray) -> np.ndarray:
    """Return the magnitudes as (columns, rows), the rows padded with zeros to whole tiles.

    They are scaled by a power of two, which is exact, so that no sum can overflow.
    """
    rows, width = matrix.shape
    columns = np.zeros((width, -(-rows // _TILE) * _TILE), dtype=np.float32)
    _, exponent = np.frexp(max(matrix.max(), -matrix.min()))
    np.ldexp(matrix.T, -exponent, out=columns[:, :rows])
    return np.abs(columns, out=columns)


# The arrays of the compiled functions:
#   stripes  (n, 4)           the order so far, as indices of columns
#   columns  (columns, rows)  from `_tiled_columns`
#   gains    (n, n)           what the best split of two stripes gains; upper triangle
#   splits   (n, n)           which of `_SPLITS` that is
#   changed  (n,)             stripes whose gains are out of date
@njit(cache=True)
def _improve_(stripes, columns, changed, gains, splits):
    """Do a round of the greedy search and return how many pairs of stripes it has split again.

    Pairs with a changed stripe are rated again. Then the best splits are applied, each
    to two stripes that this round has not changed yet; `changed` holds these afterwards.
    """
    count = len(stripes)
    pairs = [
        first * count + second
        for first in range(count)
        for second in range(first + 1, count)
        if changed[first] or changed[second]
    ]
    pairs = np.array(pairs)
    if len(pairs) * columns.shape[1] < _WORTH_THREADS:
        for pair in pairs:
            _rate_(pair, stripes, columns, gains, splits)
    else:
        _rate_in_threads_(pairs, stripes, columns, gains, splits)

    changed[:] = False
    applied = 0
    gainful = np.flatnonzero(gains)
    for pair in gainful[np.argsort(-gains.ravel()[gainful], kind="mergesort")]:
        first, second = divmod(pair, count)
        if not (changed[first] or changed[second]):
            eight = np.concatenate((stripes[first], stripes[second]))
            eight = eight[_SPLITS[splits[first, second]]]
            stripes[first], stripes[second] = eight[:4], eight[4:]
            changed[first] = changed[second] = True
            applied += 1
    return applied


@njit(cache=True)
def _escape_(stripes, columns, three, places, gains, splits):
    """Rotate a column of each of three stripes and search on; undo it unless that gains."""
    before = stripes.copy(), gains.copy(), splits.copy()
    kept = _kept_in_columns(stripes, columns)
    moved = [stripes[three[i], places[i]] for i in range(3)]
    for i in range(3):
        stripes[three[i], places[i]] = moved[i - 1]
    changed = np.zeros(len(stripes), dtype=np.bool_)
    changed[three] = True
    while _improve_(stripes, columns, changed, gains, splits):
        pass
    if _kept_in_columns(stripes, columns) <= kept * (1 + _LEAST_BY_ESCAPE):
        stripes[:], gains[:], splits[:] = before


@njit(parallel=True, cache=True)
def _rate_in_threads_(pairs, stripes, columns, gains, splits):
    """Call `_rate_` for many pairs, in threads."""
    for i in prange(len(pairs)):
        _rate_(pairs[i], stripes, columns, gains, splits)


@njit(cache=True)
def _rate_(pair, stripes, columns, gains, splits):
    """Record the best split of a pair of stripes, and what it gains (0 if too little).

    A pair is one number, `first * n + second`.
    """
    first, second = divmod(pair, len(stripes))
    kept = _kept_by_split(np.concatenate((stripes[first], stripes[second])), columns)
    best = kept.argmax()
    gain = kept[best] - kept[0]
    gains[first, second] = gain if gain > _LEAST_BY_SPLIT * kept[0] else 0
    splits[first, second] = best


# The two functions below do what `compiled.kept_and_removed` does with four numbers, on what
# the loops here already have. They are in this file because numba's cache notices changes only
# in the file of the function that it has compiled.
@njit(inline="always")
def _top_two(sum_1, max_1, sum_2, max_2):
    """Return the sum of the larger two of four numbers from sum and maximum of two pairs."""
    return max(max(sum_1, sum_2), max_1 + max_2)


@njit(inline="always")
def _top_two_of(first, second, third, fourth):
    """Return the sum of the larger two of four numbers in float64, where it is exact."""
    a, b, c, d = np.float64(first), np.float64(second), np.float64(third), np.float64(fourth)
    return _top_two(a + b, max(a, b), c + d, max(c, d))


@njit(cache=True, fastmath=True)
def _kept_by_split(eight, columns):
    """Return the magnitude that 2:4 keeps of eight columns, for each split into two fours."""
    kept = np.zeros(len(_SPLITS))
    for start in range(0, columns.shape[1], _TILE):
        stop = start + _TILE
        for pairing in range(len(_PAIRINGS)):
            lanes = _PAIRINGS[pairing]
            a, b = columns[eight[lanes[0]], start:stop], columns[eight[lanes[1]], start:stop]
            c, d = columns[eight[lanes[2]], start:stop], columns[eight[lanes[3]], start:stop]
            e, f = columns[eight[lanes[4]], start:stop], columns[eight[lanes[5]], start:stop]
            g, h = columns[eight[lanes[6]], start:stop], columns[eight[lanes[7]], start:stop]
            kept_1, kept_2, kept_3 = np.float32(0), np.float32(0), np.float32(0)
            for row in range(_TILE):
                s1, m1 = a[row] + b[row], max(a[row], b[row])
                s2, m2 = c[row] + d[row], max(c[row], d[row])
                s3, m3 = e[row] + f[row], max(e[row], f[row])
                s4, m4 = g[row] + h[row], max(g[row], h[row])
                kept_1 += _top_two(s1, m1, s2, m2) + _top_two(s3, m3, s4, m4)
                kept_2 += _top_two(s1, m1, s3, m3) + _top_two(s2, m2, s4, m4)
                kept_3 += _top_two(s1, m1, s4, m4) + _top_two(s2, m2, s3, m3)
            kept[3 * pairing] += kept_1
            kept[3 * pairing + 1] += kept_2
            kept[3 * pairing + 2] += kept_3
    return kept


@njit(cache=True, fastmath=True)
def _kept_in_columns(stripes, columns):
    """Return the magnitude that 2:4 keeps of the columns in their present stripes."""
    kept = 0.0
    for i in range(len(stripes)):
        first, second = columns[stripes[i, 0]], columns[stripes[i, 1]]
        third, fourth = columns[stripes[i, 2]], columns[stripes[i, 3]]
        for row in range(columns.shape[1]):
            kept += _top_two_of(first[row], second[row], third[row], fourth[row])
    return kept
