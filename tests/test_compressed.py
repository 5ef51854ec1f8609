import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

from helpers.errors import HelpersError
from helpers.sparsity import (
    Compressed,
    compress_2to4,
    decompress_2to4,
    load_compressed,
    mask_2to4,
    prune_2to4_,
    save_compressed,
)
from helpers.sparsity.compressed import read_checkpoint, state_checksum

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
EXACT_DTYPES = [
    *DTYPES, torch.float64, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
KERNELS = [(), (3,), (2, 2), (1, 2, 2)]


@st.composite
def sparse_weights(draw):
    """Return a 2:4 weight in which many groups have fewer than two non-zeros."""
    channels = 4 * draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), channels, *draw(st.sampled_from(KERNELS)))
    values = draw(arrays(np.int8, shape, elements=st.integers(-128, 127)))
    weight = torch.from_numpy(values.astype(np.float32))
    if draw(st.booleans()):
        weight[draw(arrays(np.bool_, shape))] = 0
    weight = weight * mask_2to4(weight)
    dtype = draw(st.sampled_from(DTYPES))
    scale = 1 if dtype == torch.int8 else draw(st.sampled_from([1, 2**-9]))
    return (weight * scale).to(dtype)


def pattern(shape):
    """Return a 2:4 mask that has all six patterns in turn along the input channels."""
    lanes = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    out, channels, *kernel = shape
    count = out * channels // 4 * torch.Size(kernel).numel()
    mask = torch.zeros(count, 4, dtype=torch.bool)
    mask.scatter_(1, lanes[torch.arange(count) % 6], True)
    return mask.reshape(out, channels // 4, -1, 4).transpose(2, 3).reshape(shape)


def as_bytes(tensor):
    """View each number as its bytes, in a last dimension of their own."""
    return tensor.detach().contiguous().unsqueeze(-1).view(torch.uint8)


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
    assert compressed.metadata.shape == (-(-weight.numel() // 8),)
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


def test_positions_are_those_of_the_values_in_their_groups():
    weight = torch.tensor([[0.0, 7, 8, 0, 1, 0, 0, 2], [3, 0, 0, 4, 0, 0, 5, 6]])
    compressed = compress_2to4(weight)
    assert compressed.positions.tolist() == [[1, 2, 0, 3], [0, 3, 2, 3]]
    ragged = compress_2to4(weight[:1, :4])  # half a byte
    assert ragged.positions.tolist() == [[1, 2]]


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


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_a_round_trip_keeps_every_bit_but_the_sign_of_zero(dtype):
    """Every bit pattern of the type (of 8 and 16 bits) or many, NaN and infinity included."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (64, 32, 3, dtype.itemsize), generator=generator)
    bits *= pattern(bits.shape[:-1]).unsqueeze(-1)
    weight = bits.to(torch.uint8).view(dtype).squeeze(-1)
    restored = decompress_2to4(compress_2to4(weight))
    assert restored.dtype == dtype
    differ = (as_bytes(weight) != as_bytes(restored)).any(-1)
    assert (weight[differ] == 0).all()  # -0.0
    assert not as_bytes(restored)[differ].any()


def test_negative_zeros_are_zeros():
    weight = torch.tensor([[-0.0, -0.0, -0.0, 5.0], [-0.0, 2.0, -0.0, 5.0]])
    restored = decompress_2to4(compress_2to4(weight))
    assert torch.equal(restored, weight)
    assert not restored.signbit().any()


def test_equal_weights_are_equal_bytes_whatever_the_sign_of_their_zeros():
    weight = torch.tensor([[-0.0, 0.0, 3.0, 0.0]])
    ours, theirs = compress_2to4(weight), compress_2to4(weight.abs())
    assert torch.equal(as_bytes(ours.values), as_bytes(theirs.values))
    assert torch.equal(ours.metadata, theirs.metadata)


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (5, 12, 3), (3, 4, 7, 7), (1, 4, 1, 1, 5)])
def test_metadata_that_fills_no_whole_bytes_is_padded_with_zeros(shape):
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) * pattern(shape)
    compressed = compress_2to4(weight)
    count = weight.numel() // 2
    assert compressed.metadata.numel() == -(-count // 4)
    assert int(compressed.metadata[-1]) >> 2 * ((count - 1) % 4 + 1) == 0
    assert torch.equal(decompress_2to4(compressed), weight)


def test_a_channels_last_weight_round_trips():
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = (weight * mask_2to4(weight)).to(memory_format=torch.channels_last)
    assert torch.equal(decompress_2to4(compress_2to4(weight)), weight)


def test_a_parameter_is_compressed_without_its_gradient():
    weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
    assert not compress_2to4(weight).values.requires_grad


def test_a_dense_weight_is_refused():
    with pytest.raises(HelpersError, match=r"^fc.weight is not 2:4.*prune_2to4_"):
        compress_2to4(torch.tensor([[0, 0, 0, 0, 1.0, 0, 1, 1]]), "fc.weight")


def test_numbers_of_more_than_64_bits_are_refused():
    with pytest.raises(HelpersError, match=r"complex128 cannot be compressed"):
        compress_2to4(torch.zeros(2, 4, dtype=torch.complex128))


def test_values_and_metadata_of_different_weights_are_refused():
    compressed = compress_2to4(torch.zeros(4, 8))
    with pytest.raises(HelpersError, match=r"^3 bytes of metadata do not belong to 16 values"):
        decompress_2to4(Compressed(compressed.values, compressed.metadata[:3]))


# PyTorch's own conversion, where that one works: 2-D, rows in 16s or 32s. FP32 is 1:2 there.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(32, 64), (96, 128), (64, 192)])
def test_values_and_positions_are_those_of_torchs_own_conversion(shape, dtype):
    weight = (torch.arange(1, 1 + shape[0] * shape[1]).reshape(shape) % 100 + 1).to(dtype)
    weight = weight * pattern(shape)  # two non-zeros in every group: no room for a choice
    values, reordered = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    offsets = conversions._calculate_meta_reordering_scatter_offsets(
        *reordered.shape, reordered.dtype, reordered.device
    )
    metadata = reordered.flatten().gather(0, offsets).view(torch.uint8)
    ours = compress_2to4(weight)
    assert torch.equal(ours.values, values)
    assert torch.equal(ours.metadata, metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_groups_with_fewer_non_zeros_are_the_same_dense_matrix_by_torchs_conversion(dtype):
    weight = torch.ones(32, 64, dtype=dtype) * pattern((32, 64))
    weight[::3] = 0
    weight[:, 1::2] = 0
    theirs = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(
        decompress_2to4(compress_2to4(weight)),
        conversions.sparse_semi_structured_to_dense_cutlass(*theirs),
    )


@pytest.mark.parametrize("shape", [(1000, 64), (512, 144)])  # fc and a conv2 of ResNeXt-101
def test_a_weight_that_torchs_conversion_cannot_take_is_compressed(shape):
    weight = torch.ones(shape, dtype=torch.float16) * pattern(shape)
    assert torch.equal(decompress_2to4(compress_2to4(weight)), weight)


# A whole network in one file.


def network(dtype=torch.float32):
    """A pruned network with a dense stem, a grouped convolution and batch norms."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3, bias=False),
        nn.Conv2d(32, 32, 3, groups=4),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    prune_2to4_(net)
    return net.to(dtype)


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(as_bytes(left), as_bytes(right + 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_network_loads_back_into_the_stock_network(tmp_path, dtype):
    net = network(dtype)
    names = save_compressed(net, tmp_path / "net.safetensors")
    assert names == ["2.weight", "5.weight"]
    state = load_compressed(tmp_path / "net.safetensors")
    assert state.keys() == net.state_dict().keys()
    assert all(same_bits(state[name], value) for name, value in net.state_dict().items())
    stock = network(dtype)
    stock[2].weight.data.zero_()
    stock.load_state_dict(state)
    image = torch.ones(1, 3, 7, 7, dtype=torch.float32)
    assert torch.equal(stock.float().eval()(image), net.float().eval()(image))


@settings(max_examples=25)
@given(st.dictionaries(st.text(max_size=8), sparse_weights(), max_size=4), st.booleans())
def test_any_state_dict_comes_back_exactly(state, transposed):
    if transposed:  # most are dense now
        state = {name: value.transpose(0, 1) for name, value in state.items()}
    state |= {"a step": torch.tensor(7), "empty": torch.zeros(2, 0)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        save_compressed(state, path)
        loaded = load_compressed(path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float16, 9 / 16), (torch.int8, 5 / 8), (torch.float32, 17 / 32)]
)
def test_a_file_of_sparse_weights_has_the_size_of_the_compressed_form(tmp_path, dtype, share):
    weight = pattern((512, 256, 3, 3)).to(dtype)
    save_compressed({"w": weight}, tmp_path / "net.safetensors")
    size = (tmp_path / "net.safetensors").stat().st_size
    assert share * weight.nbytes < size < share * weight.nbytes + 1000


def test_the_same_weights_are_the_same_bytes(tmp_path):
    for attempt in range(5):
        save_compressed(network(), tmp_path / f"{attempt}.safetensors", network="some net")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_tied_weights_are_stored_once_and_come_back_under_both_names(tmp_path):
    weight = pattern((64, 64)).float()
    path = tmp_path / "net.safetensors"
    save_compressed({"encoder": weight, "decoder": weight, "view": weight[:32]}, path)
    assert path.stat().st_size < 1.5 * 17 / 32 * weight.nbytes + 1000
    state = load_compressed(path)
    assert torch.equal(state["decoder"], weight)
    assert torch.equal(state["encoder"], weight)
    assert torch.equal(state["view"], weight[:32])


def test_the_name_of_the_network_is_kept(tmp_path):
    save_compressed(network(), tmp_path / "net.safetensors", network="resnet18")
    assert read_checkpoint(tmp_path / "net.safetensors").network == "resnet18"


def test_any_safetensors_file_is_read_as_a_checkpoint(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "net.safetensors", {"model": "resnet18"})
    checkpoint = read_checkpoint(tmp_path / "net.safetensors")
    assert checkpoint.state["w"].tolist() == [[1, 1], [1, 1]]
    assert (checkpoint.network, checkpoint.compressed) == ("resnet18", False)


def test_a_checkpoint_says_whether_it_was_compressed(tmp_path):
    save_compressed(network(), tmp_path / "net.safetensors")
    checkpoint = read_checkpoint(tmp_path / "net.safetensors")
    assert checkpoint.compressed
    assert checkpoint.network is None
    assert checkpoint.state.keys() == network().state_dict().keys()


def test_a_checksum_covers_names_types_shapes_and_bytes_but_not_the_order():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3), "a": torch.tensor([1.0, 9.0, 2.0])[::2].clone()}
    assert state_checksum(state) == state_checksum(same)
    assert state_checksum(
        {"a": torch.tensor([[1.0, 0.0], [2.0, 0.0]])[:, 0]} | {"b": state["b"]}
    ) == (state_checksum(state))
    others = [
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].view(torch.int32), "b": state["b"]},
        {"a": state["a"][None], "b": state["b"]},
        {"a": state["a"] + 1, "b": state["b"]},
        {"a": state["a"]},
    ]
    sums = {state_checksum(other) for other in [state, *others]}
    assert len(sums) == 1 + len(others)
    assert state_checksum(state, {"model": "net"}) not in sums


def test_a_file_of_an_earlier_release_is_read(tmp_path):
    """The checksum is part of the format: this is what version 1 has always recorded."""
    path = tmp_path / "net.safetensors"
    save_compressed({"w": torch.eye(4), "b": torch.ones(3)}, path, "net")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["compressed_2to4"])
    assert header["sha256"] == "8781508900bb221fd392b7e9d8ecb24cf684dd1a66fbd61fb631b1b1f2c4fac7"


@pytest.mark.parametrize(
    "entry", [3, "text", torch.ones(2, 2).to_sparse(), torch.ones(2, 2, device="meta")]
)
def test_an_entry_that_is_not_a_plain_tensor_is_refused_by_name(tmp_path, entry):
    with pytest.raises(HelpersError, match=r"^extra is not a plain dense tensor"):
        save_compressed({"w": torch.ones(2), "extra": entry}, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["w", "w.values"])
def test_names_that_collide_are_refused(tmp_path, first):
    state = {"w": torch.zeros(2, 4), "w.values": torch.ones(3)}
    state = {first: state[first]} | state
    with pytest.raises(HelpersError, match=r"^w.values is the name of a tensor"):
        save_compressed(state, tmp_path / "net.safetensors")


def refusal(path):
    with pytest.raises(HelpersError) as error:
        load_compressed(path)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "net.safetensors"
    save_compressed({"w": torch.eye(8), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        if whole[place : place + 1] == b" ":
            continue  # blanks that fill up safetensors' header mean nothing
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refusal(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "net.safetensors"
    save_compressed(network(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "is not a readable safetensors file" in refusal(path)


def test_a_missing_file_a_folder_and_a_pickle_are_refused(tmp_path):
    refusal(tmp_path / "net.safetensors")
    refusal(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "net.pt")
    assert "is not a readable safetensors file" in refusal(tmp_path / "net.pt")


def test_a_file_that_save_compressed_did_not_write_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "net.safetensors")
    assert "was not written by save_compressed" in refusal(tmp_path / "net.safetensors")


@pytest.mark.parametrize("header", ["", "[]", "3", "null", "{}", '{"version": 1}', '"text"'])
def test_a_header_that_says_something_else_is_refused(tmp_path, header):
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.ones(2)}, path, {"compressed_2to4": header})
    assert "is damaged" in refusal(path)


def test_a_file_of_a_later_version_says_so(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.ones(2)}, path, {"compressed_2to4": '{"version": 2, "sha256": ""}'})
    assert "version 2" in refusal(path)
