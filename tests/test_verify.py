import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from helpers.checks import TutorialError
from helpers.sparsity import mask_2to4, verify_onnx


def weight(*shape, sparse=True, dtype=np.float32):
    """Return a weight (out, in, ...); if sparse, it is 2:4 along `in` and no other axis."""
    values = np.ones(shape, dtype)
    if sparse:
        values[:, 2::4] = values[:, 3::4] = 0
    return values


def constant(name, value):
    """Return `value` in a Constant node."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def verify(tmp_path, nodes, **initializers):
    """Write a graph that computes y from x, and return what `verify_onnx` finds in it."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return verify_onnx(path)


def node(op, *inputs, **attributes):
    return helper.make_node(op, inputs, ["y"], name=f"the {op}", **attributes)


# Each operator, in the layout in which it takes its weight.


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kernel", [(3,), (1, 1), (3, 3), (1, 2, 2)])
def test_a_convolution_is_checked_along_its_input_channels(tmp_path, kernel, sparse):
    table = verify(tmp_path, [node("Conv", "x", "w")], w=weight(6, 8, *kernel, sparse=sparse))
    assert table.to_dict("records") == [
        {
            "node": "the Conv",
            "op": "Conv",
            "weight": "w",
            "shape": (6, 8, *kernel),
            "groups": 1,
            "eligible": True,
            "is_2to4": sparse,
            "zeros": 50 if sparse else 0,
        }
    ]


def test_a_convolution_that_is_2to4_along_its_outputs_only_is_not_2to4(tmp_path):
    table = verify(tmp_path, [node("Conv", "x", "w")], w=weight(8, 8, 3, 3).swapaxes(0, 1))
    assert table.is_2to4.tolist() == [False]
    assert table.zeros.tolist() == [50]


def test_groups_start_at_multiples_of_four(tmp_path):
    shifted = np.roll(weight(4, 8), 1, axis=1)  # two non-zeros in each four here too
    assert verify(tmp_path, [node("Gemm", "x", "w", transB=1)], w=shifted).is_2to4.all()
    across = np.tile(np.float32([0, 0, 1, 1, 1, 0, 0, 0]), (4, 1))  # three in 2..5, two in 0..3
    assert verify(tmp_path, [node("Gemm", "x", "w", transB=1)], w=across).is_2to4.all()


def test_one_value_too_many_is_found(tmp_path):
    values = mask_2to4(torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0)))
    values = values.numpy().astype(np.float32)
    assert verify(tmp_path, [node("Conv", "x", "w")], w=values).is_2to4.tolist() == [True]
    values[tuple(np.argwhere(values == 0)[777])] = 1e-30
    assert verify(tmp_path, [node("Conv", "x", "w")], w=values).is_2to4.tolist() == [False]


def test_a_grouped_convolution_is_not_eligible(tmp_path):
    table = verify(tmp_path, [node("Conv", "x", "w", group=2)], w=weight(8, 4, 3, 3))
    assert table.groups.tolist() == [2]
    assert table.eligible.tolist() == [False]
    assert table.is_2to4.tolist() == [False]


def test_a_stem_of_three_channels_is_not_eligible(tmp_path):
    table = verify(tmp_path, [node("Conv", "x", "w")], w=np.zeros((8, 3, 7, 7), np.float32))
    assert table.eligible.tolist() == [False]
    assert table.is_2to4.tolist() == [False]
    assert table.zeros.tolist() == [100]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("inputs", "attributes", "stored_transposed"),
    [
        (("x", "w"), {"transB": 1}, False),
        (("x", "w"), {"transB": 0}, True),
        (("x", "w"), {}, True),
        (("w", "x"), {}, False),
        (("w", "x"), {"transA": 1}, True),
    ],
)
def test_a_gemm_is_checked_along_its_sum(tmp_path, inputs, attributes, stored_transposed, sparse):
    values = weight(6, 8, sparse=sparse)
    stored = values.T if stored_transposed else values
    table = verify(tmp_path, [node("Gemm", *inputs, **attributes)], w=np.ascontiguousarray(stored))
    assert table["shape"].tolist() == [(6, 8)]
    assert table.is_2to4.tolist() == [sparse]


def test_a_bias_is_no_weight(tmp_path):
    gemm = node("Gemm", "x", "w", "b", transB=1)
    table = verify(tmp_path, [gemm], w=weight(6, 8), b=np.ones(6, np.float32))
    assert table.weight.tolist() == ["w"]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_matrix_product_is_checked_along_its_sum(tmp_path, batch, side, sparse):
    values = np.broadcast_to(weight(6, 8, sparse=sparse), (*batch, 6, 8))
    if side == "right":
        values = values.swapaxes(-1, -2)
    inputs = ("w", "x") if side == "left" else ("x", "w")
    table = verify(tmp_path, [node("MatMul", *inputs)], w=np.ascontiguousarray(values))
    assert table["shape"].tolist() == [(6 * int(np.prod(batch)), 8)]
    assert table.eligible.tolist() == [True]
    assert table.is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_dense_matrix_of_a_batch_is_found(tmp_path, side):
    values = np.stack([weight(6, 8), weight(6, 8, sparse=False)])
    stored, inputs = (values, "wx") if side == "left" else (values.swapaxes(1, 2), "xw")
    table = verify(tmp_path, [node("MatMul", *inputs)], w=np.ascontiguousarray(stored))
    assert table.is_2to4.tolist() == [False]
    assert table.zeros.tolist() == [25]


def test_a_product_of_two_activations_has_no_weight(tmp_path):
    table = verify(tmp_path, [helper.make_node("Relu", ["x"], ["r"]), node("MatMul", "x", "r")])
    assert table.empty
    assert list(table.columns) == [
        "node",
        "op",
        "weight",
        "shape",
        "groups",
        "eligible",
        "is_2to4",
        "zeros",
    ]


# The weight is looked for behind other nodes.


@pytest.mark.parametrize("sparse", [True, False])
def test_a_weight_is_found_in_a_constant_node(tmp_path, sparse):
    nodes = [constant("w", weight(6, 8, 3, 3, sparse=sparse)), node("Conv", "x", "w")]
    assert verify(tmp_path, nodes).is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("op", "attributes"), [("Cast", {"to": TensorProto.FLOAT}), ("Identity", {})]
)
def test_a_weight_is_found_behind_cast_and_identity(tmp_path, op, attributes, sparse):
    stored = weight(6, 8, 3, 3, sparse=sparse, dtype=np.float16 if op == "Cast" else np.float32)
    nodes = [helper.make_node(op, ["w"], ["v"], **attributes), node("Conv", "x", "v")]
    table = verify(tmp_path, nodes, w=stored)
    assert table.weight.tolist() == ["w"]
    assert table.is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("attributes", [{"perm": [1, 0]}, {}])
def test_a_weight_is_found_behind_a_transpose(tmp_path, attributes, sparse):
    transpose = helper.make_node("Transpose", ["w"], ["v"], **attributes)
    table = verify(tmp_path, [transpose, node("MatMul", "x", "v")], w=weight(6, 8, sparse=sparse))
    assert table["shape"].tolist() == [(6, 8)]
    assert table.is_2to4.tolist() == [sparse]


def test_a_transpose_decides_along_which_axis_a_weight_is_2to4(tmp_path):
    transpose = helper.make_node("Transpose", ["w"], ["v"], perm=[3, 2, 0, 1])
    stored = np.ascontiguousarray(weight(6, 8, 3, 5).transpose(2, 3, 1, 0))
    table = verify(tmp_path, [transpose, node("Conv", "x", "v")], w=stored)
    assert table["shape"].tolist() == [(6, 8, 3, 5)]
    assert table.is_2to4.tolist() == [True]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
def test_a_weight_is_found_behind_dequantisation(tmp_path, zero_point, sparse):
    inputs = ["w", "scale", "zero"] if zero_point else ["w", "scale"]
    dequantize = helper.make_node("DequantizeLinear", inputs, ["v"], axis=0)
    zero = {"zero": np.zeros(6, np.int8)} if zero_point else {}
    table = verify(
        tmp_path,
        [dequantize, node("Conv", "x", "v")],
        w=weight(6, 8, 3, 3, sparse=sparse, dtype=np.int8),
        scale=np.full(6, 0.1, np.float32),
        **zero,
    )
    assert table.is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("sparse", [True, False])
def test_zero_is_what_the_zero_point_says(tmp_path, sparse):
    stored = weight(6, 8, dtype=np.int8) + np.int8(3 if sparse else 0)
    table = verify(
        tmp_path,
        [
            helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["v"]),
            node("Gemm", "x", "v", transB=1),
        ],
        w=stored,
        scale=np.float32(0.1),
        zero=np.int8(3),
    )
    assert table.is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_zero_point_counts_for_its_block(tmp_path, axis, sparse):
    zero = np.int8([[0, 0], [3, 3]]) if axis == 0 else np.int8([[0, 3], [0, 3]])
    zero = zero.repeat(4, 1 - axis)
    stored = weight(8, 8, sparse=sparse, dtype=np.int8) + zero.repeat(4, axis)
    inputs = ["w", "scale", "zero"]
    dequantize = helper.make_node("DequantizeLinear", inputs, ["v"], axis=axis, block_size=4)
    scale = np.full(zero.shape, 0.1, np.float32)
    gemm = node("Gemm", "x", "v", transB=1)
    table = verify(tmp_path, [dequantize, gemm], w=stored, scale=scale, zero=zero)
    assert table.is_2to4.tolist() == [sparse]


def test_a_weight_is_found_behind_a_chain_of_nodes(tmp_path):
    nodes = [
        constant("w", weight(6, 8, dtype=np.float16)),
        helper.make_node("Cast", ["w"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["a", "scale"], ["b"]),
        helper.make_node("DequantizeLinear", ["b", "scale"], ["c"]),
        helper.make_node("Identity", ["c"], ["d"]),
        helper.make_node("Transpose", ["d"], ["e"]),
        node("Gemm", "x", "e"),
    ]
    table = verify(tmp_path, nodes, scale=np.float32(0.1))
    assert table["shape"].tolist() == [(6, 8)]
    assert table.is_2to4.tolist() == [True]


def test_every_weight_of_a_file_has_its_row(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "dense"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "sparse"], ["b"], name="second"),
        node("Conv", "b", "grouped", group=2),
    ]
    table = verify(
        tmp_path,
        nodes,
        dense=weight(8, 8, 1, 1, sparse=False),
        sparse=weight(8, 8, 1, 1),
        grouped=weight(8, 4, 1, 1),
    )
    assert table.node.tolist() == ["first", "second", "the Conv"]
    assert table.eligible.tolist() == [True, True, False]
    assert table.is_2to4.tolist() == [False, True, False]


# Files that are no models.


def refusal(path):
    with pytest.raises(TutorialError) as error:
        verify_onnx(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"\x00", b"not an ONNX file", b"\x89PNG\r\n" * 100])
def test_a_file_that_is_no_model_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert refusal(path).startswith("model.onnx is not a valid ONNX model: ")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_model_is_refused_in_one_sentence(tmp_path, share):
    verify(tmp_path, [node("Conv", "x", "w")], w=weight(64, 64, 3, 3))
    path = tmp_path / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(path).startswith("model.onnx is not a valid ONNX model: ")


def test_a_missing_file_is_told_in_one_sentence(tmp_path):
    assert refusal(tmp_path / "model.onnx").startswith("model.onnx cannot be read: No such file")


def test_a_folder_is_refused_in_one_sentence(tmp_path):
    assert refusal(tmp_path)


def test_a_json_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "04_sparse_fp16.onnx.json"
    path.write_text('{"sha256": "abc"}')
    assert refusal(path)
