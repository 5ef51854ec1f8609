import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import HelpersError
from helpers.sparsity import search
from helpers.sparsity.search import kept_2to4, search_permutation
from helpers.tutorial.settings import project_root
from permutation import plain_search


def normal(rows, width, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)


def top_two_of_fours(matrix):
    """What 2:4 keeps, by sorting."""
    fours = np.sort(np.abs(matrix.astype(np.float64)).reshape(len(matrix), -1, 4))
    return fours[..., 2:].sum()


def ways_to_split(columns):
    """All ways to put columns into fours, each as an order."""
    if not columns:
        yield []
        return
    first, *others = columns
    for three in combinations(others, 3):
        left = [column for column in others if column not in three]
        for rest in ways_to_split(left):
            yield [first, *three, *rest]


@st.composite
def matrices(draw, fours=st.integers(1, 8)):  # noqa: B008, strategies are immutable
    """Normal, heavy-tailed, and with many ties and zeros; at any scale."""
    shape = draw(st.integers(1, 200)), 4 * draw(fours)
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    kinds = {
        "normal": lambda: random.standard_normal(shape),
        "heavy": lambda: random.standard_cauchy(shape) ** 3,
        "ties": lambda: random.integers(-2, 3, shape),
        "uneven": lambda: random.standard_normal(shape) * random.exponential(size=shape[1]),
    }
    matrix = kinds[draw(st.sampled_from(sorted(kinds)))]()
    return (matrix * 10.0 ** draw(st.integers(-12, 12))).astype(np.float32)


@given(matrices(), st.integers(0, 5))
def test_any_matrix_keeps_at_least_as_much(matrix, escapes):
    order = search_permutation(matrix, escapes=escapes)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(matrix.shape[1]))
    assert kept_2to4(matrix[:, order]) >= kept_2to4(matrix)


@given(matrices())
def test_kept_magnitude_agrees_with_sorting(matrix):
    assert kept_2to4(matrix) == pytest.approx(top_two_of_fours(matrix), rel=1e-9, abs=0)


@given(matrices(fours=st.just(2)))
def test_of_eight_columns_the_best_of_all_35_splits_is_found(matrix):
    ways = list(ways_to_split(list(range(8))))
    assert len(ways) == 35
    best = max(top_two_of_fours(matrix[:, way]) for way in ways)
    found = kept_2to4(matrix[:, search_permutation(matrix)])
    assert found == pytest.approx(best, rel=4e-6, abs=0)


@pytest.mark.parametrize("seed", range(3))
def test_of_twelve_columns_the_best_of_all_5775_splits_is_found(seed):
    matrix = normal(32, 12, seed)
    ways = np.array(list(ways_to_split(list(range(12)))))
    assert len(ways) == 5775
    fours = np.sort(np.abs(matrix[:, ways]).reshape(32, len(ways), 3, 4))
    best = fours[..., 2:].sum(axis=(0, 2, 3), dtype=np.float64).max()
    assert kept_2to4(matrix[:, search_permutation(matrix)]) == pytest.approx(best, rel=2e-6)


def test_the_pairings_make_all_35_splits_and_begin_with_the_one_that_changes_nothing():
    splits = {frozenset(map(frozenset, split.reshape(2, 4).tolist())) for split in search._SPLITS}
    assert len(splits) == 35
    assert search._SPLITS[0].tolist() == list(range(8))


@pytest.mark.parametrize("rows, width", [(16, 16), (33, 32), (64, 32), (128, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_search_ends_where_a_plain_one_does_and_escapes_go_further(rows, width, seed):
    uneven = np.exp(normal(1, width, seed + 100)) if seed == 2 else 1
    matrix = normal(rows, width, seed) * uneven
    plain = kept_2to4(matrix[:, plain_search(matrix)])
    greedy = kept_2to4(matrix[:, search_permutation(matrix, escapes=0)])
    escaped = kept_2to4(matrix[:, search_permutation(matrix)])
    assert kept_2to4(matrix) < plain
    assert greedy == pytest.approx(plain, rel=1e-6)
    assert escaped >= greedy
    if width == 64:
        assert escaped > greedy


def test_heavy_columns_side_by_side_are_spread_over_the_fours():
    matrix = np.ones((5, 16), dtype=np.float32)
    matrix[:, :8] = 10
    order = search_permutation(matrix)
    assert kept_2to4(matrix[:, order]) == 5 * 8 * 10


def test_one_thread_and_several_find_the_same():
    matrix = normal(1500, 64)
    stripes = np.arange(64).reshape(-1, 4)
    columns = search._tiled_columns(matrix)
    pairs = np.array([first * 16 + second for first, second in combinations(range(16), 2)])
    assert len(pairs) * columns.shape[1] > search._WORTH_THREADS
    gains, splits = np.zeros((2, 16, 16)), np.zeros((2, 16, 16), dtype=np.int64)
    search._rate_in_threads_(pairs, stripes, columns, gains[0], splits[0])
    for pair in pairs:
        search._rate_(pair, stripes, columns, gains[1], splits[1])
    assert (gains[0] > 0).any()
    np.testing.assert_array_equal(gains[0], gains[1])
    np.testing.assert_array_equal(splits[0], splits[1])


def test_the_same_seed_finds_the_same_order_and_another_seed_may_not():
    matrix = normal(64, 64)
    orders = [search_permutation(matrix, escapes=20, seed=seed) for seed in (1, 1, 2)]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()


def test_signs_and_scale_do_not_matter():
    matrix = normal(40, 32)
    order = search_permutation(matrix)
    assert (search_permutation(np.abs(matrix)) == order).all()
    for exponent in (-100, 100, 126):
        assert (search_permutation(np.ldexp(matrix, exponent - 2)) == order).all()


def test_the_matrix_is_not_changed_and_may_be_of_any_layout_and_type():
    matrix = normal(40, 32)
    before = matrix.copy()
    order = search_permutation(matrix)
    np.testing.assert_array_equal(matrix, before)
    assert (search_permutation(np.asfortranarray(matrix)) == order).all()
    assert (search_permutation(matrix.astype(np.float64)) == order).all()
    matrix.flags.writeable = False
    assert (search_permutation(matrix) == order).all()


@pytest.mark.parametrize(
    "matrix",
    [normal(6, 4), np.zeros((6, 16)), np.zeros((0, 16)), np.zeros((6, 0)), np.ones((6, 16))],
    ids=["four columns", "all zero", "no rows", "no columns", "all alike"],
)
def test_where_nothing_can_be_gained_the_order_stays(matrix):
    assert search_permutation(matrix).tolist() == list(range(matrix.shape[1]))


def test_progress_is_reported_after_every_round_and_every_escape():
    matrix = normal(32, 32)
    calls = {0: 0, 10: 0}
    for escapes in calls:

        def count(escapes=escapes):
            calls[escapes] += 1

        search_permutation(matrix, escapes=escapes, progress=count)
    assert calls[0] > 0
    assert calls[10] == calls[0] + 10


@pytest.mark.parametrize("shape", [(4, 6), (4,), (2, 4, 4)])
def test_a_matrix_without_whole_fours_is_refused(shape):
    for function in (search_permutation, kept_2to4):
        with pytest.raises(HelpersError, match="columns in a multiple of four"):
            function(np.ones(shape, dtype=np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_with_their_place(value):
    matrix = normal(8, 8)
    matrix[3, 5] = value
    for function in (search_permutation, kept_2to4):
        with pytest.raises(HelpersError, match="Row 3, column 5"):
            function(matrix)


STARTED_BY = {
    "the search": """
from helpers.sparsity.search import search_permutation
search_permutation(np.random.default_rng(0).random((2048, 256)), escapes=0)""",
    "the kernels, where OpenMP is not GCC's": """
from helpers.inference import cpu_kernels
from helpers.inference.cpu_layers import CpuLayer
from helpers.sparsity import prune_2to4_
cpu_kernels._gomp, cpu_kernels._thread_number = lambda: None, lambda: 0
conv = torch.nn.Conv2d(64, 64, 1)
prune_2to4_(conv)
CpuLayer.from_conv(conv)(torch.randn(1, 64, 14, 14), threads=2)""",
}


@pytest.mark.parametrize("what", STARTED_BY)
@pytest.mark.parametrize("threads", [1, 3])
def test_pytorch_keeps_its_number_of_threads(what, threads):
    """Numba starts as many threads as there are processors, in the OpenMP of PyTorch."""
    code = f"""
import numba, numpy as np, torch
torch.set_num_threads({threads})
torch.ones(1 << 20).exp()  # PyTorch has its threads before numba starts
{STARTED_BY[what].strip()}
print(torch.get_num_threads(), numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=project_root(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(threads), "True"]
