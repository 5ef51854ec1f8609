import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.checks import TutorialError
from helpers.sparsity import compress_2to4, decompress_2to4, mask_2to4

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
KERNELS = [(), (3,), (2, 2), (1, 2, 2)]


@st.composite
def sparse_weights(draw):
    """Return a 2:4 weight in which many groups have fewer than two non-zeros."""
    shape = (2, 4 * draw(st.integers(1, 3)), *draw(st.sampled_from(KERNELS)))
    values = draw(arrays(np.int8, shape, elements=st.integers(-128, 127)))
    weight = torch.from_numpy(values.astype(np.float32))
    if draw(st.booleans()):
        weight[draw(arrays(np.bool_, shape))] = 0
    weight = weight * mask_2to4(weight)
    dtype = draw(st.sampled_from(DTYPES))
    scale = 1 if dtype == torch.int8 else draw(st.sampled_from([1, 2**-9]))
    return (weight * scale).to(dtype)


@given(sparse_weights())
def test_decompression_returns_exactly_what_was_compressed(weight):
    compressed = compress_2to4(weight)
    restored = decompress_2to4(compressed)
    assert restored.dtype == weight.dtype
    assert torch.equal(restored, weight)


@given(sparse_weights())
def test_half_the_values_and_two_bits_for_each_are_stored(weight):
    compressed = compress_2to4(weight)
    out, channels, *kernel = weight.shape
    assert compressed.values.shape == (out, channels // 2, *kernel)
    assert compressed.values.dtype == weight.dtype
    assert compressed.metadata.shape == (weight.numel() // 8,)
    assert compressed.metadata.dtype == torch.uint8


def test_smallest_and_largest_numbers_survive():
    tiny = torch.finfo(torch.float32).smallest_normal
    weight = torch.tensor([[0, 0, tiny, torch.finfo(torch.float32).max, 0, 0, 1e-45, 0]])
    assert torch.equal(decompress_2to4(compress_2to4(weight)), weight)


@pytest.mark.parametrize("value", [1e-50, 1e50])
def test_numbers_that_only_fp64_can_hold_survive(value):
    weight = torch.tensor([[0, 0, 0, value, 0, 0, value, 1]], dtype=torch.float64)
    assert torch.equal(decompress_2to4(compress_2to4(weight)), weight)


def test_metadata_holds_four_positions_in_a_byte_lowest_first():
    compressed = compress_2to4(torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 0.0, 0.0, 2.0]]))
    assert compressed.values.tolist() == [[5, 7, 1, 2]]
    assert compressed.metadata.tolist() == [1 | 3 << 2 | 0 << 4 | 3 << 6]


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("lane", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_with_fewer_than_two_non_zeros_is_filled_up_with_zeros(count, lane, dtype):
    weight = torch.zeros(2, 4, dtype=dtype)
    weight[1, lane] = 3 * count
    compressed = compress_2to4(weight)
    assert compressed.values.numel() == 4
    assert (compressed.values != 0).sum() == count
    assert torch.equal(decompress_2to4(compressed), weight)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float16, 9 / 16), (torch.bfloat16, 9 / 16), (torch.int8, 5 / 8)]
)
def test_size_is_nine_sixteenths_in_fp16_and_five_eighths_in_int8(dtype, share):
    assert compress_2to4(torch.zeros(64, 32, 3, 3, dtype=dtype)).nbytes == share * (
        torch.zeros(64, 32, 3, 3, dtype=dtype).nbytes
    )


def test_a_channels_last_weight_round_trips():
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = (weight * mask_2to4(weight)).to(memory_format=torch.channels_last)
    assert torch.equal(decompress_2to4(compress_2to4(weight)), weight)


def test_a_dense_weight_is_refused():
    with pytest.raises(TutorialError, match=r"^This weight is not 2:4.*prune_2to4_"):
        compress_2to4(torch.ones(2, 4))


def test_a_weight_that_fills_no_whole_bytes_is_refused():
    with pytest.raises(TutorialError, match=r"^12 weights do not fill whole bytes"):
        compress_2to4(torch.zeros(3, 4))
