"""Run a network through PyTorch, ONNX Runtime or TensorRT, behind one interface.

Explained in `06_infer_and_benchmark.ipynb`.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from helpers.artifacts import Artifacts
from helpers.checks import TutorialError
from helpers.engine import find_builder
from helpers.machine import device
from helpers.onnx_export import INPUT, OUTPUT, fold_batch_norm
from helpers.settings import relative
from helpers.training import Accuracy, accuracy


class RunnerError(TutorialError):
    """A runner is not available here, or its file cannot be used."""


class Runner(ABC):
    """One network, ready to infer.

    Calling a runner does all three parts of its work; the benchmark times the middle
    one alone, as TensorRT's own tool does.
    """

    name: str

    @abstractmethod
    def load(self, images: Tensor) -> None:
        """Bring images (N, C, H, W) to where the network computes, in its type."""

    @abstractmethod
    def run(self) -> None:
        """Infer the loaded images; return when the result is ready."""

    @abstractmethod
    def fetch(self) -> Tensor:
        """Return the logits (N, classes) of the last run as FP32 on the CPU."""

    def gpu_seconds(self) -> float | None:
        """Return how long the GPU computed in the last run, by CUDA events; None on a CPU."""
        return None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images (N, C, H, W)."""
        self.load(images)
        self.run()
        return self.fetch()

    def evaluate(self, loader: DataLoader) -> Accuracy:
        """Return the top-1 accuracy over a loader."""
        correct = total = 0
        for images, labels in tqdm(loader, desc=self.name, leave=False):
            part = accuracy(self(images), labels)
            correct, total = correct + part.correct, total + part.total
        return Accuracy(correct, total)


class TorchRunner(Runner):
    """PyTorch in eager mode with batch norm folded: FP16 on a GPU, FP32 on a CPU."""

    def __init__(self, model: nn.Module) -> None:
        self.device = device()
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.name = f"PyTorch {torch.__version__.partition('+')[0]}, {self.device.type}"
        self.model = fold_batch_norm(model).to(
            self.device, self.dtype, memory_format=torch.channels_last
        )
        if self.device.type == "cuda":
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def load(self, images: Tensor) -> None:
        self.images = images.to(self.device, self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(self) -> None:
        if self.device.type == "cpu":
            self.logits = self.model(self.images)
            return
        self.start.record()
        self.logits = self.model(self.images)
        self.end.record()
        self.end.synchronize()

    def fetch(self) -> Tensor:
        return self.logits.float().cpu()

    def gpu_seconds(self) -> float | None:
        if self.device.type == "cpu":
            return None
        return self.start.elapsed_time(self.end) / 1000


class OnnxRunner(Runner):
    """ONNX Runtime on the CPU.

    Args:
        path: an ONNX file with input `images` and output `logits`.

    Raises:
        RunnerError: the file is missing or ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        # Idle threads must not spin: they would slow whichever runner has its turn next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has a dozen classes without a common base
            raise RunnerError(
                f"{relative(path)} cannot be loaded by ONNX Runtime: {error}. "
                "Run 04_export_onnx.ipynb again."
            ) from error
        half = self.session.get_inputs()[0].type == "tensor(float16)"
        self.dtype = np.float16 if half else np.float32
        self.name = f"ONNX Runtime {ort.__version__}, CPU, {'FP16' if half else 'FP32'}"

    def load(self, images: Tensor) -> None:
        self.images = np.ascontiguousarray(images.numpy(), dtype=self.dtype)

    def run(self) -> None:
        (self.logits,) = self.session.run([OUTPUT], {INPUT: self.images})

    def fetch(self) -> Tensor:
        return torch.from_numpy(self.logits.astype(np.float32))


class TensorRTRunner(Runner):
    """A TensorRT or TensorRT-RTX engine on the GPU, with PyCUDA's buffers and stream.

    Args:
        path: an engine, built by the builder that `find_builder` finds here. Engines
            hold native code: load only files that you trust.

    Raises:
        RunnerError: no GPU, no PyCUDA, or the engine is for another GPU or version.
    """

    def __init__(self, path: Path) -> None:
        if reason := why_no_tensorrt():
            raise RunnerError(reason)
        import pycuda.autoprimaryctx  # noqa: F401  (the context that PyTorch uses as well)
        import pycuda.driver as cuda

        self.cuda = cuda
        builder = find_builder()
        trt = self.trt = builder.module
        self.logger = trt.Logger(trt.Logger.WARNING)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self.engine is None:
            raise RunnerError(
                f"{relative(path)} cannot be loaded by {builder.name} {builder.version} on this "
                "GPU: an engine runs only on the kind of GPU and the version it was built with. "
                "Run 05_build_engine.ipynb on this machine."
            )
        self.context = self.engine.create_execution_context()
        self.stream, self.start, self.end = cuda.Stream(), cuda.Event(), cuda.Event()
        self.buffers: dict[str, object] = {}
        self.name = f"{builder.name} {builder.version}, {torch.cuda.get_device_name()}"

    def load(self, images: Tensor) -> None:
        dtype = self.trt.nptype(self.engine.get_tensor_dtype(INPUT))
        host = self.cuda.pagelocked_empty(tuple(images.shape), dtype)
        host[...] = images.numpy()
        self.context.set_input_shape(INPUT, tuple(images.shape))
        self._bind(INPUT, host.nbytes)
        shape = tuple(self.context.get_tensor_shape(OUTPUT))
        self.logits = self.cuda.pagelocked_empty(
            shape, self.trt.nptype(self.engine.get_tensor_dtype(OUTPUT))
        )
        self._bind(OUTPUT, self.logits.nbytes)
        self.cuda.memcpy_htod_async(self.buffers[INPUT], host, self.stream)
        self.stream.synchronize()

    def _bind(self, name: str, nbytes: int) -> None:
        """Give a tensor device memory of its own; the old buffer is freed with its object."""
        self.buffers[name] = self.cuda.mem_alloc(nbytes)
        self.context.set_tensor_address(name, int(self.buffers[name]))

    def run(self) -> None:
        self.start.record(self.stream)
        if not self.context.execute_async_v3(self.stream.handle):
            raise RunnerError(f"{self.name}: the engine refused to run; see the lines above.")
        self.end.record(self.stream)
        self.stream.synchronize()

    def fetch(self) -> Tensor:
        self.cuda.memcpy_dtoh_async(self.logits, self.buffers[OUTPUT], self.stream)
        self.stream.synchronize()
        return torch.from_numpy(self.logits.astype(np.float32))

    def gpu_seconds(self) -> float | None:
        return self.end.time_since(self.start) / 1000


def network_files() -> dict[str, str]:
    """Return the artifacts that the best runner of this machine takes, dense and sparse."""
    if why_no_tensorrt():
        return {name: f"04_{name}_fp32.onnx" for name in ("dense", "sparse")}
    return {name: f"05_{name}.engine" for name in ("dense", "sparse")}


def find_runners(artifacts: Artifacts) -> dict[str, Runner]:
    """Return the dense and the sparse network on the best runner of this machine.

    TensorRT where a GPU and PyCUDA are, ONNX Runtime on the CPU elsewhere; both
    networks always run on the same one, in the same precision.

    Raises:
        ArtifactError: an engine or ONNX file is missing; names its notebook.
        RunnerError: an engine was built for another GPU or version.
    """
    runner = OnnxRunner if why_no_tensorrt() else TensorRTRunner
    return {name: runner(artifacts.require(file)) for name, file in network_files().items()}


def why_no_tensorrt() -> str:
    """Return in one sentence why engines cannot run on this machine; empty if they can."""
    if not torch.cuda.is_available():
        return (
            "No NVIDIA GPU was found, so engines can be built here but not run; "
            "ONNX Runtime and PyTorch run the same networks on the CPU instead."
        )
    try:
        import pycuda.driver  # noqa: F401
    except ImportError as error:
        return (
            f"PyCUDA does not load ({error}), so engines cannot be run; install it with "
            "`conda env create -f environment.yml` or `pip install '.[gpu]'`."
        )
    return ""
