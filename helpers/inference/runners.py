"""Run a network through PyTorch, ONNX Runtime or TensorRT, behind one interface.

Explained in `06_infer_and_benchmark.ipynb`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from helpers.errors import UnavailableError
from helpers.files import shown
from helpers.inference import cuda_graphs
from helpers.inference.engine import find_builder
from helpers.inference.export import INPUT, OUTPUT
from helpers.inference.fold import fold_batch_norm
from helpers.machine import device
from helpers.metrics import Accuracy, accuracy


class RunnerError(UnavailableError):
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

    @abstractmethod
    def invalidate_output(self) -> None:
        """Overwrite the logits of the last run with NaN: a run that writes none is found out."""

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
    """PyTorch with batch norm folded, channels-last: FP16 on a GPU, FP32 on a CPU.

    On a GPU each batch size is captured in a CUDA graph when it is first loaded, with the
    fastest convolutions that cuDNN finds.

    Args:
        model: a network that torch.fx can trace; it is not changed.
        dtype: FP16 on a GPU and FP32 on a CPU unless it is given.
        compile: let `torch.compile` fuse the network's operators and try its kernels, which
            takes minutes for each batch size of a large network.

    Raises:
        InputError: the network cannot be traced.
        RunnerError: later on, it cannot be captured, or gives no single tensor.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        self.device = device()
        self.on_gpu = self.device.type == "cuda"
        self.dtype = dtype or (torch.float16 if self.on_gpu else torch.float32)
        self.compile = compile
        version = torch.__version__.partition("+")[0]
        self.name = f"PyTorch {version}, {self.device.type}" + ", compiled" * compile
        self.model = fold_batch_norm(model).to(
            self.device, self.dtype, memory_format=torch.channels_last
        )
        self.prepared: dict[torch.Size, Prepared] = {}
        if self.on_gpu:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @torch.inference_mode()
    def load(self, images: Tensor) -> None:
        layout = torch.channels_last if images.dim() == 4 else torch.preserve_format
        # A copy: a network may write into its input, which is the caller's.
        self.images = images.to(self.device, self.dtype, memory_format=layout, copy=True)
        if images.shape not in self.prepared:
            own = self.images.clone()  # a graph will always read from here
            # From the first call on: cuDNN keeps the kernel that it once took for a shape.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                self.prepared[images.shape] = self.prepare(own)
        if self.on_gpu:
            self.prepared[images.shape].images.copy_(self.images)
            torch.cuda.synchronize()

    def prepare(self, images: Tensor) -> "Prepared":
        """Return what runs images of one shape."""
        return self.made_ready(self.model, images)

    def made_ready(self, model: fx.GraphModule, images: Tensor) -> "Prepared":
        """Return a network compiled and captured for images of one shape, as this runner is to."""
        if self.compile:
            # A module of its own for each shape: torch.compile gives up on one that it has
            # compiled for eight shapes, and then runs it as it is.
            model = fx.GraphModule(model, copy.deepcopy(model.graph))
            mode = "max-autotune-no-cudagraphs" if self.on_gpu else "default"
            model = torch.compile(model, mode=mode, dynamic=False)
        if not self.on_gpu:
            return Prepared(model, images)
        try:
            graph, logits = cuda_graphs.capture(partial(model, images))
        except RuntimeError as error:
            raise RunnerError(
                f"{self.name}: the network cannot be prepared for {len(images)} images of shape "
                f"{tuple(images.shape[1:])} ({error}). Use a smaller batch if memory is short."
            ) from error
        return Prepared(model, images, graph, self._one_tensor(logits))

    def _one_tensor(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor):
            raise RunnerError(
                f"{self.name}: the network gives a {type(logits).__name__}, where a runner takes "
                "one tensor of logits. Wrap it in a module that returns one of its outputs."
            )
        return logits

    @torch.inference_mode()
    def run(self) -> None:
        ready = self.prepared[self.images.shape]
        if not self.on_gpu:
            self.logits = self._one_tensor(ready.network(self.images))
            return
        self.logits = ready.logits
        self.start.record()
        ready.graph.replay()
        self.end.record()
        self.end.synchronize()

    def fetch(self) -> Tensor:
        return self.logits.to("cpu", torch.float32, copy=True)

    @torch.inference_mode()
    def invalidate_output(self) -> None:
        self.logits.fill_(float("nan"))

    def gpu_seconds(self) -> float | None:
        return self.start.elapsed_time(self.end) / 1000 if self.on_gpu else None


class Prepared(NamedTuple):
    """A network that is ready for images of one shape; on a GPU with its CUDA graph."""

    network: Callable[[Tensor], Tensor]
    images: Tensor  # what the graph reads
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None  # what the graph writes


class OnnxRunner(Runner):
    """ONNX Runtime on the CPU.

    Args:
        path: an ONNX file with input `images` and output `logits`.

    Raises:
        RunnerError: the file is missing or ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path) -> None:
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
                f"{shown(path)} cannot be loaded by ONNX Runtime: {error}. "
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

    def invalidate_output(self) -> None:
        self.logits = np.full_like(self.logits, np.nan)


class TensorRTRunner(Runner):
    """A TensorRT or TensorRT-RTX engine on the GPU, with PyCUDA's buffers and stream.

    The engine runs in a CUDA graph. TensorRT-RTX makes its own; around TensorRT's engine
    PyTorch captures one, on PyCUDA's stream, since PyCUDA has no graphs.

    Args:
        path: an engine, built by the builder that `find_builder` finds here. Engines
            hold native code: load only files that you trust.
        graph: use a CUDA graph; without one the host launches every kernel.

    Raises:
        RunnerError: no GPU, no PyCUDA, or the engine is for another GPU or version; later
            on, it cannot be captured or does not take such images.
    """

    def __init__(self, path: Path, graph: bool = True) -> None:
        if reason := why_no_engine():
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
                f"{shown(path)} cannot be loaded by {builder.name} {builder.version} on this "
                "GPU: an engine runs only on the kind of GPU and the version it was built with. "
                "Run 05_build_engine.ipynb on this machine."
            )
        self.context = self._create_context(builder.name, graph)
        self.captures = graph and builder.name == "TensorRT"
        self.stream, self.start, self.end = cuda.Stream(), cuda.Event(), cuda.Event()
        self.torch_stream = torch.cuda.ExternalStream(self.stream.handle)
        self.shape: tuple[int, ...] | None = None
        self.buffers: dict[str, Any] = {}
        self.name = f"{builder.name} {builder.version}, {torch.cuda.get_device_name()}"

    def _create_context(self, builder: str, graph: bool) -> Any:
        if builder == "TensorRT" or not graph:
            return self.engine.create_execution_context()
        runtime_config = self.engine.create_runtime_config()
        runtime_config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self.engine.create_execution_context(runtime_config)

    def load(self, images: Tensor) -> None:
        if tuple(images.shape) != self.shape:
            self._prepare(tuple(images.shape))
        self.images[...] = images.numpy()
        self.cuda.memcpy_htod_async(self.buffers[INPUT], self.images, self.stream)
        self.stream.synchronize()

    def _prepare(self, shape: tuple[int, ...]) -> None:
        """Make buffers for images of a shape, and capture the engine with them."""
        self.shape, self.graph = None, None
        if not self.context.set_input_shape(INPUT, shape):
            raise RunnerError(
                f"{self.name}: the engine does not take images of shape {shape}; it was built "
                "for other sizes or a smaller largest batch. Build it with `batches` that cover "
                "this one."
            )
        self.images = self._bind(INPUT)
        self.logits = self._bind(OUTPUT)
        if self.captures:
            try:
                self.graph, _ = cuda_graphs.capture(self._enqueue, self.torch_stream)
            except RuntimeError as error:
                raise RunnerError(
                    f"{self.name}: the engine cannot be captured in a CUDA graph ({error}). "
                    "Run it with TensorRTRunner(path, graph=False)."
                ) from error
        self.shape = shape

    def _bind(self, name: str) -> np.ndarray:
        """Give a tensor memory on the GPU, and return page-locked memory for it on the host."""
        shape = tuple(self.context.get_tensor_shape(name))
        dtype = self.trt.nptype(self.engine.get_tensor_dtype(name))
        host = self.cuda.pagelocked_empty(shape, dtype)
        self.buffers[name] = self.cuda.mem_alloc(host.nbytes)  # frees the one before
        self.context.set_tensor_address(name, int(self.buffers[name]))
        return host

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise RunnerError(f"{self.name}: the engine refused to run; see the lines above.")

    def run(self) -> None:
        self.start.record(self.stream)
        if self.graph is None:
            self._enqueue()
        else:
            with torch.cuda.stream(self.torch_stream):
                self.graph.replay()
        self.end.record(self.stream)
        self.stream.synchronize()

    def fetch(self) -> Tensor:
        self.cuda.memcpy_dtoh_async(self.logits, self.buffers[OUTPUT], self.stream)
        self.stream.synchronize()
        return torch.from_numpy(self.logits.astype(np.float32))

    def invalidate_output(self) -> None:
        # All bits set is a NaN in FP16, BF16 and FP32.
        self.cuda.memset_d8_async(self.buffers[OUTPUT], 0xFF, self.logits.nbytes, self.stream)
        self.stream.synchronize()

    def gpu_seconds(self) -> float | None:
        return self.end.time_since(self.start) / 1000


def why_no_engine() -> str:
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
