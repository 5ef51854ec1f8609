import json
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from helpers.errors import InputError
from helpers.inference import cuda_graphs, runners
from helpers.inference.engine import Builder, build_engine
from helpers.inference.errors import RunnerError
from helpers.inference.runners import OnnxRunner, TensorRTRunner, TorchRunner
from helpers.measurement.benchmark import check_outputs
from helpers.metrics import Accuracy, max_relative_error
from helpers.training.data import first_images
from helpers.tutorial.checks import check
from helpers.tutorial.settings import project_root

SHAPE = (1, 28, 28)
GAPS = {"fp32": 1e-5, "fp16": 1e-2}

needs_gpu = pytest.mark.skipif(bool(runners.why_no_engine()), reason=runners.why_no_engine() or "-")


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def reference(exported):
    """The logits of the exported network, in PyTorch and without any runner."""

    def logits(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return exported[0](x)

    return logits


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_torch_runner_gives_the_logits_of_the_network(exported, reference):
    runner = TorchRunner(exported[0])
    tolerance = GAPS["fp32" if runner.device.type == "cpu" else "fp16"]
    for batch in (1, 5):
        logits = runner(images(batch))
        assert logits.dtype == torch.float32
        assert logits.device.type == "cpu"
        assert max_relative_error(logits, reference(images(batch))) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_onnx_runner_gives_the_logits_of_the_network(exported, reference, precision):
    runner = OnnxRunner(exported[1][precision])
    assert runner.name.endswith(f"CPU, {precision.upper()}")
    assert runner.dtype == {"fp32": np.float32, "fp16": np.float16}[precision]
    for batch in (1, 5):
        logits = runner(images(batch))
        assert logits.dtype == torch.float32
        assert max_relative_error(logits, reference(images(batch))) < GAPS[precision]


def test_the_runners_load_no_library_that_is_not_used_yet():
    libraries = ("onnx", "onnxruntime", "pycuda", "tensorrt", "tensorrt_rtx")
    code = f"""
import sys
import helpers.inference.runners
print([name for name in {libraries} if name in sys.modules])
"""
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_file_without_logits_is_refused(tmp_path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"x\.onnx has no output `logits`, only y\. Export"):
        OnnxRunner(tmp_path / "x.onnx")


@pytest.mark.parametrize("kind", ["torch", "fp32", "fp16"])
def test_every_runner_is_right_on_fresh_images_with_its_results_invalidated(no_gpu, exported, kind):
    model, files = exported
    makers = {
        "torch": lambda: TorchRunner(model),
        "fp32": lambda: OnnxRunner(files["fp32"]),
        "fp16": lambda: OnnxRunner(files["fp16"]),
    }
    error = check_outputs(makers[kind](), model, SHAPE, batch=5)
    assert error < GAPS["fp16" if kind == "fp16" else "fp32"]


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_invalidated_logits_are_nan_until_the_next_run(no_gpu, exported, kind):
    model, files = exported
    runner = TorchRunner(model) if kind == "torch" else OnnxRunner(files["fp32"])
    logits = runner(images(2)).clone()
    runner.invalidate_output()
    assert runner.fetch().isnan().all()
    runner.run()
    assert torch.equal(runner.fetch(), logits)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_loading_running_and_fetching_are_three_steps(no_gpu, exported, reference, kind):
    model, files = exported
    runner = TorchRunner(model) if kind == "torch" else OnnxRunner(files["fp32"])
    runner.load(images(2))
    runner.run()
    first = runner.fetch()
    runner.load(images(3))
    assert torch.equal(runner.fetch(), first), "loading alone changes no result"
    runner.run()
    assert runner.fetch().shape == (3, 10)
    assert max_relative_error(first, reference(images(2))) < GAPS["fp32"]
    assert max_relative_error(runner.fetch(), reference(images(3))) < GAPS["fp32"]


def test_tensors_of_the_caller_are_not_shared(no_gpu):
    network = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Flatten())
    runner = TorchRunner(network)
    given = torch.tensor([[1.0, -2.0]])
    logits = runner(given)
    assert given.tolist() == [[1, -2]], "the network writes into a copy"
    given.zero_()
    runner.run()
    assert runner.fetch().tolist() == [[1, 0]], "and goes on with what was loaded"
    runner.invalidate_output()
    assert logits.tolist() == [[1, 0]]


def test_a_network_without_a_single_tensor_of_logits_is_refused(no_gpu):
    class Two(torch.nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match="returns a tuple, but a runner takes one tensor"):
        TorchRunner(Two())(torch.ones(1, 2))


def test_a_runner_evaluates_as_the_network_does(exported, reference, tiny_splits):
    x, labels = first_images(tiny_splits.test, 64)
    correct = int((reference(x).argmax(1) == labels).sum())
    assert OnnxRunner(exported[1]["fp32"]).evaluate(tiny_splits.test) == Accuracy(correct, 64)


def test_a_smaller_last_batch_is_filled_up_and_counted_once():
    shapes = []

    class Echo(TorchRunner):
        def load(self, images):
            shapes.append(tuple(images.shape))
            super().load(images)

    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    labels = torch.tensor([0, 1, 2, 0, 2])  # four of five are right
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    model = torch.nn.Identity()
    runner = Echo(model, torch.float32, device=torch.device("cpu"))
    assert runner.evaluate(batches) == Accuracy(4, 5)
    assert shapes == [(3, 3), (3, 3)]


def test_the_torch_runner_folds_batch_norm_in_a_copy(tiny_net):
    runner = TorchRunner(tiny_net.train())
    runner(images(2))
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in runner.model.modules())
    assert tiny_net.training
    assert all(p.dtype == torch.float32 for p in tiny_net.parameters())
    assert type(tiny_net[1]).__name__ == "BatchNorm2d"


@pytest.mark.parametrize("content", [None, b"", b"this is no model"])
def test_a_file_that_onnx_runtime_cannot_load_is_refused(tmp_path, content):
    path = tmp_path / "04_net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"04_net\.onnx cannot be loaded .*export_onnx"):
        OnnxRunner(path)


def test_without_a_gpu_an_engine_is_not_run_and_the_reason_is_one_sentence(no_gpu, tmp_path):
    with pytest.raises(RunnerError, match="No NVIDIA GPU was found") as raised:
        TensorRTRunner(tmp_path / "05_sparse.engine")
    assert "\n" not in str(raised.value)
    assert str(raised.value).count(". ") == 0


def test_with_a_gpu_and_without_pycuda_the_reason_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(RunnerError, match=r"PyCUDA does not load .*conda env create"):
        TensorRTRunner(tmp_path / "05_sparse.engine")


class FakeEvent:
    """PyCUDA's event; the fake GPU takes 5 ms for each execution."""

    def __init__(self, gpu: "FakeGpu") -> None:
        self.gpu = gpu

    def record(self, stream: SimpleNamespace) -> None:
        assert stream.handle == 7
        self.milliseconds = self.gpu.milliseconds

    def time_since(self, earlier: "FakeEvent") -> float:
        return self.milliseconds - earlier.milliseconds


class FakeGpu:
    """PyCUDA, TensorRT and an engine in one: device memory is an array for each address.

    It knows only the calls that the two interfaces document, and computes with PyTorch.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.memory, self.shape, self.address = model, {}, None, {}
        self.milliseconds = 0.0

    # PyCUDA: destination first, as memcpy does it.
    def pagelocked_empty(self, shape: tuple, dtype: type) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    def mem_alloc(self, nbytes: int) -> int:
        self.memory[address := 4096 * (len(self.memory) + 1)] = np.zeros(nbytes, np.uint8)
        return address

    def memcpy_htod_async(self, to: int, source: np.ndarray, stream: object) -> None:
        self.memory[to][:] = source.view(np.uint8).ravel()

    def memcpy_dtoh_async(self, to: np.ndarray, source: int, stream: object) -> None:
        to[...] = self.memory[source].view(to.dtype).reshape(to.shape)

    def memset_d8_async(self, to: int, byte: int, count: int, stream: object) -> None:
        self.memory[to][:count] = byte

    def Stream(self, flags: int = 0) -> SimpleNamespace:  # noqa: N802
        assert flags == 1, "it may not wait for the default stream"
        return SimpleNamespace(handle=7, synchronize=lambda: None)

    def Device(self, number: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(pci_bus_id=lambda: f"0000:0{number}:00.0")

    def Event(self) -> "FakeEvent":  # noqa: N802
        return FakeEvent(self)

    # TensorRT: builder's module, runtime, engine and context.
    class Logger:
        WARNING = "warning"

        def __init__(self, severity: str) -> None:
            assert severity == self.WARNING

    def Runtime(self, logger: Logger) -> "FakeGpu":  # noqa: N802
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> "FakeGpu | None":
        return self if plan == b"an engine" else None

    def create_execution_context(self) -> "FakeGpu":
        return self

    def get_tensor_dtype(self, name: str) -> type:
        return np.float16

    def nptype(self, dtype: type) -> type:
        return dtype

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        if shape[0] > 8:  # the largest batch of the engine's profile
            return False
        self.shape = shape if name == "images" else None
        return True

    def get_tensor_shape(self, name: str) -> tuple:
        return (self.shape[0], 10) if name == "logits" else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if stream_handle != 7:
            return False
        images = self.memory[self.address["images"]].view(np.float16).reshape(self.shape)
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(images).float()).half().numpy()
        self.memory[self.address["logits"]][:] = logits.view(np.uint8).ravel()
        self.milliseconds += 5
        return True


class FakeRtx(FakeGpu):
    """The same with TensorRT-RTX, whose contexts take a configuration."""

    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="the whole graph")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="at the first run")
    config = None

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_graph_strategy="disabled")

    def create_execution_context(self, config: SimpleNamespace | None = None) -> "FakeGpu":
        self.config = config
        return self


def install(gpu: FakeGpu, name: str, monkeypatch) -> None:
    """Let the fake be PyCUDA, PyTorch's GPU and the builder of that name."""
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: f"stream {handle}")
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    context = SimpleNamespace(device=gpu.Device(0))
    package = SimpleNamespace(driver=gpu, autoprimaryctx=context)
    for module, content in {
        "pycuda": package,
        "pycuda.driver": gpu,
        "pycuda.autoprimaryctx": context,
    }.items():
        monkeypatch.setitem(sys.modules, module, content)
    builder = Builder(name, gpu, "11.4", "the test says so")
    monkeypatch.setattr(runners, "find_builder", lambda: builder)


@pytest.fixture
def fake_gpu(exported, monkeypatch, captured) -> FakeGpu:
    gpu = FakeGpu(exported[0])
    install(gpu, "TensorRT", monkeypatch)
    return gpu


def test_the_tensorrt_runner_moves_images_and_logits_in_the_engines_type(
    fake_gpu, captured, reference, tmp_path
):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan)
    assert runner.name == "TensorRT 11.4, a fake GPU"
    for batch in (1, 5, 5, 2):
        logits = runner(images(batch))
        assert logits.dtype == torch.float32
        assert max_relative_error(logits, reference(images(batch))) < GAPS["fp16"]
    assert len(captured) == 3, "a graph is captured for each change of shape"


def test_notebook_06_drives_an_engine_by_hand(fake_gpu, reference, monkeypatch):
    """The cell is read from the notebook, since no notebook runs on a GPU here."""
    text = (project_root() / "notebooks" / "06_infer_and_benchmark.ipynb").read_text()
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    (source,) = [cell for cell in cells if cell.startswith("def run_by_hand(")]
    stream = fake_gpu.Stream(runners.NON_BLOCKING)
    monkeypatch.setattr(fake_gpu, "Stream", lambda: stream)
    shown = {"np": np, "check": check}
    exec(source, shown)
    logits = shown["run_by_hand"](fake_gpu, b"an engine", images(3).half().numpy())
    assert logits.dtype == np.float16
    assert max_relative_error(torch.from_numpy(logits).float(), reference(images(3))) < 1e-2


def test_without_a_graph_the_host_launches_the_engine(fake_gpu, captured, reference, tmp_path):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan, graph=False)
    assert max_relative_error(runner(images(2)), reference(images(2))) < GAPS["fp16"]
    assert not captured


@pytest.mark.parametrize("graph", [True, False])
def test_tensorrt_rtx_makes_its_graph_itself(
    exported, monkeypatch, captured, reference, tmp_path, graph
):
    rtx = FakeRtx(exported[0])
    install(rtx, "TensorRT-RTX", monkeypatch)
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan, graph=graph)
    assert max_relative_error(runner(images(2)), reference(images(2))) < GAPS["fp16"]
    assert not captured
    assert (rtx.config is not None) == graph
    if graph:
        assert rtx.config.cuda_graph_strategy == "the whole graph"
        strategy = rtx.config.dynamic_shapes_kernel_specialization_strategy
        assert strategy == "at the first run"


def test_another_gpu_than_pytorchs_is_refused(fake_gpu, tmp_path, monkeypatch):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(RunnerError, match=r"bound to the GPU 0000:00.* 0000:01.*CUDA_DEVICE=1"):
        TensorRTRunner(plan)


def test_the_launch_alone_is_timed(fake_gpu, tmp_path, monkeypatch):
    """To enter a stream takes the host longer than some engines take the GPU."""
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner, entered = TensorRTRunner(plan), []
    runner.load(images(1))

    def enter(stream: object) -> nullcontext:
        entered.append(getattr(runner.start, "at", None))
        return nullcontext()

    runner.start = FakeEvent(fake_gpu)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    runner.run()
    assert entered == [None], "the stream is entered once, before the start is recorded"


def test_an_invalidated_result_stays_until_the_engine_runs(fake_gpu, tmp_path):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan)
    logits = runner(images(3))
    runner.invalidate_output()
    assert runner.fetch().isnan().all()
    runner.run()
    assert torch.equal(runner.fetch(), logits)


def test_a_batch_that_the_engine_was_not_built_for_is_refused(fake_gpu, tmp_path):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan)
    logits = runner(images(2))
    with pytest.raises(InputError, match=r"does not take images of shape \(9, 1, 28, 28\)"):
        runner.load(images(9))
    assert torch.equal(runner(images(2)), logits), "what it takes it still runs"


def test_an_engine_that_cannot_be_captured_is_refused(fake_gpu, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    monkeypatch.setattr(cuda_graphs, "capture", fail)
    with pytest.raises(RunnerError, match=r"not permitted .*graph=False"):
        TensorRTRunner(plan)(images(1))


def test_the_tensorrt_runner_returns_the_gpu_time_of_the_last_run(fake_gpu, tmp_path):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan)
    for _ in range(3):
        runner(images(1))
        assert runner.gpu_seconds() == pytest.approx(0.005)


def test_a_cpu_runner_has_no_gpu_time(no_gpu, exported):
    for runner in (TorchRunner(exported[0]), OnnxRunner(exported[1]["fp32"])):
        runner(images(1))
        assert runner.gpu_seconds() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_the_gpus_time_is_part_of_the_time_that_the_host_sees(exported):
    runner = TorchRunner(exported[0])
    runner(images(64))
    start = time.perf_counter()
    runner.run()
    assert 0 < runner.gpu_seconds() < time.perf_counter() - start


def test_a_missing_engine_is_refused_by_name(fake_gpu, tmp_path):
    with pytest.raises(
        InputError, match=r"none\.engine cannot be read \(No such file.*build_engine"
    ):
        TensorRTRunner(tmp_path / "none.engine")


def test_an_engine_that_does_not_load_or_run_is_refused(fake_gpu, tmp_path, monkeypatch):
    plan = tmp_path / "05_sparse.engine"
    plan.write_bytes(b"of another version")
    with pytest.raises(RunnerError, match=r"05_sparse\.engine cannot be loaded by TensorRT 11\.4"):
        TensorRTRunner(plan)
    plan.write_bytes(b"an engine")
    runner = TensorRTRunner(plan)
    runner.load(images(1))
    monkeypatch.setattr(fake_gpu, "execute_async_v3", lambda _: False)
    with pytest.raises(RunnerError, match="refused to run"):
        runner.run()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_gives_the_logits_of_the_network_on_the_gpu(
    exported, reference, tmp_path, precision
):
    plan = tmp_path / "net.engine"
    build_engine(exported[1][precision], plan, SHAPE, (1, 4, 8))
    runner = TensorRTRunner(plan)
    for batch in (1, 5, 8, 1):
        logits = runner(images(batch))
        assert logits.shape == (batch, 10)
        # TF32 is allowed in an FP32 engine, and has the ten bits of FP16.
        assert max_relative_error(logits, reference(images(batch))) < GAPS["fp16"]


@pytest.mark.gpu
@needs_gpu
def test_an_engine_of_another_make_is_refused_on_the_gpu(tmp_path):
    (tmp_path / "05_x.engine").write_bytes(b"no engine at all" * 100)
    with pytest.raises(RunnerError, match=r"05_x\.engine cannot be loaded .*build_engine"):
        TensorRTRunner(tmp_path / "05_x.engine")
