import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

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
    return networks.create_model("resnext14_8x4d", 10).eval()


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
