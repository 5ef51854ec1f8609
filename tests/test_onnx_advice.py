import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from helpers.errors import InputError
from helpers.inference.export import export_onnx
from helpers.measurement.advice import advise
from helpers.measurement.onnx_advice import advise_onnx, onnx_products
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATASHEETS
from helpers.training import networks

RATES = Rates.from_datasheet(DATASHEETS["a100"])


@pytest.fixture(scope="module")
def model():
    return networks.create_model("resnext14_8x1d", 10).eval()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "net.onnx", (1, 28, 28))


@pytest.mark.parametrize("batch", [1, 64])
def test_a_file_and_its_model_multiply_the_same(model, path, batch):
    layers = advise(model, RATES, (1, 28, 28), batch=batch).layers
    products = onnx_products(path, {}, batch)
    sizes = [(p.m, p.n, p.k, p.groups) for p in products]
    assert sizes == list(layers[["m", "n", "k", "groups"]].itertuples(index=False, name=None))
    assert [p.is_matrix for p in products] == [
        each.startswith("1x1") or each == "linear" for each in layers.kind
    ]
    assert not any(p.is_2to4 for p in products)


@pytest.mark.parametrize("batch", [1, 64])
def test_the_advice_for_a_file_is_that_for_its_model(model, path, batch):
    of_model, of_file = (
        advise(model, RATES, (1, 28, 28), batch=batch),
        advise_onnx(path, RATES, batch=batch),
    )
    matrices = of_model.layers.sparse_ms.notna()
    np.testing.assert_allclose(of_file.layers.dense_ms, of_model.layers.dense_ms, rtol=0.3)
    np.testing.assert_allclose(
        of_file.layers.dense_ms[matrices], of_model.layers.dense_ms[matrices]
    )
    np.testing.assert_allclose(
        of_file.layers.sparse_ms[matrices], of_model.layers.sparse_ms[matrices]
    )
    assert of_file.rest_ms == pytest.approx(of_model.rest_ms, rel=0.5)
    assert of_file.batch == batch
    assert 1 <= of_file.speedup == pytest.approx(of_model.speedup, rel=0.05)


def write(path, nodes, tensors, shape):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )
    return path


def test_products_of_activations_have_macs_and_stay_dense(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="scores"),
    ]
    path = write(tmp_path / "net.onnx", nodes, {}, [2, 8, 32])
    (product,) = onnx_products(path, {})
    assert (product.node, product.macs, product.m, product.weight) == ("scores", 4096, None, "t")
    (row,) = advise_onnx(path, RATES).layers.to_dict("records")
    assert math.isnan(row["sparse_ms"])
    assert (row["gain"], row["reason"]) == (1, product.reason)


def test_sizes_that_do_not_follow_are_refused(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["z"]),
        helper.make_node("Cast", ["z"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "f"], ["y"], name="late"),
    ]
    path = write(tmp_path / "net.onnx", nodes, {"w": np.ones((8, 2), np.float32)}, [4, 8])
    with pytest.raises(InputError, match=r"The sizes of MatMul late of .*net\.onnx do not follow"):
        onnx_products(path, {})


def test_a_datatype_without_2to4_is_refused(path):
    with pytest.raises(InputError, match="There is no 2:4 in 'TF32'"):
        advise_onnx(path, RATES, datatype="TF32")


# Calibrated rates, which take a model in PyTorch and its file for the same.

CALIBRATED = Rates.calibrated("a100")


def zeros_file(path, nodes, weights, shape):
    """Write a file whose weights are zeros; its output has no shape."""
    initializers = [
        helper.make_tensor(
            name, TensorProto.FLOAT, size, b"\0" * 4 * torch.Size(size).numel(), True
        )
        for name, size in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture
def linear(tmp_path):
    return zeros_file(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        {"w": (1024, 4096)},
        ["batch", 1024],
    )


def test_a_matrix_product(linear):
    file = advise_onnx(linear, CALIBRATED, batch=2048)
    model = advise(nn.Linear(1024, 4096, bias=False), CALIBRATED, example=torch.zeros(2048, 1024))
    assert file.dense_ms == pytest.approx(model.dense_ms)
    assert file.speedup == pytest.approx(model.speedup)
    assert file.interval == pytest.approx(model.interval)
    assert file.layers.layer.tolist() == ["layer"]


def test_a_convolution_reads_each_pixel_once(tmp_path):
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], name="c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]
    )
    path = zeros_file(tmp_path / "c.onnx", [node], {"w": (512, 512, 3, 3)}, [8, 512, 28, 28])
    file = advise_onnx(path, CALIBRATED)
    convolution = nn.Conv2d(512, 512, 3, padding=1, bias=False)
    model = advise(convolution, CALIBRATED, (512, 28, 28), batch=8, rules="tensorrt")
    assert file.dense_ms == pytest.approx(model.dense_ms)
    assert file.speedup == pytest.approx(model.speedup)
    assert file.speedup > 1.1


def test_quantised_layers_count_as_layers(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], name="d"),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="layer"),
    ]
    path = zeros_file(tmp_path / "q.onnx", nodes, {"w": (1024, 4096), "s": ()}, [2048, 1024])
    advice = advise_onnx(path, CALIBRATED, datatype="INT8")
    assert advice.dense_ms == CALIBRATED.product_ms(2048, 4096, 1024, "INT8", sparse=False)
    assert advice.rest_ms == 0


def test_a_shape_that_is_not_given_is_asked_for(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    path = zeros_file(tmp_path / "o.onnx", [node], {"w": (64, 64)}, ["batch", "tokens", 64])
    with pytest.raises(InputError, match=r"leaves the shape of its input x .* open"):
        advise_onnx(path, CALIBRATED)
    given = advise_onnx(path, CALIBRATED, {"x": (2, 32, 64)})
    assert given.layers[["m", "n", "k"]].to_numpy().tolist() == [[64, 64, 64]]
