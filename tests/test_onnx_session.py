import onnx
import pytest
import torch
from onnx import TensorProto, helper

from helpers.errors import InputError
from helpers.inference.onnx_session import OnnxSession, onnx_max_relative_error


def test_images_that_a_file_does_not_take_are_refused_by_shape(exported):
    path = exported[1]["fp32"]
    with pytest.raises(InputError, match=r"fp32\.onnx does not run .* \(2, 3, 8, 8\)"):
        onnx_max_relative_error(path, path, torch.randn(2, 3, 8, 8))


def test_a_file_is_run_by_as_many_threads_as_pytorch(exported, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    session = OnnxSession(exported[1]["fp32"])
    assert session.session.get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_two_files_of_one_model_differ_by_rounding(exported, precision, error):
    files, images = exported[1], torch.randn(3, 1, 28, 28)
    assert onnx_max_relative_error(files[precision], files["fp32"], images) < error
    if precision == "fp32":
        assert onnx_max_relative_error(files["fp32"], files["fp32"], images) == 0


def test_a_file_with_two_inputs_is_refused(tmp_path):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["logits"])], "g", inputs, [output]
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"x\.onnx has 2 inputs"):
        OnnxSession(tmp_path / "x.onnx")
