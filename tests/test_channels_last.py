from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from helpers import sparsity
from helpers.errors import HelpersError
from helpers.inference import channels_last
from helpers.inference.channels_last import rewrite_1x1_as_matmul
from helpers.inference.export import export_onnx
from helpers.inference.onnx_session import onnx_max_relative_error

SHAPE = (1, 28, 28)

GAPS = {"fp32": 1e-5, "fp16": 1e-2}


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


@pytest.fixture(params=["fp32", "fp16"])
def resnext_file(request, resnext_files) -> Path:
    return resnext_files[request.param]


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_a_pruned_network_is_the_same_as_products_and_still_2to4(resnext_file, tmp_path):
    products = rewrite_1x1_as_matmul(resnext_file, tmp_path / "products.onnx", SHAPE)
    error = onnx_max_relative_error(tmp_path / "products.onnx", resnext_file, images(3))
    assert error < GAPS[resnext_file.stem]

    before = sparsity.verify_onnx(resnext_file).set_index("node")
    after = sparsity.verify_onnx(tmp_path / "products.onnx").set_index("node")
    pointwise = before[before.eligible & before["shape"].map(lambda shape: shape[2:] == (1, 1))]
    assert list(products) == list(pointwise.index)
    assert len(products) > 5
    assert set(after.index) == set(before.index), "every product keeps its layer's name"
    assert set(after.op[list(products)]) == {"MatMul"}
    assert after.is_2to4[list(products)].all()
    assert list(after["shape"][list(products)]) == [shape[:2] for shape in pointwise["shape"]]
    others = [name for name in before.index if name not in products]
    assert after.loc[others].equals(before.loc[others])


def test_transposes_are_only_where_the_layout_changes(resnext_file, tmp_path):
    rewrite_1x1_as_matmul(resnext_file, tmp_path / "products.onnx", SHAPE)
    before, after = operators(resnext_file), operators(tmp_path / "products.onnx")
    grouped = before["Conv"] - 1 - after["MatMul"]  # what is left beside the stem
    # One after the stem, one before and one after each grouped convolution, one for the pooling.
    assert after["Transpose"] == 2 * grouped + 2
    assert after["Relu"] == before["Relu"]


def test_a_rewritten_file_takes_any_batch_and_holds_no_weight_twice(resnext_file, tmp_path):
    path = tmp_path / "products.onnx"
    rewrite_1x1_as_matmul(resnext_file, path, SHAPE)
    onnx.checker.check_model(path, full_check=True)
    for batch in (1, 5):
        assert onnx_max_relative_error(path, resnext_file, images(batch)) < GAPS[resnext_file.stem]
    assert path.stat().st_size < 1.05 * resnext_file.stat().st_size


def test_a_dense_network_is_rewritten_in_the_same_way(tiny_net, tmp_path):
    export_onnx(tiny_net.eval(), tmp_path / "dense.onnx", SHAPE)
    products = rewrite_1x1_as_matmul(tmp_path / "dense.onnx", tmp_path / "out.onnx", SHAPE)
    assert len(products) == 1
    assert not sparsity.verify_onnx(tmp_path / "out.onnx").set_index("node").is_2to4[products[0]]


def write_graph(path: Path, nodes: list, weights: dict, outputs: tuple[str, ...] = ("y",)) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, "h", "w"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    padding=st.sampled_from([{}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "VALID"}]),
)
def test_strides_and_bias_are_kept_at_every_size(tmp_path_factory, strides, size, bias, padding):
    folder = tmp_path_factory.mktemp("strided")
    weights = {"w": normal(6, 8, 1, 1), "b": normal(6)}
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    node = helper.make_node("Conv", inputs, ["y"], "conv", strides=strides, **padding)
    path = write_graph(folder / "in.onnx", [node], weights)
    assert rewrite_1x1_as_matmul(path, folder / "out.onnx", (8, *size)) == ("conv",)
    assert onnx_max_relative_error(folder / "out.onnx", path, torch.randn(3, 8, *size)) < 1e-5
    assert operators(folder / "out.onnx")["Conv"] == 0


def test_a_layer_without_a_sparse_product_stays_a_convolution(tmp_path):
    weights = {
        "grouped": normal(8, 4, 1, 1), "wide": normal(8, 8, 3, 3), "padded": normal(6, 8, 1, 1),
        "odd": normal(8, 6, 1, 1), "even": normal(8, 8, 1, 1),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "grouped"], ["a"], "grouped", group=2),
        helper.make_node("Conv", ["a", "wide"], ["b"], "wide", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "padded"], ["c"], "padded", pads=[1, 0, 0, 1]),
        helper.make_node("Conv", ["c", "odd"], ["d"], "odd"),
        helper.make_node("Add", ["even", "even"], ["computed"], "twice"),
        helper.make_node("Conv", ["d", "computed"], ["e"], "computed"),
        helper.make_node("Conv", ["e", "even"], ["y"], "even"),
    ]
    path = write_graph(tmp_path / "in.onnx", nodes, weights)
    assert rewrite_1x1_as_matmul(path, tmp_path / "out.onnx", (8, 5, 5)) == ("even",)
    assert operators(tmp_path / "out.onnx")["Conv"] == 5
    # "even" is used by another node too, so its convolution's form has to stay.
    assert {"even", "even_matrix"} <= {
        item.name for item in onnx.load(tmp_path / "out.onnx").graph.initializer
    }


def test_tensors_needed_in_both_layouts_exist_in_both(tmp_path):
    """A weight used twice, outputs on the way, a body that looks outside, a name that is taken."""
    body = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["inside"], "relu")],
        "body",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, [None] * 4)],
    )
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], ""),
        helper.make_node("Conv", ["a", "w"], ["c"], "second"),
        helper.make_node("If", ["yes"], ["d"], "if", then_branch=body, else_branch=body),
        helper.make_node("Add", ["c", "d"], ["e"], "mixed"),
        helper.make_node("Mul", ["c", "half"], ["f"], "scaled"),
        helper.make_node("Sub", ["f", "c_channels_last"], ["g"], "per_channel"),
        helper.make_node("Add", ["e", "g"], ["y"], "sum"),
    ]
    weights = {
        "w": normal(8, 8, 1, 1), "b": normal(8), "yes": np.array(True),
        "half": np.array(0.5, np.float32), "c_channels_last": normal(8, 1, 1),
    }  # fmt: skip
    path = write_graph(tmp_path / "in.onnx", nodes, weights, outputs=("y", "c", "a"))
    out = tmp_path / "out.onnx"
    assert rewrite_1x1_as_matmul(path, out, (8, 4, 6)) == ("a", "second")
    assert onnx_max_relative_error(out, path, torch.randn(2, 8, 4, 6)) < 1e-5
    names = [item.name for item in onnx.load(out).graph.initializer]
    assert sorted(names) == ["b", "c_channels_last", "half", "w_matrix", "yes"]


def test_a_wrong_product_is_refused_and_the_old_file_kept(exported, tmp_path, monkeypatch):
    (tmp_path / "out.onnx").write_bytes(b"the file of yesterday")
    real = channels_last._ChannelsLast._store
    monkeypatch.setattr(
        channels_last._ChannelsLast, "_store", lambda self, value, name: real(self, -value, name)
    )
    with pytest.raises(HelpersError, match=r"fp32\.onnx computes something else"):
        rewrite_1x1_as_matmul(exported[1]["fp32"], tmp_path / "out.onnx", SHAPE)
    assert (tmp_path / "out.onnx").read_bytes() == b"the file of yesterday"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_file_without_1x1_convolutions_is_refused(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    path = write_graph(tmp_path / "in.onnx", [node], {"w": normal(8, 8, 3, 3)})
    with pytest.raises(HelpersError, match=r"in\.onnx has no 1x1 convolution"):
        rewrite_1x1_as_matmul(path, tmp_path / "out.onnx", (8, 5, 5))
    assert not (tmp_path / "out.onnx").exists()


def test_an_old_file_is_refused_by_its_opset(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    path = write_graph(tmp_path / "in.onnx", [node], {"w": normal(8, 8, 1, 1)})
    model = onnx.load(path)
    model.opset_import[0].version = 9
    onnx.save(model, path)
    with pytest.raises(HelpersError, match="has opset 9"):
        rewrite_1x1_as_matmul(path, tmp_path / "out.onnx", (8, 5, 5))
