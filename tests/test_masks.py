from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.checks import TutorialError
from helpers.sparsity import is_2to4, mask_2to4

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KERNELS = [(), (3,), (2, 2), (1, 2, 2)]  # linear, and convolutions in one to three dimensions
# Few different magnitudes, so that ties are common, beside any others.
NUMBERS = st.one_of(st.integers(-2, 2).map(float), st.floats(-60_000, 60_000))


@st.composite
def weights(draw):
    shape = (draw(st.integers(1, 2)), 4 * draw(st.integers(1, 2)), *draw(st.sampled_from(KERNELS)))
    values = draw(arrays(np.float64, shape, elements=NUMBERS))
    return torch.from_numpy(values).to(draw(st.sampled_from(DTYPES)))


def fours(tensor):
    """Return every group of four along the input channels as one row."""
    groups = tensor.reshape(tensor.shape[0], tensor.shape[1] // 4, 4, -1)
    return groups.movedim(2, 3).reshape(-1, 4)


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


def test_the_weight_itself_is_left_alone():
    weight = torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    assert not mask_2to4(weight).requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_without_a_magnitude_is_refused_by_name(value):
    weight = torch.zeros(2, 4)
    weight[1, 2] = value
    with pytest.raises(TutorialError, match=r"^layer1\.conv1\.weight has NaN or infinite values"):
        mask_2to4(weight, "layer1.conv1.weight")


@pytest.mark.parametrize("shape", [(2, 3), (8, 6, 3, 3), (8,)])
def test_input_channels_must_be_a_multiple_of_four(shape):
    with pytest.raises(TutorialError, match=r"^conv1\.weight has shape .*multiple of four"):
        mask_2to4(torch.zeros(shape), "conv1.weight")


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
    with pytest.raises(TutorialError, match="multiple of four"):
        is_2to4(torch.zeros(4, 6))
