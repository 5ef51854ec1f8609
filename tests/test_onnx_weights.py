import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from helpers.errors import HelpersError
from helpers.sparsity import mask_2to4, verify_onnx
from helpers.sparsity.onnx_file import load_onnx
from helpers.sparsity.onnx_weights import node_weights


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
    tensors = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()
    ]
    return verify_tensors(tmp_path, nodes, tensors)


def verify_tensors(tmp_path, nodes, tensors, sparse_tensors=(), functions=()):
    return verify_onnx(write(tmp_path, nodes, tensors, sparse_tensors, functions))


def write(tmp_path, nodes, tensors, sparse_tensors=(), functions=()):
    """Write a graph that computes y from x, and return its path."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
        tensors,
        sparse_initializer=sparse_tensors,
    )
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", 23),
            *(helper.make_opsetid(name, 1) for name in ("acme", "local")),
        ],
        ir_version=11,
        functions=functions,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


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
            "reason": "",
            "judged": True,
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
    assert table.is_2to4.tolist() == [True]
    assert table.reason.tolist() == ["grouped: TensorRT has no sparse kernel"]


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


def test_a_bias_is_not_a_weight(tmp_path):
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
    assert table.is_2to4.tolist() == [sparse]
    # Batches of matrices belong to the batches of the activations: they are no weights.
    assert table.eligible.tolist() == [not batch]
    assert table.judged.tolist() == [True]


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_dense_matrix_of_a_batch_is_found(tmp_path, side):
    values = np.stack([weight(6, 8), weight(6, 8, sparse=False)])
    stored, inputs = (values, "wx") if side == "left" else (values.swapaxes(1, 2), "xw")
    table = verify(tmp_path, [node("MatMul", *inputs)], w=np.ascontiguousarray(stored))
    assert table.is_2to4.tolist() == [False]
    assert table.zeros.tolist() == [25]


def test_a_product_of_two_activations_is_said_to_have_no_weight(tmp_path):
    table = verify(tmp_path, [helper.make_node("Relu", ["x"], ["r"]), node("MatMul", "x", "r")])
    (row,) = table.to_dict("records")
    assert row["reason"] == "the weight is computed at run time"
    assert (row["node"], row["weight"], row["shape"]) == ("the MatMul", "r", ())
    assert not row["eligible"]
    assert not row["is_2to4"]
    assert np.isnan(row["zeros"])


def test_a_file_without_weights_has_an_empty_table_with_all_columns(tmp_path):
    table = verify(tmp_path, [node("Relu", "x")])
    assert table.empty
    assert list(table.columns) == [
        "node", "op", "weight", "shape", "groups", "eligible", "is_2to4", "zeros", "reason",
        "judged",
    ]  # fmt: skip


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_vector_is_one_row_of_weights(tmp_path, side, sparse):
    inputs = ("w", "x") if side == "left" else ("x", "w")
    values = weight(1, 8, sparse=sparse)[0]
    table = verify(tmp_path, [node("MatMul", *inputs)], w=values)
    assert table["shape"].tolist() == [(1, 8)]
    assert table.is_2to4.tolist() == [sparse]


def test_a_batched_weight_is_looked_at_along_its_sum_where_polygraphy_takes_the_batch(tmp_path):
    """The right factor of a batched product is (batch, in, out); polygraphy takes axis 0."""
    along_batch = np.zeros((4, 8, 6), np.float32)
    along_batch[:2] = 1  # 2:4 along axis 0, dense in every matrix that is multiplied
    assert verify(tmp_path, [node("MatMul", "x", "w")], w=along_batch).is_2to4.tolist() == [False]
    along_sum = np.ascontiguousarray(np.broadcast_to(weight(6, 8).T, (3, 8, 6)))
    table = verify(tmp_path, [node("MatMul", "x", "w")], w=along_sum)  # a batch of three
    assert table.is_2to4.tolist() == [True]
    assert table.reason.tolist() == [
        "a batch of 3 matrices: TensorRT names no sparse kernel for it"
    ]


@pytest.mark.parametrize("shape", [(), (0, 8), (8, 0)])
def test_a_constant_that_cannot_be_a_weight_has_a_row_that_says_so(tmp_path, shape):
    table = verify(tmp_path, [node("MatMul", "x", "w")], w=np.ones(shape, np.float32))
    assert table.eligible.tolist() == [False]
    assert table.reason.tolist() == [f"a weight cannot have the shape {shape}"]


def test_a_weight_of_several_nodes_has_a_row_for_each(tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], name="along", transB=1),
        helper.make_node("Gemm", ["a", "w"], ["y"], name="across"),
    ]
    table = verify(tmp_path, nodes, w=weight(8, 8))
    assert table.node.tolist() == ["along", "across"]
    assert table.weight.tolist() == ["w", "w"]
    assert table.is_2to4.tolist() == [True, False]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("ConvTranspose", ["x", "w"], {}),
        ("Einsum", ["x", "w"], {"equation": "ij,kj->ik"}),
        ("LSTM", ["x", "w", "x"], {"hidden_size": 2}),
    ],
)
def test_other_operators_with_weights_are_listed_as_not_eligible(tmp_path, op, inputs, attributes):
    constants = {"s": np.float32(1), "z": np.int8(0)}
    used = {name: value for name, value in constants.items() if name in inputs}
    table = verify(tmp_path, [node(op, *inputs, **attributes)], w=weight(8, 8, 1, 1), **used)
    (row,) = [row for row in table.to_dict("records") if row["weight"] == "w"]
    assert (row["op"], row["eligible"], row["zeros"]) == (op, False, 50)
    assert row["reason"] == f"TensorRT runs no {op} sparse"


def test_an_operator_of_that_name_in_another_domain_is_another_operator(tmp_path):
    table = verify(tmp_path, [node("Conv", "x", "w", domain="acme")], w=weight(4, 4, 1, 1))
    assert table[["weight", "eligible", "judged"]].values.tolist() == [["w", False, False]]
    assert table.reason.tolist() == ["Conv of acme is not known here, and may multiply by it"]


# ONNX Runtime's operators, and quantised ones.


def quantised(values, zero=0):
    return (3 * values + zero).astype(np.int8)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "form"),
    [
        ("FusedConv", "xw", {"activation": "Relu"}, "conv"),
        ("FusedGemm", "xw", {"transB": 1}, "out first"),
        ("FusedMatMul", "xw", {}, "in first"),
        ("FusedMatMul", "xw", {"transB": 1}, "out first"),
        ("FusedMatMul", "wx", {}, "out first"),
        ("FusedMatMul", "wx", {"transA": 1}, "in first"),
        ("TransposeMatMul", "xw", {"transB": 1}, "out first"),
        ("GemmFastGelu", "xw", {}, "in first"),
        ("Attention", "xw", {"num_heads": 2}, "in first"),
        ("QLinearConv", "xszwszsz", {}, "conv"),
        ("QGemm", "xszwsz", {"transB": 1}, "out first"),
        ("QAttention", "xwbss", {"num_heads": 2}, "in first"),
        ("DynamicQuantizeMatMul", "xws", {}, "in first"),
        ("MatMulIntegerToFloat", "xwsszz", {}, "in first"),
    ],
)
def test_an_operator_of_onnx_runtime_is_judged(tmp_path, op, inputs, attributes, form, sparse):
    values = weight(6, 8, sparse=sparse)
    stored = {"conv": values[..., None, None], "out first": values, "in first": values.T}[form]
    integer = op.startswith("Q") or "Integer" in op or "Dynamic" in op
    constants = {"s": np.float32(0.5), "z": np.int8(0), "b": np.zeros(6, np.float32)}
    table = verify(
        tmp_path,
        [node(op, *inputs, domain="com.microsoft", **attributes)],
        w=quantised(stored) if integer else np.ascontiguousarray(stored),
        **{name: value for name, value in constants.items() if name in inputs},
    )
    (row,) = table.to_dict("records")
    assert (row["op"], row["weight"], row["shape"][:2]) == (op, "w", (6, 8))
    assert (row["eligible"], row["judged"], row["is_2to4"]) == (True, True, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("op", "inputs", "form"),
    [
        ("ConvInteger", "xw", "conv"),
        ("MatMulInteger", "xw", "in first"),
        ("MatMulInteger", "wx", "out first"),
        ("QLinearConv", "xszwszsz", "conv"),
        ("QLinearMatMul", "xszwszsz", "in first"),
        ("QLinearMatMul", "wszxszsz", "out first"),
    ],
)
def test_a_quantised_operator_is_judged(tmp_path, op, inputs, form, sparse):
    values = weight(6, 8, sparse=sparse)
    stored = {"conv": values[..., None, None], "out first": values, "in first": values.T}[form]
    constants = {"s": np.float32(0.5), "z": np.int8(0)}
    used = {name: value for name, value in constants.items() if name in inputs}
    table = verify(tmp_path, [node(op, *inputs)], w=quantised(stored), **used)
    (row,) = table.to_dict("records")
    assert (row["eligible"], row["judged"], row["is_2to4"]) == (True, True, sparse)
    if used:
        used["z"] = np.int8(3)
        (row,) = verify(tmp_path, [node(op, *inputs)], w=quantised(stored, 3), **used).to_dict(
            "records"
        )
        assert (row["eligible"], row["judged"], row["is_2to4"]) == (False, False, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_of_a_few_bits_is_unpacked(tmp_path, bits, sparse):
    neutral = 1 << (bits - 1)
    numbers = np.full((6, 32), neutral)  # the last eight of each row are no part of the weight
    numbers[:, :24] += weight(6, 24, sparse=sparse).astype(int)
    each = 8 // bits
    packed = sum(numbers[:, place::each] << (bits * place) for place in range(each))
    attributes = {"K": 24, "N": 6, "bits": bits, "block_size": 16}
    nodes = [node("MatMulNBits", *"xws", domain="com.microsoft", **attributes)]
    stored = packed.astype(np.uint8).reshape(6, 2, -1)
    table = verify(tmp_path, nodes, w=stored, s=np.ones(12, np.float32))
    (row,) = table.to_dict("records")
    assert (row["shape"], row["eligible"], row["judged"]) == ((6, 24), True, True)
    assert row["is_2to4"] == sparse
    nodes = [node("MatMulNBits", *"xwsz", domain="com.microsoft", **attributes)]
    zero = np.zeros((6, -(-2 * bits // 8)), np.uint8)
    table = verify(tmp_path, nodes, w=stored, s=np.ones(12, np.float32), z=zero)
    assert table[["eligible", "judged", "is_2to4"]].values.tolist() == [[False, False, False]]


@pytest.mark.parametrize("op", ["MoE", "MatMulBnb4", "QOrderedMatMul"])
def test_what_is_not_known_of_onnx_runtime_is_not_judged(tmp_path, op):
    table = verify(tmp_path, [node(op, "x", "w", domain="com.microsoft")], w=weight(8, 8))
    assert table[["weight", "eligible", "judged"]].values.tolist() == [["w", False, False]]


@pytest.mark.parametrize("op", ["RotaryEmbedding", "EmbedLayerNormalization", "SkipGroupNorm"])
def test_a_table_that_nobody_multiplies_by_is_no_weight(tmp_path, op):
    assert verify(tmp_path, [node(op, "x", "w", domain="com.microsoft")], w=weight(8, 8)).empty
    assert verify(tmp_path, [node("Gather", "w", "x")], w=weight(8, 8)).empty
    assert verify(tmp_path, [node("Mul", "w", "x")], w=weight(8, 8)).empty


def test_the_weights_of_a_linear_model_are_named(tmp_path):
    regressor = node("LinearRegressor", "x", domain="ai.onnx.ml", coefficients=[1.0] * 8)
    table = verify(tmp_path, [regressor])
    assert table[["weight", "eligible", "judged"]].values.tolist() == [
        ["coefficients", False, True]
    ]


def test_a_weight_has_the_name_of_the_largest_tensor_that_it_is_made_of(tmp_path):
    nodes = [helper.make_node("Mul", ["half", "w"], ["v"]), node("Gemm", "x", "v", transB=1)]
    tensors = {"half": np.float32(0.5), "w": weight(6, 8)}
    assert verify(tmp_path, nodes, **tensors).weight.tolist() == ["w"]
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in tensors.items()]
    (found,) = node_weights(write(tmp_path, nodes, tensors))
    assert found.sources == ("w", "half")


@pytest.mark.parametrize("domain", ["", "trt.plugins"])
def test_a_matrix_of_a_plugin_is_named_as_not_judged(tmp_path, domain):
    tensor = numpy_helper.from_array(weight(8, 8), "kernel")
    nodes = [node("CustomFC", "x", "bias", domain=domain, W=tensor)]
    table = verify(tmp_path, nodes, bias=np.zeros(8, np.float32))
    assert table[["node", "weight"]].values.tolist() == [["the CustomFC", "W"]]
    assert table[["eligible", "judged"]].values.tolist() == [[False, False]]


# Constants that are no weights.


def test_a_product_of_constants_is_a_constant(tmp_path):
    """A table of relative positions through a small network, as in Swin V2."""
    nodes = [
        helper.make_node("MatMul", ["table", "w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="second"),
        helper.make_node("Conv", ["image", "kernel"], ["d"], name="third"),
        node("Add", "x", "c"),
    ]
    constants = {"table": np.ones((5, 8)), "w": np.ones((8, 8)), "image": np.ones((1, 4, 2, 2)),
                 "kernel": np.ones((4, 4, 1, 1))}  # fmt: skip
    table = verify(tmp_path, nodes, **constants)
    assert table.node.tolist() == ["first", "second", "third"]
    assert set(table.reason) == {
        "both factors are constants: computed once, when the file is loaded"
    }
    assert not table.eligible.any()
    assert table.judged.all()


@pytest.mark.parametrize("sparse", [True, False])
def test_a_product_of_constants_can_be_a_weight(tmp_path, sparse):
    """A low-rank adapter whose factors were not merged: what takes part is their product."""
    nodes = [
        helper.make_node("MatMul", ["up", "down"], ["v"], name="adapter"),
        node("Gemm", "x", "v", transB=1),
    ]
    table = verify(tmp_path, nodes, up=np.ones((6, 1), "f4"), down=weight(1, 8, sparse=sparse))
    found = table.set_index("node")
    assert found.eligible.to_dict() == {"adapter": False, "the Gemm": True}
    assert found.is_2to4["the Gemm"] == sparse


@pytest.mark.parametrize("batch", [(1,), (2,), (1, 4)])
def test_a_left_factor_with_a_batch_is_an_activation(tmp_path, batch):
    """Learned queries: their first dimension is that of the batch, also if it has size 1."""
    table = verify(tmp_path, [node("MatMul", "w", "x")], w=np.ones((*batch, 6, 8), "f4"))
    assert table[["eligible", "judged"]].values.tolist() == [[False, True]]
    assert table.reason[0].endswith(f"{len(batch) + 2} dimensions: activations that are constant")


@pytest.mark.parametrize(("batch", "eligible"), [((1,), True), ((1, 1), True), ((4,), False)])
def test_a_right_factor_is_a_weight_if_it_is_one_matrix(tmp_path, batch, eligible):
    table = verify(tmp_path, [node("MatMul", "x", "w")], w=np.ones((*batch, 8, 6), "f4"))
    assert table[["eligible", "judged"]].values.tolist() == [[eligible, True]]


def attention(*more, scores="both", queries="q"):
    """Return self-attention without projections, with more in its scores."""
    return [
        helper.make_node("Relu", ["x"], ["q"]),
        helper.make_node("Relu", ["x"], ["k"]),
        helper.make_node("Reshape", [queries, "shape"], ["moved"]),
        helper.make_node("Mul", ["moved", "half"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "table"], ["by table"], name="positions"),
        helper.make_node("MatMul", ["q", "k"], ["content"], name="content"),
        *more,
        helper.make_node("Add", ["content", "by table"], ["both"]),
        helper.make_node("Softmax", [scores], ["y"]),
    ]


@pytest.mark.parametrize(
    ("changes", "eligible"),
    [
        ({}, False),
        ({"queries": "k"}, True),  # it is not multiplied by what content is multiplied by
        ({"scores": "content"}, True),  # and here it takes no part in the attention
    ],
)
def test_a_table_that_queries_are_multiplied_by_is_no_weight(tmp_path, changes, eligible):
    """As in HaloNet and BoTNet, whose relative positions have one table for all heads."""
    constants = {"table": np.ones((8, 6), "f4"), "half": np.float32(0.5),
                 "shape": np.int64([2, 4, 8])}  # fmt: skip
    table = verify(tmp_path, attention(**changes), **constants).set_index("node")
    assert table.eligible.to_dict() == {"positions": eligible, "content": False}
    assert table.judged.all()


def test_a_layer_before_a_softmax_is_a_weight(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), node("Softmax", "a")]
    assert verify(tmp_path, nodes, w=np.ones((8, 6), "f4")).eligible.tolist() == [True]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_constant_data_of_a_convolution_are_no_weight(tmp_path, op):
    table = verify(tmp_path, [node(op, "w", "x")], w=np.ones((1, 8, 4, 4), "f4"))
    assert table[["eligible", "judged"]].values.tolist() == [[False, True]]


# Weights that depend on the run.


def test_a_weight_that_is_chosen_at_run_time_is_not_judged(tmp_path):
    branches = {
        "then_branch": body([helper.make_node("Identity", ["w"], ["inner"])]),
        "else_branch": body([helper.make_node("Relu", ["w"], ["inner"])]),
    }
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["v"], **branches),
        helper.make_node("Where", ["c", "w", "x"], ["u"]),
        helper.make_node("MatMul", ["x", "v"], ["z"], name="by If"),
        helper.make_node("MatMul", ["z", "u"], ["y"], name="by Where"),
    ]
    table = verify(tmp_path, nodes, w=weight(8, 8))
    assert table.reason.tolist() == [f"{op} makes it of w at run time" for op in ("If", "Where")]
    assert table[["eligible", "judged"]].values.tolist() == [[False, False]] * 2


@pytest.mark.parametrize("groups", [1, 2])
def test_what_cannot_be_sparse_by_its_shape_needs_no_numbers(tmp_path, groups):
    unknown = helper.make_node("Unpack", ["w"], ["u"], domain="acme")
    nodes = [unknown, node("Conv", "x", "u", group=groups)]
    table = verify(tmp_path, nodes, w=weight(8, 4, 1, 1))
    assert table[["eligible", "judged"]].values.tolist() == [[False, groups == 2]]
    dequantise = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"])
    constants = {"w": quantised(weight(8, 4, 1, 1), 3), "s": np.float32(1), "z": np.int8(3)}
    table = verify(tmp_path, [dequantise, node("Conv", "x", "v", group=groups)], **constants)
    assert table[["eligible", "judged"]].values.tolist() == [[False, groups == 2]]


def test_a_scale_that_comes_at_run_time_is_not_judged(tmp_path):
    dequantise = helper.make_node("DequantizeLinear", ["w", "x"], ["v"])
    table = verify(tmp_path, [dequantise, node("Gemm", "x", "v")], w=quantised(weight(8, 8)))
    assert table.reason.tolist() == ["DequantizeLinear makes it of w at run time"]
    nodes = [node("DynamicQuantizeMatMul", "x", "w", "x", domain="com.microsoft")]
    table = verify(tmp_path, nodes, w=quantised(weight(8, 8)))
    assert table.reason.tolist() == ["its scale or zero point is computed at run time"]
    assert table.judged.tolist() == [False]


# Every type of number.


TYPES = [
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16,
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT32,
    TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT4E2M1,
]  # fmt: skip


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", TYPES, ids=TensorProto.DataType.Name)
def test_a_weight_of_any_type_is_read(tmp_path, kind, raw, sparse):
    values = weight(6, 8, 1, 1, sparse=sparse).astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor = numpy_helper.from_array(values, "w")
    assert tensor.data_type == kind
    if not raw:
        flat = values.astype(np.float32).ravel().tolist()
        tensor = helper.make_tensor("w", kind, values.shape, flat)
    table = verify_tensors(tmp_path, [node("Conv", "x", "w")], [tensor])
    assert table.is_2to4.tolist() == [sparse]
    assert table.zeros.tolist() == [50 if sparse else 0]


def test_negative_zeros_are_zeros(tmp_path):
    values = weight(6, 8, 1, 1)
    for dtype in (np.float16, np.float32):
        stored = np.where(values == 0, -0.0, values).astype(dtype)
        assert verify(tmp_path, [node("Conv", "x", "w")], w=stored).is_2to4.tolist() == [True]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.FLOAT8E4M3FN])
def test_a_small_type_is_dequantised(tmp_path, kind, sparse):
    values = weight(6, 8, sparse=sparse).astype(helper.tensor_dtype_to_np_dtype(kind))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["v"]),
        node("Gemm", "x", "v", transB=1),
    ]
    assert verify(tmp_path, nodes, w=values, scale=np.float32(0.5)).is_2to4.tolist() == [sparse]


@pytest.mark.parametrize("indices", ["flat", "by axis"])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_weight_stored_as_a_sparse_tensor_is_read(tmp_path, indices, sparse):
    values = weight(6, 8, sparse=sparse)
    places = np.flatnonzero(values) if indices == "flat" else np.argwhere(values)
    stored = helper.make_sparse_tensor(
        numpy_helper.from_array(values[values != 0], "w"),
        numpy_helper.from_array(places.astype(np.int64), "places"),
        values.shape,
    )
    gemm = node("Gemm", "x", "w", transB=1)
    as_constant = helper.make_node("Constant", [], ["w"], sparse_value=stored)
    assert verify(tmp_path, [as_constant, gemm]).is_2to4.tolist() == [sparse]
    assert verify_tensors(tmp_path, [gemm], [], [stored]).is_2to4.tolist() == [sparse]


@pytest.mark.parametrize(("attribute", "kind"), [("value_floats", float), ("value_ints", int)])
def test_a_constant_node_may_hold_a_list_of_numbers(tmp_path, attribute, kind):
    values = [kind(value) for value in (1, 0, 0, 2, 0, 0, 3, 4)]
    nodes = [helper.make_node("Constant", [], ["w"], **{attribute: values}), node("MatMul", *"xw")]
    assert verify(tmp_path, nodes).is_2to4.tolist() == [True]


# Bytes in other files.


def with_external_data(tmp_path, values):
    """Write a convolution whose weight lies in a file of its own, and return its path."""
    graph = helper.make_graph(
        [node("Conv", "x", "w")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
        [numpy_helper.from_array(values, "w")],
    )
    opset = helper.make_opsetid("", 21)
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[opset], ir_version=10),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    return path


@pytest.mark.parametrize("sparse", [True, False])
def test_external_data_is_read(tmp_path, sparse):
    path = with_external_data(tmp_path, weight(16, 8, 3, 3, sparse=sparse))
    assert (path.parent / "weights.bin").exists()
    assert verify_onnx(path).is_2to4.tolist() == [sparse]


def test_missing_or_truncated_external_data_is_reported_in_one_sentence(tmp_path):
    path = with_external_data(tmp_path, weight(16, 8, 3, 3))
    data = path.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:1000])
    assert refusal(path).startswith("The tensor w cannot be read: ")
    data.unlink()
    assert "weights.bin" in refusal(path)


# The weight is looked for behind other nodes.


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("op", "others", "attributes", "stored"),
    [
        ("Reshape", {"o": np.int64([6, 8, 1, 1])}, {}, (6, 8)),
        ("Unsqueeze", {"o": np.int64([2, 3])}, {}, (6, 8)),
        ("Squeeze", {"o": np.int64([0])}, {}, (1, 6, 8, 1, 1)),
        ("Expand", {"o": np.int64([6, 8, 3, 3])}, {}, (6, 8, 1, 1)),
        ("Mul", {"o": np.float32(0.5)}, {}, (6, 8, 1, 1)),
        ("Slice", {"o": np.int64([0]), "e": np.int64([6]), "a": np.int64([0])}, {}, (9, 8, 1, 1)),
    ],
)
def test_a_weight_is_computed_from_constants(tmp_path, op, others, attributes, stored, sparse):
    values = np.zeros(stored, np.float32)
    values[...] = weight(9, 8, sparse=sparse)[: 9 if op == "Slice" else 6].reshape(
        [size if size > 1 else 1 for size in stored]
    )
    nodes = [helper.make_node(op, ["w", *others], ["v"], **attributes), node("Conv", "x", "v")]
    table = verify(tmp_path, nodes, w=values, **others)
    assert table.weight.tolist() == ["w"]
    assert table["shape"][0][:2] == (6, 8)
    assert table.is_2to4.tolist() == [sparse]


def test_a_reshape_decides_what_the_groups_of_four_are(tmp_path):
    nodes = [helper.make_node("Reshape", ["w", "shape"], ["v"]), node("Conv", "x", "v")]
    shape = np.int64([6, 4, 2, 2])
    flat_pattern = weight(6, 16)  # all four channels are kept at two of the kernel's places
    assert not verify(tmp_path, nodes, w=flat_pattern, shape=shape).is_2to4.any()
    by_channel = weight(6, 4, 2, 2).reshape(6, 16)  # eight non-zeros in a row
    table = verify(tmp_path, nodes, w=by_channel, shape=shape)
    assert table["shape"].tolist() == [(6, 4, 2, 2)]
    assert table.is_2to4.tolist() == [True]


def test_a_weight_of_a_shape_computed_at_run_time_is_not_judged(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Reshape", ["w", "s"], ["v"]),
        node("Conv", "x", "v"),
    ]
    table = verify(tmp_path, nodes, w=weight(6, 8))
    assert table.reason.tolist() == ["Reshape makes it of w at run time"]
    assert table[["weight", "eligible", "judged"]].values.tolist() == [["w", False, False]]


@pytest.mark.parametrize("op", ["RandomNormal", "RandomNormalLike"])
def test_random_numbers_are_not_constant(tmp_path, op):
    inputs, attributes = ([], {"shape": [4, 4]}) if op == "RandomNormal" else (["w"], {})
    nodes = [helper.make_node(op, inputs, ["v"], **attributes), node("MatMul", "x", "v")]
    table = verify(tmp_path, nodes, w=weight(4, 4))
    assert table.reason.tolist() == ["the weight is computed at run time"]


def test_outputs_and_inputs_left_out_have_nothing_in_common(tmp_path):
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a", ""], kernel_shape=[1, 1]),
        helper.make_node("Clip", ["w", "", "high"], ["v"]),
        node("Conv", "a", "v"),
    ]
    table = verify(tmp_path, nodes, w=weight(6, 8, 1, 1), high=np.float32(5))
    assert table.is_2to4.tolist() == [True]


def test_an_operator_that_nobody_knows_is_named(tmp_path):
    nodes = [helper.make_node("Unpack", ["w"], ["v"], domain="acme"), node("Conv", "x", "v")]
    table = verify(tmp_path, nodes, w=weight(6, 8))
    assert table.reason.tolist() == ["Unpack before it cannot be evaluated"]
    assert table[["eligible", "judged"]].values.tolist() == [[False, False]]


# Bodies of control flow, and functions.


def body(nodes, output="inner", inputs=(), **initializers):
    return helper.make_graph(
        nodes,
        "body",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )


def product(name, factor, output="inner"):
    return helper.make_node("MatMul", ["x", factor], [output], name=name)


def test_both_branches_of_an_if_are_looked_into(tmp_path):
    right = np.ascontiguousarray(weight(8, 8).T)
    branches = {
        "then_branch": body([product("then", "outer")]),
        "else_branch": body([product("else", "w")], w=np.ones((8, 8), np.float32)),
    }
    nodes = [helper.make_node("If", ["condition"], ["y"], **branches)]
    table = verify(tmp_path, nodes, outer=right, condition=np.bool_(True))
    found = table.set_index("node")
    assert found.weight.to_dict() == {"then": "outer", "else": "w"}
    assert found.is_2to4.to_dict() == {"then": True, "else": False}


def test_a_weight_transposed_outside_a_loop_is_found_in_it(tmp_path):
    inputs = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []),
              ("state", TensorProto.FLOAT, None)]  # fmt: skip
    graph = body(
        [
            helper.make_node("Identity", ["go"], ["go on"]),
            helper.make_node("MatMul", ["state", "v"], ["inner"], name="constant"),
            helper.make_node("MatMul", ["state", "state"], ["unused"], name="computed"),
        ],
        inputs=inputs,
    )
    graph.output.insert(0, helper.make_tensor_value_info("go on", TensorProto.BOOL, []))
    nodes = [
        helper.make_node("Transpose", ["w"], ["v"]),
        helper.make_node("Loop", ["count", "", "x"], ["y"], body=graph),
    ]
    table = verify(tmp_path, nodes, w=weight(8, 8), count=np.int64(3))
    assert table.node.tolist() == ["constant", "computed"]
    assert table.is_2to4.tolist() == [True, False]
    assert table.reason.tolist() == ["", "the weight is computed at run time"]


def test_slices_of_a_constant_in_the_body_of_a_scan_are_not_judged(tmp_path):
    inputs = [("state", TensorProto.FLOAT, None), ("slice", TensorProto.FLOAT, None)]
    graph = body([helper.make_node("MatMul", ["state", "slice"], ["inner"])], inputs=inputs)
    nodes = [helper.make_node("Scan", ["x", "w"], ["y"], body=graph, num_scan_inputs=1)]
    table = verify(tmp_path, nodes, w=np.ones((3, 8, 8), np.float32))
    assert table.reason.tolist() == ["Scan makes it of w at run time"]
    assert table[["eligible", "judged"]].values.tolist() == [[False, False]]
    nodes = [helper.make_node("Scan", ["w", "x"], ["y"], body=graph, num_scan_inputs=1)]
    table = verify(tmp_path, nodes, w=np.ones((3, 8, 8), np.float32))
    assert table.reason.tolist() == ["the weight is computed at run time"]


def function(name, inputs, nodes, attributes=(), defaults=(), domain="local", opset=23):
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_function(
        domain, name, inputs, ["out"], nodes, opsets, list(attributes), list(defaults)
    )


@pytest.mark.parametrize("sparse", [True, False])
def test_a_weight_that_is_passed_to_a_function_is_found_in_it(tmp_path, sparse):
    linear = function("Linear", ["a", "b"], [
        helper.make_node("Transpose", ["b"], ["t"]),
        helper.make_node("MatMul", ["a", "t"], ["out"], name="inside"),
    ])  # fmt: skip
    nodes = [node("Linear", "x", "w", domain="local")]
    table = verify_tensors(
        tmp_path, nodes, [numpy_helper.from_array(weight(6, 8, sparse=sparse), "w")], (), [linear]
    )
    assert (table.node[0], table.weight[0], table["shape"][0]) == ("inside", "w", (6, 8))
    assert table.is_2to4.tolist() == [sparse]


def test_a_weight_that_a_function_returns_is_found_behind_the_call(tmp_path):
    flip = function("Flip", ["a"], [helper.make_node("Transpose", ["a"], ["out"])])
    nested = function("Nested", ["a"], [helper.make_node("Flip", ["a"], ["out"], domain="local")])
    nodes = [helper.make_node("Nested", ["w"], ["v"], domain="local"), node("Gemm", "x", "v")]
    table = verify_tensors(
        tmp_path, nodes, [numpy_helper.from_array(weight(6, 8), "w")], (), [flip, nested]
    )
    assert table.weight.tolist() == ["w"]
    assert table.is_2to4.tolist() == [True]


@pytest.mark.parametrize("given", [0, 1, None])
def test_a_function_takes_the_attributes_of_its_call(tmp_path, given):
    gemm = helper.make_node("Gemm", ["a", "b"], ["out"])
    gemm.attribute.append(
        onnx.AttributeProto(name="transB", type=onnx.AttributeProto.INT, ref_attr_name="flip")
    )
    default = helper.make_attribute("flip", 1)
    call = node("Linear", "x", "w", domain="local", **({} if given is None else {"flip": given}))
    table = verify_tensors(
        tmp_path,
        [call],
        [numpy_helper.from_array(weight(8, 8), "w")],
        (),
        [function("Linear", ["a", "b"], [gemm], defaults=[default])],
    )
    assert table.is_2to4.tolist() == [given != 0]


@pytest.mark.parametrize("opset", [14, 22, 23])
def test_a_function_may_be_written_for_another_opset(tmp_path, opset):
    """ONNX allows it where the function's operators are the same in both."""
    linear = function("Linear", ["a", "b"], [
        helper.make_node("Abs", ["b"], ["positive"]),
        helper.make_node("MatMul", ["a", "positive"], ["out"], name="inside"),
    ], opset=opset)  # fmt: skip
    stored = numpy_helper.from_array(-np.ascontiguousarray(weight(6, 8).T), "w")
    nodes = [node("Linear", "x", "w", domain="local")]
    table = verify_tensors(tmp_path, nodes, [stored], (), [linear])
    assert table[["node", "weight", "shape", "is_2to4"]].values.tolist() == [
        ["inside", "w", (6, 8), True]
    ]


def test_two_calls_of_a_function_have_their_own_weights(tmp_path):
    linear = function("Linear", ["a", "b"], [
        helper.make_node("Transpose", ["b"], ["t"]),
        helper.make_node("MatMul", ["a", "t"], ["out"], name="inside"),
    ])  # fmt: skip
    nodes = [
        helper.make_node("Linear", ["x", "sparse"], ["z"], domain="local"),
        helper.make_node("Linear", ["z", "dense"], ["y"], domain="local"),
    ]
    tensors = [
        numpy_helper.from_array(weight(8, 8), "sparse"),
        numpy_helper.from_array(weight(8, 8, sparse=False), "dense"),
    ]
    table = verify_tensors(tmp_path, nodes, tensors, (), [linear])
    assert table.weight.tolist() == ["sparse", "dense"]
    assert table.is_2to4.tolist() == [True, False]


@pytest.mark.parametrize("sparse", [True, False])
def test_a_function_may_be_called_in_a_body(tmp_path, sparse):
    flip = function("Flip", ["a"], [helper.make_node("Transpose", ["a"], ["out"])])
    call = helper.make_node("Flip", ["outer"], ["v"], domain="local")
    branches = {
        "then_branch": body([call, product("then", "v")]),
        "else_branch": body([helper.make_node("Identity", ["x"], ["inner"])]),
    }
    nodes = [helper.make_node("If", ["condition"], ["y"], **branches)]
    tensors = [
        numpy_helper.from_array(weight(6, 8, sparse=sparse), "outer"),
        numpy_helper.from_array(np.bool_(True), "condition"),
    ]
    table = verify_tensors(tmp_path, nodes, tensors, (), [flip])
    assert table.weight.tolist() == ["outer"]
    assert table.is_2to4.tolist() == [sparse]


def test_an_input_that_a_call_leaves_out_is_left_out(tmp_path):
    cut = function("Cut", ["a", "starts", "ends", "axes"], [
        helper.make_node("Slice", ["a", "starts", "ends", "axes"], ["out"]),
    ])  # fmt: skip
    nodes = [helper.make_node("Cut", ["w", "s", "e"], ["v"], domain="local"),
             node("Gemm", "x", "v", transB=1)]  # fmt: skip
    constants = {"w": weight(6, 8), "s": np.int64([0]), "e": np.int64([4])}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    table = verify_tensors(tmp_path, nodes, tensors, (), [cut])
    assert table["shape"].tolist() == [(4, 8)]
    assert table.is_2to4.tolist() == [True]


def test_a_function_that_calls_itself_is_refused(tmp_path):
    again = function("Again", ["a"], [helper.make_node("Again", ["a"], ["out"], domain="local")])
    with pytest.raises(HelpersError, match=r"/model\.onnx is not a valid ONNX"):
        verify_tensors(tmp_path, [node("Again", "x", domain="local")], [], (), [again])


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
    assert table.is_2to4.tolist() == [False, True, True]


def test_thousands_of_constants_in_a_row_are_computed(tmp_path):
    chain = [helper.make_node("Identity", [f"w{i}"], [f"w{i + 1}"]) for i in range(3000)]
    nodes = [*chain, node("MatMul", "x", "w3000")]
    assert verify(tmp_path, nodes, w0=weight(8, 8).T.copy()).is_2to4.tolist() == [True]


def test_functions_nested_too_deeply_are_reported_in_one_sentence(tmp_path):
    functions = [
        function(f"F{i}", ["a"], [helper.make_node(f"F{i + 1}", ["a"], ["out"], domain="local")])
        for i in range(1000)
    ]
    last = function("F1000", ["a"], [helper.make_node("Relu", ["a"], ["out"])])
    with pytest.raises(HelpersError, match=r"^The functions or bodies of \S+/model\.onnx are "):
        verify_tensors(tmp_path, [node("F0", "x", domain="local")], [], (), [*functions, last])


def test_a_long_network_is_not_nested(tmp_path):
    chain = [helper.make_node("Relu", [f"x{i}" if i else "x"], [f"x{i + 1}"]) for i in range(3000)]
    table = verify(tmp_path, [*chain, node("MatMul", "x3000", "w")], w=weight(8, 8).T.copy())
    assert table.is_2to4.tolist() == [True]


# Files that are no models.


def refusal(path):
    with pytest.raises(HelpersError) as error:
        verify_onnx(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"\x00", b"not an ONNX file", b"\x89PNG\r\n" * 100])
def test_a_file_that_is_not_a_model_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} is not a valid ONNX model: ")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_model_is_refused_in_one_sentence(tmp_path, share):
    verify(tmp_path, [node("Conv", "x", "w")], w=weight(64, 64, 3, 3))
    path = tmp_path / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(path).startswith(f"{path} is not a valid ONNX model: ")


def test_a_missing_file_is_reported_in_one_sentence(tmp_path):
    path = tmp_path / "model.onnx"
    assert refusal(path).startswith(f"{path} cannot be read: No such file")


def test_a_folder_is_refused_in_one_sentence(tmp_path):
    assert refusal(tmp_path)


def test_a_json_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "04_sparse_fp16.onnx.json"
    path.write_text('{"sha256": "abc"}')
    assert refusal(path)


# The weights themselves.


def test_a_weight_comes_with_its_numbers_output_channels_first(tmp_path):
    stored = np.arange(48, dtype=np.float32).reshape(8, 6)
    tensors = [numpy_helper.from_array(stored, "w"), numpy_helper.from_array(stored, "v")]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("ConvTranspose", ["a", "v"], ["b"], name="up"),
        helper.make_node("MatMul", ["b", "x"], ["c"], name="at run time"),
        helper.make_node("Unpack", ["w"], ["u"], domain="acme"),
        helper.make_node("Gemm", ["c", "u"], ["y"], name="unknown"),
    ]
    found = {each.node: each for each in node_weights(write(tmp_path, nodes, tensors))}
    assert list(found) == ["product", "up", "at run time", "unknown"]
    assert np.array_equal(found["product"].value, stored.T)
    assert found["product"].in_fours
    assert np.array_equal(found["up"].value, stored)
    assert not found["up"].in_fours
    assert found["at run time"].value is None
    assert found["at run time"].exempt == "the weight is computed at run time"
    assert (found["unknown"].value, found["unknown"].weight) == (None, "w")
    assert found["unknown"].why_not_judged == "Unpack before it cannot be evaluated"
    assert [each.input_axis for each in found.values()] == [0, None, None, None]
    assert [each.operand for each in found.values()] == ["w", "v", "x", "u"]


def test_external_data_is_checked_and_not_read(tmp_path):
    path = with_external_data(tmp_path, weight(16, 8, 3, 3))
    (tensor,) = load_onnx(path).graph.initializer
    assert tensor.data_location == TensorProto.EXTERNAL
    assert not tensor.raw_data
    (path.parent / "weights.bin").unlink()
    with pytest.raises(HelpersError, match=r"weights\.bin"):
        load_onnx(path)
