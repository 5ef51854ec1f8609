import json
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from helpers.errors import InputError
from helpers.files import json_text
from helpers.inference.export import export_onnx
from helpers.sparsity import prune_2to4_, sparsity_report, verify_onnx
from helpers.sparsity.onnx_prune import prune_onnx
from helpers.sparsity.onnx_report import onnx_report
from helpers.training import networks


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def save(path, nodes, tensors, inputs, opset=17):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_file_and_its_model_have_the_same_report(tmp_path, pruned):
    model = networks.create_model("resnext14_8x1d", 10).eval()
    if pruned:
        prune_2to4_(model)
    path = export_onnx(model, tmp_path / "net.onnx", (1, 28, 28))
    own, of_model = onnx_report(path), sparsity_report(model, (1, 28, 28))
    assert own.macs == of_model.layers.macs.sum()
    assert own.eligible_share == pytest.approx(of_model.macs_share)
    assert own.ceiling == pytest.approx(of_model.ceiling)
    assert own.weights.macs.tolist() == of_model.layers.macs.tolist()
    assert own.weights.eligible.tolist() == of_model.layers.eligible.tolist()
    assert own.weights.reason.tolist() == of_model.layers.reason.tolist()
    assert own.weights[own.weights.eligible].is_2to4.tolist() == [pruned] * 12
    assert own.weights.share.sum() == pytest.approx(100)
    assert "12 of 17 products can be sparse (tensorrt)" in own.summary
    assert "conv1.weight" in repr(own)


def test_products_of_activations_are_part_of_the_whole(tmp_path):
    nodes = [
        node("MatMul", "x q", "a"),
        node("Transpose", "a", "t", perm=[0, 2, 1]),
        node("MatMul", "a t", "s"),
        node("MatMul", "s a", "o"),
    ]
    path = save(
        tmp_path / "net.onnx", nodes, {"q": ones(32, 32)}, [("x", TensorProto.FLOAT, [2, 8, 32])]
    )
    report = onnx_report(path)
    assert report.weights.macs.tolist() == [2 * 8 * 32 * 32, 2 * 8 * 8 * 32, 2 * 8 * 8 * 32]
    assert report.weights.eligible.tolist() == [True, False, False]
    assert report.eligible_share == pytest.approx(100 * 32 / 48)
    assert report.ceiling == pytest.approx(1 / (1 - 32 / 48 / 2))


def test_arithmetic_that_is_not_known_is_named(tmp_path):
    nodes = [
        node("MatMul", "x w", "a"),
        node("NonZero", "a", "z"),
        node("Cast", "z", "f", to=TensorProto.FLOAT),
        node("Transpose", "f", "t"),
        node("MatMul", "t v", "y"),
    ]
    tensors = {"w": ones(8, 8), "v": ones(2, 8)}
    path = save(tmp_path / "net.onnx", nodes, tensors, [("x", TensorProto.FLOAT, [4, 8])])
    report = onnx_report(path)
    assert report.not_counted == {"MatMul": 1}
    assert "The arithmetic of 1 x MatMul is not known and not counted" in report.summary
    assert "?" in repr(report)
    assert report.facts()["not_counted"] == {"MatMul": 1}
    assert [(row["macs"], row["input_channels"]) for row in report.rows()] == [(256, 8), (None, 2)]
    assert json.loads(json_text(report.rows()))[1]["share"] is None


@pytest.mark.parametrize(
    ("op", "domain", "inputs", "attributes"),
    [
        ("TRT_FP8QuantizeLinear", "trt", "x s", {}),
        ("Gelu", "com.microsoft", "x", {}),
        ("FusedMatMul", "com.microsoft", "x q", {"alpha": 2.0}),
        ("FusedGemm", "com.microsoft", "x q", {"activation": "Relu"}),
    ],
)
def test_operators_of_other_domains_keep_the_shapes(tmp_path, op, domain, inputs, attributes):
    nodes = [node(op, inputs, "a", domain=domain, **attributes), node("MatMul", "a w", "y")]
    tensors = {"w": ones(8, 16), "q": ones(8, 8), "s": np.float32(1)}
    path = save(tmp_path / "net.onnx", nodes, tensors, [("x", TensorProto.FLOAT, [4, 8])])
    report = onnx_report(path)
    assert report.weights.macs.tolist()[-1] == 4 * 8 * 16
    assert report.not_counted == {}


def test_a_batch_without_a_size_is_one_and_other_sizes_have_to_be_given(tmp_path):
    tensors, nodes = {"w": ones(8, 8)}, [node("MatMul", "x w", "y")]
    path = save(tmp_path / "a.onnx", nodes, tensors, [("x", TensorProto.FLOAT, ["n", 8])])
    assert onnx_report(path).macs == 64
    assert onnx_report(path, batch=3).macs == 3 * 64
    assert onnx_report(path, shapes={"x": (5, 8)}).macs == 5 * 64
    path = save(tmp_path / "b.onnx", nodes, tensors, [("x", TensorProto.FLOAT, ["n", "t", 8])])
    with pytest.raises(InputError, match="leaves the shape of its input x"):
        onnx_report(path)
    assert onnx_report(path, shapes={"x": (2, 3, 8)}).macs == 6 * 64


def test_rules_ask_for_the_type_that_is_stored(tmp_path):
    nodes = [node("DequantizeLinear", "w s", "d"), node("MatMul", "x d", "y")]
    tensors = {"w": np.ones((48, 64), np.int8), "s": np.float32(1)}
    path = save(tmp_path / "net.onnx", nodes, tensors, [("x", TensorProto.FLOAT, [1, 48])])
    (reason,) = onnx_report(path, "cusparselt").weights.reason
    assert reason == "64 rows, 48 columns: not multiples of 32"
    assert onnx_report(path, "any").weights.eligible.tolist() == [True]
    with pytest.raises(InputError, match="There are no rules 'mine'"):
        onnx_report(path, "mine")
    assert onnx_report(path, exclude=["w"]).weights.reason.tolist() == ["excluded"]
    with pytest.raises(InputError, match="matches 'nothing'"):
        onnx_report(path, include=["nothing"])


def test_a_file_without_products_has_an_empty_report(tmp_path):
    path = save(tmp_path / "n.onnx", [node("Relu", "x", "y")], {}, [("x", TensorProto.FLOAT, [2])])
    report = onnx_report(path)
    assert report.weights.empty
    assert (report.macs, report.eligible_share, report.ceiling) == (0, 0, 1)
    assert repr(report).startswith("0 of 0 products can be sparse")


@pytest.mark.parametrize("channels", [6, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_report_prune_and_verify_give_the_same_reason(tmp_path, channels, groups):
    nodes = [
        node("DequantizeLinear", "w s z", "shifted"),
        node("Conv", "x shifted", "by zero point", group=groups),
        helper.make_node("Unpack", ["w"], ["hidden"], domain="acme"),
        node("Conv", "x hidden", "by plugin", group=groups),
        node("Conv", "x v", "v", group=groups),
    ]
    shape = (8, channels, 1, 1)
    tensors = {
        "w": np.ones(shape, np.int8), "s": np.float32(1), "z": np.int8(3), "v": ones(*shape),
    }  # fmt: skip
    inputs = [("x", TensorProto.FLOAT, [1, groups * channels, 4, 4])]
    nodes[-1].output[0] = "y"
    path = save(tmp_path / "net.onnx", nodes, tensors, inputs)
    table, report = verify_onnx(path), onnx_report(path).weights
    assert len(table) == 3
    assert report.reason.tolist() == table.reason.tolist()
    assert report.eligible.tolist() == table.eligible.tolist()
    can_be_sparse = groups == 1 and channels == 8
    assert table.judged.tolist() == [not can_be_sparse, groups > 1, True]
    if can_be_sparse:
        pruned = prune_onnx(path, tmp_path / "pruned.onnx").weights
        assert pruned.reason.tolist() == table.reason.tolist()
    else:
        with pytest.raises(InputError, match=re.escape(table.reason[0])):
            prune_onnx(path, tmp_path / "pruned.onnx")
