from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from helpers.errors import HelpersError
from helpers.sparsity import (
    is_2to4,
    kept_magnitude,
    mask_2to4,
    mask_2to4_transposable,
    mask_nm,
)
from helpers.sparsity.masks import (
    _fill_,
    _fill_on_cpu_,
    groups_of_four,
    holds_2to4,
    kept_magnitude_2to4,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KERNELS = [(), (3,), (2, 2), (1, 2, 2)]  # linear, and convolutions in one to three dimensions
# Few different magnitudes, so that ties are common, beside any others.
NUMBERS = st.one_of(st.integers(-2, 2).map(float), st.floats(-60_000, 60_000))


@st.composite
def weights(draw):
    shape = (draw(st.integers(1, 2)), 4 * draw(st.integers(1, 2)), *draw(st.sampled_from(KERNELS)))
    values = draw(arrays(np.float64, shape, elements=NUMBERS))
    return torch.from_numpy(values).to(draw(st.sampled_from(DTYPES)))


def groups_of(tensor, m):
    """Return every group of m along the input channels as one row."""
    groups = tensor.reshape(tensor.shape[0], tensor.shape[1] // m, m, -1)
    return groups.movedim(2, 3).reshape(-1, m)


def fours(tensor):
    return groups_of(tensor, 4)


@given(weights())
def test_exactly_two_of_four_are_kept(weight):
    mask = mask_2to4(weight)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert (fours(mask).sum(dim=1) == 2).all()


@given(weights())
def test_kept_magnitude_is_the_best_of_the_six_patterns(weight):
    magnitude = fours(weight.double().abs())
    patterns = [magnitude[:, list(pair)].sum(dim=1) for pair in combinations(range(4), 2)]
    kept = (magnitude * fours(mask_2to4(weight))).sum(dim=1)
    assert torch.equal(kept, torch.stack(patterns).amax(dim=0))


@given(weights())
def test_ties_go_to_the_lowest_index_everywhere(weight):
    for values, keep in zip(fours(weight.abs()).tolist(), fours(mask_2to4(weight)), strict=True):
        ranking = sorted(range(4), key=lambda i: (-values[i], i))
        assert sorted(ranking[:2]) == keep.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([0.0, 0.0, 0.0, 0.0], [0, 1]),
        ([1.0, -2.0, 2.0, 2.0], [1, 2]),
        ([1.0, -3.0, 1.0, 1.0], [0, 1]),
        ([0.0, -0.0, 0.0, 5.0], [0, 3]),
        ([1.0, -3.0, 2.0, -0.5], [1, 2]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_keeps_the_lowest_index_on_ties(values, kept, dtype):
    mask = mask_2to4(torch.tensor([values], dtype=dtype))
    assert mask[0].nonzero().flatten().tolist() == kept


def test_fp64_is_ranked_at_its_own_precision():
    weight = torch.tensor([[1.0, 1 + 1e-12, 1 + 2e-12, 0.5]], dtype=torch.float64)
    assert mask_2to4(weight).tolist() == [[False, True, True, False]]


def test_groups_run_along_the_input_channels():
    weight = torch.zeros(1, 4, 2, 2)
    weight[0, 1], weight[0, 3] = 1, 2  # the same two channels at all four kernel positions
    expected = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
    expected[0, 1], expected[0, 3] = True, True
    assert torch.equal(mask_2to4(weight), expected)


def test_a_channels_last_weight_gets_the_same_mask():
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    channels_last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(mask_2to4(channels_last), mask_2to4(weight))


def test_the_weight_itself_is_left_unchanged():
    weight = torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    assert not mask_2to4(weight).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_without_a_magnitude_is_refused_by_name(value):
    weight = torch.zeros(2, 4)
    weight[1, 2] = value
    with pytest.raises(HelpersError, match=r"^layer1\.conv1\.weight has NaN or infinite values"):
        mask_2to4(weight, "layer1.conv1.weight")


@pytest.mark.parametrize("shape", [(2, 3), (8, 6, 3, 3), (8,)])
def test_input_channels_must_be_a_multiple_of_four(shape):
    with pytest.raises(HelpersError, match=r"^conv1\.weight has shape .*multiple of 4"):
        mask_2to4(torch.zeros(shape), "conv1.weight")


@given(weights())
def test_the_cpu_kernel_and_the_comparison_network_agree(weight):
    groups = groups_of_four(weight)
    one, other = (torch.empty(groups.shape, dtype=torch.bool) for _ in range(2))
    assert _fill_on_cpu_(one, groups) and _fill_(other, groups)
    assert torch.equal(one, other)


def test_a_mask_can_be_written_to_memory_that_is_there():
    weight, out = torch.randn(8, 16, 3, 3), torch.empty(8, 16, 3, 3, dtype=torch.bool)
    assert mask_2to4(weight, out=out) is out
    assert torch.equal(out, mask_2to4(weight))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(16, 8, dtype=torch.bool).T,
        torch.empty(8, 32, dtype=torch.bool)[:, ::2],
        torch.empty(16, 8, dtype=torch.bool),
        torch.empty(8, 16, dtype=torch.uint8),
        torch.empty(8, 16, dtype=torch.bool, device="meta"),
    ],
)
def test_memory_that_does_not_fit_the_mask_is_refused(out):
    with pytest.raises(HelpersError, match=r"^The mask of fc cannot be written to `out`"):
        mask_2to4(torch.randn(8, 16), "fc", out=out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(64, 8), (64, 8, 3, 3)])
def test_both_ways_find_the_one_value_that_is_not_finite(dtype, value, shape):
    weight = torch.zeros(shape, dtype=dtype)
    weight.view(-1)[300] = torch.finfo(dtype).max
    with_value = weight.clone()
    with_value.view(-1)[-7] = value
    mask = torch.empty(groups_of_four(weight).shape, dtype=torch.bool)
    for fill_ in (_fill_on_cpu_, _fill_):
        assert fill_(mask, groups_of_four(weight))
        assert not fill_(mask, groups_of_four(with_value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_numbers_of_a_type_are_ranked(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([[0.0, -tiny / 4, tiny / 2, 0.0]], dtype=dtype)  # subnormal
    assert mask_2to4(weight).tolist() == [[False, True, True, False]]


@given(weights())
def test_a_transposed_convolution_has_its_groups_along_the_first_dimension(weight):
    swapped = weight.transpose(0, 1)
    assert torch.equal(mask_2to4(swapped, dim=0), mask_2to4(weight).transpose(0, 1))
    assert is_2to4(swapped * mask_2to4(swapped, dim=0), dim=0)


@given(weights(), st.integers(0, 4))
def test_a_negative_dimension_counts_from_the_last(weight, dim):
    dim %= weight.dim()
    moved = weight.movedim(1, dim)
    for back in (dim, dim - moved.dim()):
        assert torch.equal(mask_2to4(moved, dim=back), mask_2to4(weight).movedim(1, dim))
        assert torch.equal(mask_nm(moved, 1, 4, dim=back), mask_nm(weight, 1, 4).movedim(1, dim))
        assert torch.equal(groups_of_four(moved, dim=back), groups_of_four(moved, dim=dim))
        pruned = moved * mask_2to4(moved, dim=back)
        assert is_2to4(pruned, dim=back)
        kept = kept_magnitude(moved, mask_2to4(moved, dim=dim))
        assert kept_magnitude_2to4(moved, dim=back) == pytest.approx(kept)


def test_a_pattern_along_the_wrong_dimension_is_noticed_at_a_negative_one():
    weight = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert is_2to4(weight, dim=-1)
    assert not is_2to4(weight, dim=-2)


@pytest.mark.parametrize("dim", [2, -3])
def test_a_dimension_that_does_not_exist_is_refused(dim):
    weight = torch.zeros(4, 4)
    for function in (mask_2to4, is_2to4, groups_of_four, kept_magnitude_2to4):
        with pytest.raises(HelpersError, match=rf"has shape \(4, 4\), and so no dimension {dim}"):
            function(weight, dim=dim)
    with pytest.raises(HelpersError, match=f"no dimension {dim}"):
        mask_nm(weight, 2, 4, dim=dim)


# INT8.


@st.composite
def integers(draw):
    shape = (4 * draw(st.integers(1, 2)), 8, *draw(st.sampled_from(KERNELS)))
    values = st.one_of(st.sampled_from([-128, -127, 127, 0]), st.integers(-128, 127))
    return torch.from_numpy(draw(arrays(np.int8, shape, elements=values)))


@given(integers())
def test_int8_is_ranked_like_the_same_numbers_in_fp64(weight):
    exact = weight.double()
    assert torch.equal(mask_2to4(weight), mask_2to4(exact))
    assert torch.equal(mask_nm(weight, 3, 8), mask_nm(exact, 3, 8))
    assert torch.equal(mask_2to4_transposable(weight), mask_2to4_transposable(exact))
    assert is_2to4(weight * mask_2to4(weight))
    kept = kept_magnitude(weight, mask_2to4(weight))
    assert kept == pytest.approx(kept_magnitude(exact, mask_2to4(exact)))
    assert kept_magnitude_2to4(weight) == pytest.approx(kept)


def test_the_most_negative_int8_has_the_largest_magnitude():
    weight = torch.tensor([[127, -128, 1, 126]], dtype=torch.int8)
    assert mask_2to4(weight).tolist() == [[True, True, False, False]]
    assert mask_nm(weight, 1, 4).tolist() == [[False, True, False, False]]
    assert kept_magnitude(weight, mask_nm(weight, 1, 4)) == pytest.approx(100 * 128 / 382)


def test_a_weight_without_channels_has_an_empty_mask():
    for shape in ((0, 4), (4, 0), (0, 4, 3, 3)):
        assert mask_2to4(torch.zeros(shape)).shape == shape
        assert is_2to4(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_a_type_that_is_not_ranked_is_refused_by_name(dtype):
    with pytest.raises(HelpersError, match=r"^fc\.weight is of type .*\.float\(\)"):
        mask_2to4(torch.zeros(4, 4).to(dtype), "fc.weight")


@pytest.mark.parametrize(
    "function",
    [mask_2to4, lambda x: mask_nm(x, 1, 4), mask_2to4_transposable, is_2to4, kept_magnitude_2to4],
)
def test_a_weight_without_dense_numbers_is_refused(function):
    with pytest.raises(HelpersError, match="on the device `meta`, without numbers"):
        function(torch.ones(8, 8, device="meta"))
    with pytest.raises(HelpersError, match=r"torch\.sparse_coo tensor.*\.to_dense\(\)"):
        function(torch.eye(8).to_sparse())


def test_a_mask_is_made_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert mask_2to4(torch.ones(1, 4, device="cpu")).tolist() == [[True, True, False, False]]


# n of every m.


@given(weights())
def test_two_of_four_is_the_2to4_mask(weight):
    assert torch.equal(mask_nm(weight, 2, 4), mask_2to4(weight))


@st.composite
def patterns(draw):
    m = draw(st.integers(1, 6))
    shape = (draw(st.integers(1, 2)), m * draw(st.integers(1, 2)), *draw(st.sampled_from(KERNELS)))
    values = draw(arrays(np.float64, shape, elements=NUMBERS))
    weight = torch.from_numpy(values).to(draw(st.sampled_from(DTYPES)))
    return weight, draw(st.integers(0, m)), m


@given(patterns())
def test_n_of_m_keeps_the_first_of_the_largest(pattern):
    weight, n, m = pattern
    mask = groups_of(mask_nm(weight, n, m), m)
    for values, keep in zip(groups_of(weight.abs(), m).tolist(), mask, strict=True):
        ranking = sorted(range(m), key=lambda i: (-values[i], i))
        assert sorted(ranking[:n]) == keep.nonzero().flatten().tolist()


@pytest.mark.parametrize(("n", "m"), [(3, 2), (-1, 4), (0, 0)])
def test_more_than_all_cannot_be_kept(n, m):
    with pytest.raises(HelpersError, match="cannot be kept"):
        mask_nm(torch.zeros(4, 4), n, m)


def test_n_of_m_refuses_what_2to4_refuses():
    with pytest.raises(HelpersError, match=r"^fc is of type torch\.int32"):
        mask_nm(torch.zeros(4, 8, dtype=torch.int32), 4, 8, "fc")
    with pytest.raises(HelpersError, match=r"^fc has shape .*multiple of 8"):
        mask_nm(torch.zeros(4, 12), 4, 8, "fc")
    with pytest.raises(HelpersError, match=r"^fc has NaN"):
        mask_nm(torch.full((4, 8), torch.nan), 4, 8, "fc")


# 2:4 both ways.

ROWS = [[i in pair for i in range(4)] for pair in combinations(range(4), 2)]
TILES = [t for t in map(torch.tensor, product(ROWS, repeat=4)) if (t.sum(0) == 2).all()]


@st.composite
def tileable(draw):
    kernel = draw(st.sampled_from(KERNELS))
    shape = (4 * draw(st.integers(1, 2)), 4 * draw(st.integers(1, 2)), *kernel)
    values = draw(arrays(np.float64, shape, elements=st.integers(-9, 9).map(float)))
    return torch.from_numpy(values).to(draw(st.sampled_from(DTYPES)))


@given(tileable())
def test_a_transposable_mask_is_2to4_both_ways(weight):
    mask = mask_2to4_transposable(weight)
    assert mask.shape == weight.shape
    assert mask.sum() * 2 == mask.numel()
    assert is_2to4(weight * mask)
    assert is_2to4((weight * mask).transpose(0, 1))


@given(tileable())
def test_a_transposable_mask_is_the_best_of_the_90_in_every_tile(weight):
    assert len(TILES) == 90
    mask = mask_2to4_transposable(weight)
    for row, column in product(range(0, weight.shape[0], 4), range(0, weight.shape[1], 4)):
        tile = weight.abs().double()[row : row + 4, column : column + 4].reshape(4, 4, -1)
        keep = mask[row : row + 4, column : column + 4].reshape(4, 4, -1)
        for position in range(tile.shape[2]):
            best = max(float(tile[:, :, position][pattern].sum()) for pattern in TILES)
            assert float(tile[:, :, position][keep[:, :, position]].sum()) == best


def test_a_transposable_mask_keeps_the_lowest_indices_on_ties():
    mask = mask_2to4_transposable(torch.ones(4, 4))
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_large_weight_is_masked_in_pieces_as_a_whole():
    weight = torch.randn(1024, 1032, generator=torch.Generator().manual_seed(0))
    mask = mask_2to4_transposable(weight)
    assert torch.equal(mask[-4:, -4:], mask_2to4_transposable(weight[-4:, -4:]))
    assert is_2to4(weight * mask)
    assert is_2to4((weight * mask).T)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4,)])
def test_a_transposable_mask_needs_both_sides_in_fours(shape):
    with pytest.raises(HelpersError, match=r"^fc has shape .*multiples of four"):
        mask_2to4_transposable(torch.zeros(shape), "fc")


def test_a_transposable_mask_refuses_nan():
    with pytest.raises(HelpersError, match=r"^fc has NaN"):
        mask_2to4_transposable(torch.full((4, 4), torch.nan), "fc")


# The test of the pattern.


@given(weights())
def test_a_masked_weight_is_2to4(weight):
    assert is_2to4(weight * mask_2to4(weight))


@pytest.mark.parametrize("kernel", KERNELS)
def test_three_non_zeros_in_one_group_are_not_2to4(kernel):
    weight = torch.zeros(2, 8, *kernel)
    weight[1, 4:6] = 1
    assert is_2to4(weight)
    weight[(1, 7, *(-1 for _ in kernel))] = 1
    assert not is_2to4(weight)


def test_groups_start_at_multiples_of_four():
    assert is_2to4(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]))


def test_the_pattern_needs_input_channels_in_fours():
    with pytest.raises(HelpersError, match="multiple of 4"):
        is_2to4(torch.zeros(4, 6))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_the_pattern_is_found_in_any_data_type(dtype):
    assert is_2to4(torch.tensor([[0, 1, 1, 0]]).to(dtype))
    assert not is_2to4(torch.tensor([[0, 1, 1, 1]]).to(dtype))


@given(arrays(np.int8, (3, 8), elements=st.integers(-1, 1)))
def test_the_pattern_is_at_most_two_non_zeros_in_every_four(values):
    weight = torch.from_numpy(values)
    assert is_2to4(weight) == bool(((fours(weight) != 0).sum(1) <= 2).all())


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=4, max_side=8)))
def test_a_tensor_and_an_array_of_non_zeros_are_tested_alike(nonzero):
    expected = nonzero.shape[1] % 4 == 0 and is_2to4(torch.from_numpy(nonzero))
    assert holds_2to4(nonzero) is holds_2to4(torch.from_numpy(nonzero)) is expected


# The magnitude that is kept.


@given(weights())
def test_the_magnitude_kept_by_2to4_is_that_of_the_mask(weight):
    kept = kept_magnitude(weight, mask_2to4(weight))
    assert kept_magnitude_2to4(weight) == pytest.approx(kept, rel=1e-6)
    assert kept_magnitude_2to4(weight * mask_2to4(weight)) == 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 8), (64, 8, 3, 3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_has_diverged_keeps_no_magnitude(dtype, shape, value):
    weight = torch.ones(shape, dtype=dtype)
    weight.view(-1)[77] = value
    with pytest.raises(HelpersError, match=r"^fc has NaN"):
        kept_magnitude_2to4(weight, "fc")


def test_of_zeros_all_is_kept():
    assert kept_magnitude_2to4(torch.zeros(2, 8)) == 100
    assert kept_magnitude_2to4(torch.zeros(0, 8)) == 100
