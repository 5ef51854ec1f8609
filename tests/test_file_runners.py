import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from helpers.errors import InputError
from helpers.inference import file_runners, runners
from helpers.inference.engine import Builder
from helpers.inference.errors import EngineError, RunnerError
from helpers.inference.file_runners import (
    EngineFileRunner,
    OnnxFileRunner,
    load_inputs,
    random_inputs,
    why_no_engine_runs,
)
from helpers.sparsity.onnx_inputs import onnx_inputs

TYPES = {"x": TensorProto.FLOAT, "b": TensorProto.BFLOAT16, "i": TensorProto.INT64}


@pytest.fixture
def path(tmp_path):
    """A file with three inputs and four outputs of several types."""
    nodes = [
        helper.make_node("Identity", ["x"], ["sum"]),
        helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["i"], ["text"], to=TensorProto.STRING),
    ]
    outputs = {
        "sum": TensorProto.FLOAT, "wide": TensorProto.FLOAT, "narrow": TensorProto.BFLOAT16,
        "text": TensorProto.STRING,
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, [2, 3]) for name, kind in TYPES.items()],
        [helper.make_tensor_value_info(name, kind, [2, 3]) for name, kind in outputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def inputs(path):
    return onnx_inputs(onnx.load(path), path)


SHAPES = dict.fromkeys(TYPES, (2, 3))


def test_random_inputs_have_the_types_of_the_file(inputs):
    arrays = random_inputs(inputs, SHAPES)
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "x": "float32", "b": "bfloat16", "i": "int64",
    }  # fmt: skip
    assert {array.shape for array in arrays.values()} == {(2, 3)}
    assert set(arrays["i"].ravel()) <= {0, 1}
    assert len(set(arrays["x"].ravel())) == 6
    again = random_inputs(inputs, SHAPES)
    assert all((again[name] == array).all() for name, array in arrays.items())


def test_a_file_runs_with_any_types(path, inputs):
    arrays = random_inputs(inputs, SHAPES)
    runner = OnnxFileRunner(path, arrays)
    runner.run()
    outputs = runner.fetch()
    assert list(outputs) == ["sum", "wide", "narrow"]  # text is left out
    assert outputs["narrow"].dtype == torch.bfloat16
    np.testing.assert_array_equal(outputs["sum"], arrays["x"])
    np.testing.assert_array_equal(outputs["wide"], arrays["b"].astype(np.float32))
    assert runner.gpu_seconds() is None
    assert runner.name.startswith("ONNX Runtime ")


def test_inputs_of_the_wrong_shape_are_refused_by_the_file(path, inputs):
    arrays = random_inputs(inputs, dict.fromkeys(TYPES, (2, 4)))
    with pytest.raises(InputError, match=r"net\.onnx does not run in ONNX Runtime on these"):
        OnnxFileRunner(path, arrays).run()


def test_inputs_come_from_a_file(tmp_path):
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info("x", 1, [2])], [])
    inputs = onnx_inputs(helper.make_model(graph), tmp_path)
    np.savez(tmp_path / "x.npz", x=np.float32([1, 2]), more=np.zeros(3))
    assert load_inputs(tmp_path / "x.npz", inputs)["x"].tolist() == [1, 2]
    np.savez(tmp_path / "y.npz", y=np.float32([1, 2]))
    with pytest.raises(InputError, match=r"input x is missing in .*y\.npz; it must be float32"):
        load_inputs(tmp_path / "y.npz", inputs)
    np.savez(tmp_path / "z.npz", x=np.float64([1, 2]))
    with pytest.raises(InputError, match=r"input x is float64 in .*z\.npz"):
        load_inputs(tmp_path / "z.npz", inputs)
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("text.npz", "none.npz"):
        with pytest.raises(InputError, match=rf"{name} cannot be read as inputs"):
            load_inputs(tmp_path / name, inputs)


# --- engines, without a GPU ---


class FakeEngine:
    """TensorRT's module, runtime, engine and context in one; its engine doubles its input."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    names = ("x", "y")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.dtype, self.output_shape, self.refuses = "FLOAT", None, False

    class Logger:
        WARNING = "warning"

        def __init__(self, severity: str) -> None:
            pass

    def Runtime(self, logger: Logger) -> "FakeEngine":  # noqa: N802
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> "FakeEngine":
        return self

    def create_execution_context(self) -> "FakeEngine":
        return self

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.dtype)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.output_shape or self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuses:
            return False
        x, y = (
            np.ctypeslib.as_array(
                ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float)), self.shape
            )
            for name in self.names
        )
        y[...] = 2 * x
        return True


@pytest.fixture
def engine(monkeypatch, captured, gpu_clock, tmp_path) -> FakeEngine:
    fake = FakeEngine()
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
    builder = Builder("TensorRT", fake, "11.4", "the test says so")
    monkeypatch.setattr(runners, "find_builder", lambda: builder)
    (tmp_path / "net.engine").write_bytes(b"an engine")
    return fake


CPU = torch.device("cpu")
X = np.float32([[1, 2], [3, 4]])


@pytest.mark.parametrize("graph", [True, False])
def test_an_engine_runs_on_its_inputs(engine, tmp_path, captured, gpu_clock, graph):
    runner = EngineFileRunner(tmp_path / "net.engine", {"x": X}, graph, CPU)
    assert len(captured) == int(graph)
    assert runner.name == "TensorRT 11.4, a fake GPU"
    runner.outputs["y"].fill_(float("nan"))
    runner.run()
    np.testing.assert_array_equal(runner.fetch()["y"], 2 * X)
    assert runner.gpu_seconds() == 0


def test_an_engine_that_writes_nothing_leaves_nan(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "execute_async_v3", lambda self, stream: True)
    runner = EngineFileRunner(tmp_path / "net.engine", {"x": X}, False, CPU)
    runner.run()
    assert runner.fetch()["y"].isnan().all()


def test_what_an_engine_cannot_do_is_one_sentence(engine, tmp_path):
    plan = tmp_path / "net.engine"
    with pytest.raises(InputError, match=r"does not take x of shape \(9, 2\)"):
        EngineFileRunner(plan, {"x": np.zeros((9, 2), np.float32)}, device=CPU)
    engine.output_shape = (-1, 4)
    with pytest.raises(RunnerError, match="size of the output y depends on the numbers"):
        EngineFileRunner(plan, {"x": X}, device=CPU)
    engine.output_shape, engine.dtype = None, "FP4"
    with pytest.raises(RunnerError, match="output y is FP4, which PyTorch lacks"):
        EngineFileRunner(plan, {"x": X}, device=CPU)
    engine.dtype, engine.refuses = "FLOAT", True
    with pytest.raises(RunnerError, match=r"captured in a CUDA graph .*Run it without one"):
        EngineFileRunner(plan, {"x": X}, device=CPU)
    with pytest.raises(RunnerError, match="the engine refused to run"):
        EngineFileRunner(plan, {"x": X}, False, CPU).run()
    with pytest.raises(InputError, match=r"none\.engine cannot be read"):
        EngineFileRunner(tmp_path / "none.engine", {"x": X}, device=CPU)


def test_narrow_inputs_keep_their_bits():
    array = np.float32([1.5, -2]).astype(ml_dtypes.bfloat16)
    tensor = file_runners._tensor(array)
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [1.5, -2]


def test_why_no_engine_runs_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_no_engine_runs() == "No NVIDIA GPU was found, so no engine can run here."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    rtx = Builder("TensorRT-RTX", SimpleNamespace(), "1.7", "TensorRT does not load here")
    monkeypatch.setattr(file_runners, "find_builder", lambda: rtx)
    assert "builds no engines for compute capability 9.0" in why_no_engine_runs()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert why_no_engine_runs() == ""

    def missing() -> Builder:
        raise EngineError("no builder")

    monkeypatch.setattr(file_runners, "find_builder", missing)
    assert why_no_engine_runs() == "no builder"
