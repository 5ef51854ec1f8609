import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers.inference.onnx_session import open_session
from helpers.inference.wide_groups import widen_groups_


def convolution(path, channels, out, groups, seed=0):
    """Write one grouped 3x3 convolution; return its model."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((out, channels // groups, 3, 3), dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", group=groups, pads=[1, 1, 1, 1])
    shape = ["n", channels, 5, 5]
    graph = helper.make_graph(
        [node],
        "grouped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", out, 5, 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return model


def groups_of(model):
    (node,) = model.graph.node
    (weight,) = model.graph.initializer
    group = next(item.i for item in node.attribute if item.name == "group")
    return group, tuple(weight.dims)


@pytest.mark.parametrize(
    ("channels", "out", "groups", "wide", "per_group"),
    [
        (128, 128, 32, 4, 32),  # four channels a group
        (96, 48, 8, 2, 48),  # a multiple of twelve cannot be 32
        (64, 32, 8, 2, 32),  # more channels in than out
        (32, 64, 4, 1, 32),
        (16, 16, 4, 1, 16),  # too few for one wide group
        (16, 32, 16, 1, 16),  # one channel in, two out: no depthwise kernel
    ],
)
def test_wider_groups_compute_the_same(tmp_path, channels, out, groups, wide, per_group):
    model = convolution(tmp_path / "narrow.onnx", channels, out, groups)
    assert widen_groups_(model) == ("conv",)
    assert groups_of(model) == (wide, (out, per_group, 3, 3))
    onnx.save(model, tmp_path / "wide.onnx")
    images = np.random.default_rng(1).standard_normal((2, channels, 5, 5), dtype=np.float32)
    before, after = (
        open_session(tmp_path / f"{name}.onnx").run(None, {"x": images})[0]
        for name in ("narrow", "wide")
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (64, 2), (32, 32)])
def test_wide_dense_and_depthwise_convolutions_stay_as_they_are(tmp_path, channels, groups):
    model = convolution(tmp_path / "net.onnx", channels, channels, groups)
    before = model.SerializeToString()
    assert widen_groups_(model) == ()
    assert model.SerializeToString() == before


def test_a_weight_of_two_convolutions_is_stored_once(tmp_path):
    model = convolution(tmp_path / "net.onnx", 16, 16, 4)
    second = model.graph.node.add()
    second.CopyFrom(model.graph.node[0])
    second.name = "second"
    second.input[0], second.output[0] = "y", "z"
    assert widen_groups_(model) == ("conv", "second")
    assert len(model.graph.initializer) == 1
