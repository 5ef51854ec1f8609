import numpy as np
import onnx
from int8_cases import PRODUCTS, images, residual_file
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_static

from helpers.inference.int8_placement import tensorrt_int8_faults, tensors_to_quantise
from helpers.inference.quantization import quantize_for_tensorrt


def test_the_second_branch_and_what_is_behind_a_relu_are_quantised(tmp_path):
    model = onnx.load(residual_file(tmp_path / "net.onnx"))
    assert tensors_to_quantise(model, PRODUCTS) == ("d", "sr", "jr")


def test_of_two_branches_the_longer_one_stays_float(tmp_path):
    model = onnx.load(residual_file(tmp_path / "net.onnx"))
    (join,) = (node for node in model.graph.node if node.name == "join")
    join.input[:] = ["d", "m"]
    nodes = list(model.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.name == "main")
    inner = helper.make_node("Abs", ["sr"], ["sa"], "longer")
    nodes[place].input[0] = "sa"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], inner, *nodes[place:]])
    assert tensors_to_quantise(model, PRODUCTS)[0] == "d"
    nodes[place].input[0] = "sr"
    nodes[place - 1].input[0] = "sa"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[: place - 1], inner, *nodes[place - 1 :]])
    assert tensors_to_quantise(model, PRODUCTS)[0] == "m"


def test_a_branch_that_something_else_reads_is_the_quantised_one(tmp_path):
    more = (helper.make_node("Abs", ["m"], ["other"], "other"),)
    model = onnx.load(residual_file(tmp_path / "net.onnx", more=more))
    assert tensors_to_quantise(model, PRODUCTS)[0] == "m"


def test_an_addition_of_a_constant_joins_no_branches(tmp_path):
    model = onnx.load(residual_file(tmp_path / "net.onnx"))
    (join,) = (node for node in model.graph.node if node.name == "join")
    join.input[1] = "main.b"
    assert tensors_to_quantise(model, PRODUCTS) == ("sr",)


def test_outputs_of_the_file_stay_float(tmp_path):
    more = (helper.make_node("Relu", ["logits"], ["out"], "last_relu"),)
    model = onnx.load(residual_file(tmp_path / "net.onnx", more=more))
    assert "out" not in tensors_to_quantise(model, PRODUCTS)


# --- the check ---


class Reader:
    """Calibration images as ONNX Runtime's own quantiser takes them."""

    def __init__(self):
        self.batches = iter([{"images": images()}])

    def get_next(self):
        return next(self.batches, None)


def by_onnxruntime(tmp_path, **options):
    source = residual_file(tmp_path / "net.onnx")
    quantize_static(source, tmp_path / "q.onnx", Reader(), per_channel=True, **options)
    return tensorrt_int8_faults(tmp_path / "q.onnx")


def test_files_by_the_defaults_of_onnxruntime_are_found_wanting(tmp_path):
    faults = by_onnxruntime(tmp_path, activation_type=QuantType.QUInt8)
    assert any("is of type UINT8 instead of INT8" in fault for fault in faults)
    assert any("The bias of Conv stem is quantised." in fault for fault in faults)


def test_asymmetric_numbers_are_found(tmp_path):
    faults = by_onnxruntime(tmp_path, extra_options={"QuantizeBias": False})
    assert any("The zero point of QuantizeLinear" in fault for fault in faults)


def test_without_the_downsample_branch_the_addition_is_found(tmp_path):
    options = {
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm"],
    }
    faults = by_onnxruntime(tmp_path, op_types_to_quantize=["Conv", "Gemm"], extra_options=options)
    assert faults == [
        "The branch d of Add join is not quantised.",
        "The result of Relu join_relu is not quantised.",
    ]


def test_quantised_outputs_of_convolutions_are_found(tmp_path):
    options = {"ActivationSymmetric": True, "QuantizeBias": False}
    faults = by_onnxruntime(tmp_path, extra_options=options)
    assert "Both branches of Add join are quantised." in faults


def test_a_file_without_quantisation_is_found(tmp_path):
    faults = tensorrt_int8_faults(residual_file(tmp_path / "net.onnx"))
    assert faults == ["No product has a quantised weight."]


def edited(tmp_path, change):
    """Return the faults of our own file after a change of its graph."""
    path = tmp_path / "q.onnx"
    quantize_for_tensorrt(residual_file(tmp_path / "net.onnx"), path, images())
    assert tensorrt_int8_faults(path) == []
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return tensorrt_int8_faults(path)


def named(graph, name):
    return next(node for node in graph.node if node.name == name)


def test_a_product_with_one_quantised_input_is_found(tmp_path):
    def change(graph):
        named(graph, "main").input[0] = "sr"

    faults = edited(tmp_path, change)
    assert "The input of Conv main is not quantised." in faults
    assert "The result of Relu stem_relu is not quantised." in faults


def test_a_product_that_should_be_in_int8_is_missed(tmp_path):
    path = tmp_path / "q.onnx"
    quantize_for_tensorrt(residual_file(tmp_path / "net.onnx"), path, images(), exclude=["down"])
    assert tensorrt_int8_faults(path) == []
    faults = tensorrt_int8_faults(path, expected=["down", "main"])
    assert faults == ["The weight of Conv down is not quantised."]


def test_a_missing_zero_point_and_a_bad_scale_are_found(tmp_path):
    def change(graph):
        quantiser = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        del quantiser.input[2]
        scale = next(each for each in graph.initializer if each.name == quantiser.input[1])
        scale.CopyFrom(numpy_helper.from_array(np.float32(0), scale.name))

    faults = edited(tmp_path, change)
    assert any("has no zero point, which gives its type" in fault for fault in faults)
    assert any("is not positive and finite" in fault for fault in faults)
