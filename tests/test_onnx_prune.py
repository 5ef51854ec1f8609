"""Prune a file, and compare what its nodes then see with what they saw before."""

import hashlib

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from helpers.errors import InputError, WriteError
from helpers.sparsity import verify_onnx
from helpers.sparsity.onnx_prune import prune_onnx


def random(*shape, dtype=np.float32, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return (values * 40 if np.dtype(dtype).kind in "iu" else values).astype(dtype)


def save(path, nodes, tensors, opset=17, functions=(), shape=None, **options):
    """Write a graph that computes y from x."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=10, functions=list(functions)
    )
    onnx.save(model, path, **options)
    return path


def node(op, inputs, output="y", **attributes):
    return helper.make_node(op, inputs.split(), [output], name=f"{op} {output}", **attributes)


def seen(path, name):
    """Return a constant of a file as ONNX Runtime computes it."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(helper.make_value_info(name, onnx.TypeProto()))
    needed, kept = {name}, []
    for each in reversed(model.graph.node):
        if needed & set(each.output):
            kept.insert(0, each)
            needed |= set(each.input)
    if not kept:
        return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(kept)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([name], {})[0]


def assert_pruned(before, after, axis):
    """Of every four along an axis, the two of the largest magnitude are there, the others zero."""
    before, after = (np.moveaxis(each.astype(np.float64), axis, -1) for each in (before, after))
    assert ((after == before) | (after == 0)).all()
    old, new = (np.sort(np.abs(each).reshape(-1, 4)) for each in (before, after))
    assert (new[:, :2] == 0).all()
    np.testing.assert_array_equal(new[:, 2:], old[:, 2:])


def prune(tmp_path, nodes, tensors, operand, axis, **options):
    source = save(tmp_path / "in.onnx", nodes, tensors, **options)
    before = source.read_bytes()
    result = prune_onnx(source, tmp_path / "out.onnx")
    assert source.read_bytes() == before
    assert_pruned(seen(source, operand), seen(tmp_path / "out.onnx", operand), axis)
    return result


SCALES = np.float32(np.linspace(0.01, 0.02, 16))

CASES = {
    "Conv": ([node("Conv", "x w")], {"w": random(16, 8, 3, 3)}, "w", 1),
    "MatMul": ([node("MatMul", "x w")], {"w": random(8, 16)}, "w", 0),
    "MatMul from the left": ([node("MatMul", "w x")], {"w": random(16, 8)}, "w", 1),
    "Gemm": ([node("Gemm", "x w")], {"w": random(8, 16)}, "w", 0),
    "Gemm, transposed": ([node("Gemm", "x w", transB=1)], {"w": random(16, 8)}, "w", 1),
    "Transpose": (
        [node("Transpose", "w", "t"), node("MatMul", "x t")], {"w": random(16, 8)}, "t", 0,
    ),
    "Reshape": (
        [node("Reshape", "w s", "t"), node("Conv", "x t")],
        {"w": random(16, 72), "s": np.int64([16, 8, 3, 3])}, "t", 1,
    ),
    "Slice": (
        [node("Slice", "w a b c", "t"), node("MatMul", "x t")],
        {"w": random(24, 16), "a": np.int64([4]), "b": np.int64([12]), "c": np.int64([0])}, "t", 0,
    ),
    "Cast": (
        [node("Cast", "w", "t", to=TensorProto.FLOAT), node("MatMul", "x t")],
        {"w": random(8, 16, dtype=np.float16)}, "t", 0,
    ),
    "scaled": (
        [node("Mul", "s w", "t"), node("MatMul", "x t")],
        {"w": random(8, 16), "s": SCALES}, "t", 0,
    ),
    "Q/DQ by channel": (
        [node("DequantizeLinear", "w s z", "t", axis=0), node("Conv", "x t")],
        {"w": random(16, 8, 1, 1, dtype=np.int8), "s": SCALES, "z": np.zeros(16, np.int8)}, "t", 1,
    ),
    "Q/DQ along the sums": (  # the scale decides which is larger
        [node("DequantizeLinear", "w s", "t", axis=0), node("MatMul", "x t")],
        {"w": random(16, 8, dtype=np.int8), "s": np.geomspace(0.01, 9, 16).astype(np.float32)},
        "t", 0,
    ),
    "Q/DQ, then transposed": (
        [
            node("DequantizeLinear", "w s", "d"), node("Transpose", "d", "t"),
            node("MatMul", "x t"),
        ],
        {"w": random(16, 8, dtype=np.int8), "s": np.float32(0.1)}, "t", 0,
    ),
    "quantised when loaded": (
        [
            node("QuantizeLinear", "w s z", "q"), node("DequantizeLinear", "q s z", "t"),
            node("MatMul", "x t"),
        ],
        {"w": random(8, 16), "s": np.float32(0.02), "z": np.int8(0)}, "t", 0,
    ),
    "Constant": (
        [
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(random(8, 16))),
            node("MatMul", "x w"),
        ],
        {}, "w", 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_two_largest_of_four_are_kept_where_they_are_stored(tmp_path, name):
    result = prune(tmp_path, *CASES[name])
    assert result.weights.pruned.tolist() == [True]
    assert result.changed > 0
    table = verify_onnx(tmp_path / "out.onnx")
    assert table[table.eligible].is_2to4.tolist() == [True]


@pytest.mark.parametrize("opset", [7, 9, 13, 18, 21, 23])
def test_every_opset_is_kept(tmp_path, opset):
    prune(tmp_path, *CASES["Conv"], opset=opset)
    assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [10, 13, 19])
def test_the_integers_of_a_quantised_convolution_are_pruned(tmp_path, opset):
    tensors = {
        "q": np.float32(0.1), "u": np.uint8(0), "w": random(16, 8, 1, 1, dtype=np.int8),
        "s": SCALES, "z": np.zeros(16, np.int8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x q u", "a"),
        node("QLinearConv", "a q u w s z q u", "b"),
        node("DequantizeLinear", "b q u"),
    ]
    prune(tmp_path, nodes, tensors, "w", 1, opset=opset)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.bfloat16])
def test_narrow_types_stay_in_their_type(tmp_path, dtype):
    values = (random(8, 16) * 3).astype(dtype)
    if dtype == ml_dtypes.bfloat16:
        nodes = [node("Cast", "w", "t", to=TensorProto.FLOAT)]
    else:
        nodes = [node("DequantizeLinear", "w s", "t")]
    tensors = {"w": values, "s": np.float32(0.5)}
    source = save(tmp_path / "in.onnx", [*nodes, node("MatMul", "x t")], tensors, opset=23)
    prune_onnx(source, tmp_path / "out.onnx")
    after = seen_initializer(tmp_path / "out.onnx", "w")
    assert after.dtype == values.dtype
    assert_pruned(values, after, 0)


def seen_initializer(path, name):
    model = onnx.load(path)
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


@settings(max_examples=60)
@given(
    moves=st.lists(st.sampled_from(["Transpose", "Reshape", "Cast", "Q", "Mul", "Identity"])),
    seed=st.integers(0, 99),
    op=st.sampled_from(["MatMul", "Gemm", "transposed"]),
)
def test_any_way_from_the_store_to_the_product_is_followed(tmp_path_factory, moves, seed, op):
    tmp_path = tmp_path_factory.mktemp("chain")
    shape, name, nodes = [8, 24], "w", []
    tensors = {"w": random(*shape, seed=seed), "s": np.float32(0.03), "z": np.int8(0)}
    for number, move in enumerate(moves):
        last, name = name, f"t{number}"
        if move == "Transpose":
            nodes.append(node("Transpose", last, name))
            shape.reverse()
        elif move == "Reshape":
            shape = [shape[0] // 2, shape[1] * 2] if shape[0] > 8 else [24, 8]
            tensors[f"shape{number}"] = np.int64(shape)
            nodes.append(node("Reshape", f"{last} shape{number}", name))
        elif move == "Cast":
            nodes += [
                node("Cast", last, f"{name}h", to=TensorProto.FLOAT16),
                node("Cast", f"{name}h", name, to=TensorProto.FLOAT),
            ]
        elif move == "Q":
            nodes += [
                node("QuantizeLinear", f"{last} s z", f"{name}q"),
                node("DequantizeLinear", f"{name}q s z", name),
            ]
        elif move == "Mul":
            nodes.append(node("Mul", f"{last} s", name))
        else:
            nodes.append(node("Identity", last, name))
    axis = int(op == "transposed")
    if shape[axis] % 4:
        return
    attributes = {"transB": 1} if axis else {}
    nodes.append(node("MatMul" if op == "MatMul" else "Gemm", f"x {name}", **attributes))
    source = save(tmp_path / "in.onnx", nodes, tensors)
    prune_onnx(source, tmp_path / "out.onnx")
    before, after = seen(source, name), seen(tmp_path / "out.onnx", name)
    before, after = (np.moveaxis(each, axis, -1).reshape(-1, 4) for each in (before, after))
    assert ((after == before) | (after == 0)).all()
    assert (np.count_nonzero(after, axis=1) <= 2).all()
    kept, largest = np.abs(after).sum(1), np.sort(np.abs(before))[:, 2:].sum(1)
    np.testing.assert_array_equal(kept, largest)


# --- tensors that several nodes use ---


def test_a_shared_weight_is_pruned_once(tmp_path):
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "b"), node("MatMul", "b w")]
    result = prune(tmp_path, nodes, {"w": random(16, 16)}, "w", 0)
    assert result.weights.pruned.tolist() == [True, True]
    assert result.changed == 128


def test_a_weight_along_two_axes_stays_dense_with_a_reason(tmp_path):
    nodes = [
        node("MatMul", "x w", "a"), node("Gemm", "a w", "b", transB=1), node("MatMul", "b v"),
    ]  # fmt: skip
    tensors = {"w": random(16, 16), "v": random(16, 16, seed=1)}
    result = prune(tmp_path, nodes, tensors, "v", 0)
    assert result.weights.pruned.tolist() == [False, False, True]
    assert result.weights.reason[0] == "MatMul a and Gemm b sum over different axes of w"
    np.testing.assert_array_equal(seen_initializer(tmp_path / "out.onnx", "w"), tensors["w"])


def test_a_table_that_is_looked_up_as_well_is_named(tmp_path):
    nodes = [
        node("Cast", "x", "i", to=TensorProto.INT64), node("Gather", "w i", "a"),
        node("Gemm", "a w", transB=1),
    ]  # fmt: skip
    result = prune(tmp_path, nodes, {"w": random(32, 16)}, "w", 1)
    assert result.weights.also_used_by.tolist() == [("Gather Gather a",)]
    assert "also used by" in str(result)


def test_weights_in_bodies_and_arguments_of_functions_are_pruned(tmp_path):
    function = helper.make_function(
        "local", "Product", ["a", "b"], ["c"], [node("MatMul", "a b", "c")],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    branch = helper.make_graph(
        [node("MatMul", "x v", "r")],
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(random(16, 16, seed=2), "v")],
    )
    nodes = [
        helper.make_node("If", ["c"], ["z"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("Product", ["z", "w"], ["y"], name="call", domain="local"),
    ]
    tensors = {"c": np.bool_(True), "w": random(16, 16)}
    source = save(tmp_path / "in.onnx", nodes, tensors, functions=[function])
    result = prune_onnx(source, tmp_path / "out.onnx")
    assert result.weights.pruned.tolist() == [True] * 3
    table = verify_onnx(tmp_path / "out.onnx")
    assert table.is_2to4.tolist() == [True] * 3


# --- what stays dense ---


@pytest.mark.parametrize(
    ("nodes", "tensors", "reason"),
    [
        ([node("Conv", "x w", group=2)], {"w": random(8, 4, 1, 1)}, "grouped"),
        ([node("Conv", "x w")], {"w": random(8, 3, 1, 1)}, "3 input channels"),
        ([node("Add", "w b", "t"), node("MatMul", "x t")],
         {"w": random(8, 16), "b": random(16)}, "it is computed by Add"),
        ([node("Expand", "w s", "t"), node("MatMul", "x t")],
         {"w": random(1, 16), "s": np.int64([8, 16])}, "it is computed by Expand"),
        ([node("DequantizeLinear", "w s z", "t"), node("MatMul", "x t")],
         {"w": random(8, 16, dtype=np.int8), "s": np.float32(1), "z": np.int8(3)}, "zero point"),
        ([node("Relu", "x")], {}, "multiplies by no weight"),
    ],
)  # fmt: skip
def test_a_file_without_a_weight_to_prune_is_refused(tmp_path, nodes, tensors, reason):
    source = save(tmp_path / "in.onnx", nodes, tensors)
    with pytest.raises(InputError, match=reason):
        prune_onnx(source, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_rules_and_patterns_choose(tmp_path):
    tensors = {"stem": random(8, 4, 1, 1), "head": random(8, 8, 1, 1)}
    nodes = [node("Conv", "x stem", "a"), node("Conv", "a head")]
    source, target = save(tmp_path / "in.onnx", nodes, tensors), tmp_path / "out.onnx"

    def pruned(*arguments, **options):
        return prune_onnx(source, target, *arguments, **options).weights.pruned.tolist()

    assert pruned() == [True, True]
    assert pruned(exclude=["stem"]) == [False, True]
    assert pruned(include=["Conv a"]) == [True, False]
    assert pruned("any", include=["s*", "h*"], exclude=["h*"]) == [True, False]
    with pytest.raises(InputError, match=r"No weight or node of .*in\.onnx matches 'neck'"):
        pruned(exclude=["neck"])
    with pytest.raises(InputError, match="There are no rules 'nobodys'"):
        pruned("nobodys")
    with pytest.raises(InputError, match=r"rules 'asp' \(stem: 4 input channels"):
        pruned("asp")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_diverged_is_named_and_nothing_written(tmp_path, value):
    weight = random(8, 16)
    weight[3, 3] = value
    source = save(tmp_path / "in.onnx", [node("MatMul", "x weight")], {"weight": weight})
    with pytest.raises(InputError, match="weight"):
        prune_onnx(source, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


# --- files ---


def test_numbers_that_are_stored_one_by_one_are_replaced(tmp_path):
    source = save(tmp_path / "in.onnx", [node("MatMul", "x w")], {})
    model = onnx.load(source)
    weight = random(8, 16)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel())
    assert tensor.float_data
    model.graph.initializer.append(tensor)
    onnx.save(model, source)
    prune_onnx(source, tmp_path / "out.onnx")
    assert_pruned(weight, seen_initializer(tmp_path / "out.onnx", "w"), 0)


@pytest.mark.parametrize("size", [16, 256])
def test_external_data_are_written_beside_the_copy(tmp_path, size):
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {"w": random(size, size), "v": random(size, size, seed=1), "b": random(size)}
    nodes = [node("Gemm", "x w b", "a"), node("MatMul", "a v")]
    source = save(
        folder / "in.onnx", nodes, tensors, save_as_external_data=True, location="weights",
        size_threshold=0,
    )  # fmt: skip
    before = {path.name: hashlib.sha256(path.read_bytes()) for path in folder.iterdir()}
    target = tmp_path / "copy" / "out.onnx"
    prune_onnx(source, target, include=["w"])
    assert sorted(path.name for path in target.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    after = {path.name: hashlib.sha256(path.read_bytes()) for path in folder.iterdir()}
    assert {k: v.digest() for k, v in before.items()} == {k: v.digest() for k, v in after.items()}
    (folder / "weights").unlink()
    assert_pruned(tensors["w"], seen_initializer(target, "w"), 0)
    np.testing.assert_array_equal(seen_initializer(target, "v"), tensors["v"])
    np.testing.assert_array_equal(seen_initializer(target, "b"), tensors["b"])
    onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])


def test_the_file_and_its_external_data_are_never_written_over(tmp_path):
    source = save(
        tmp_path / "in.onnx", [node("MatMul", "x w")], {"w": random(64, 64)},
        save_as_external_data=True, location="out.onnx.data",
    )  # fmt: skip
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    for target in (source, link, tmp_path / "out.onnx", tmp_path / "out.onnx.data"):
        with pytest.raises(InputError, match="belongs to the file to read"):
            prune_onnx(source, target)


def test_data_of_another_file_are_not_written_over(tmp_path):
    source = save(
        tmp_path / "in.onnx", [node("MatMul", "x w")], {"w": random(64, 64)},
        save_as_external_data=True, location="weights",
    )  # fmt: skip
    (tmp_path / "out.onnx.data").write_text("of somebody else")
    with pytest.raises(InputError, match=r"out\.onnx\.data exists, where the external data"):
        prune_onnx(source, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").read_text() == "of somebody else"


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    source = save(tmp_path / "in.onnx", [node("MatMul", "x w")], {"w": random(8, 16)})
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="could not be written"):
        prune_onnx(source, tmp_path / "file" / "out.onnx")


def test_a_pruned_file_is_left_as_it_is(tmp_path):
    prune(tmp_path, *CASES["Conv"])
    again = prune_onnx(tmp_path / "out.onnx", tmp_path / "again.onnx")
    assert again.is_unchanged
    assert again.weights.kept.tolist() == [100]
    assert seen(tmp_path / "again.onnx", "w").tolist() == seen(tmp_path / "out.onnx", "w").tolist()
