"""Run a model through PyTorch, ONNX Runtime or TensorRT, behind one interface.

Explained in `06_infer_and_benchmark.ipynb`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

from helpers import machine
from helpers.errors import InputError
from helpers.files import shown
from helpers.inference import cuda_graphs
from helpers.inference.cusparselt import half_type
from helpers.inference.engine import Builder, find_builder
from helpers.inference.errors import RunnerError
from helpers.inference.export import INPUT, OUTPUT
from helpers.inference.fold import fold_batch_norm
from helpers.inference.onnx_session import OnnxSession
from helpers.metrics import Accuracy, accuracy
from helpers.progress_bar import progress_bar

NON_BLOCKING = 1  # CUDA's flag CU_STREAM_NON_BLOCKING, for which PyCUDA has no name


class Runner(ABC):
    """One model, ready to infer.

    Calling a runner does all three parts of its work; the benchmark times the middle
    one alone, as TensorRT's own tool does.
    """

    name: str
    on_gpu = False  # where it computes

    @abstractmethod
    def load(self, images: Tensor) -> None:
        """Bring images (N, C, H, W) to where the model computes, in its type."""

    @abstractmethod
    def run(self) -> None:
        """Infer the loaded images; return when the result is ready."""

    @abstractmethod
    def fetch(self) -> Tensor:
        """Return the logits (N, classes) of the last run as FP32 on the CPU."""

    @abstractmethod
    def invalidate_output(self) -> None:
        """Overwrite the logits of the last run with NaN, to detect a run that writes none."""

    @property
    def running(self) -> str:
        """The name of the runner that infers the loaded images, where one chooses among others."""
        return self.name

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
        correct = total = largest = 0
        for images, labels in progress_bar(loader, desc=self.name):
            # Some runners prepare each shape of images, so a smaller last batch is filled up.
            largest = max(largest, len(images))
            repeated = images[-1:].expand(largest - len(images), *images.shape[1:])
            logits = self(torch.cat([images, repeated]))
            part = accuracy(logits[: len(labels)], labels)
            correct, total = correct + part.correct, total + part.total
        return Accuracy(correct, total)


def one_tensor(logits: Any, name: str) -> Tensor:
    """Return what a model returned, which must be one tensor; `name` is the runner's.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(logits, Tensor):
        raise InputError(
            f"{name}: the model returns a {type(logits).__name__}, but a runner takes "
            "one tensor of logits. Wrap the model in a module that returns one of its outputs."
        )
    return logits


@dataclass(frozen=True)
class CapturedModel:
    """A model captured in a CUDA graph for images of one shape."""

    graph: torch.cuda.CUDAGraph
    images: Tensor  # what the graph reads
    logits: Tensor  # what the graph writes


class TorchRunner(Runner):
    """PyTorch with batch norm folded, channels-last: 16 bits on a GPU, FP32 on a CPU.

    On a GPU each batch size is captured in a CUDA graph when it is first loaded, with the
    fastest convolutions that cuDNN finds.

    Args:
        model: a model that torch.fx can trace; it is not changed.
        dtype: on a GPU FP16, or BF16 on an H100 (`cusparselt.half_type`), and FP32 on a CPU
            unless given.
        compile: let `torch.compile` fuse the model's operators and try its kernels, which
            takes minutes for each batch size of a large model. On a CPU it also rearranges the
            weights once and for all (freezing).
        device: the GPU if there is one, unless given.

    Raises:
        InputError: the model cannot be traced; later on, it returns no single tensor.
        RunnerError: later on, it cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or machine.device()
        self.on_gpu = self.device.type == "cuda"
        self.dtype = dtype or (half_type(self.device) if self.on_gpu else torch.float32)
        self.compile = compile
        version = torch.__version__.partition("+")[0]
        self.name = f"PyTorch {version}, {self.device.type}"
        if compile:
            self.name += ", compiled"
        folded = fold_batch_norm(model).to(self.device, self.dtype)
        self.model = folded.to(memory_format=torch.channels_last)
        # By the shape of the images: captured on a GPU, a plain call on a CPU.
        self.ready: dict[torch.Size, CapturedModel | Callable[[Tensor], Tensor]] = {}
        if self.on_gpu:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @torch.inference_mode()
    def load(self, images: Tensor) -> None:
        layout = torch.channels_last if images.dim() == 4 else torch.preserve_format
        # A copy: a model may write into its input, which is the caller's.
        self.images = images.to(self.device, self.dtype, memory_format=layout, copy=True)
        if images.shape not in self.ready:
            own = self.images.clone()  # a graph will always read from here
            # From the first call on, since cuDNN keeps the kernel that it once chose for a shape.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                self.ready[images.shape] = self.prepare_for_shape(own)
        ready = self.ready[images.shape]
        if isinstance(ready, CapturedModel):
            ready.images.copy_(self.images)
            torch.cuda.synchronize()

    def prepare_for_shape(self, images: Tensor) -> CapturedModel | Callable[[Tensor], Tensor]:
        """Return what runs images of one shape."""
        if self.on_gpu:
            return self.capture_for_shape(self.model, images)
        compiled = self.compile_for_shape(self.model)
        if self.compile:
            from torch._inductor import config as inductor

            # Weights are frozen, that is rearranged, where this is set while they are traced.
            with inductor.patch(freezing=True):
                compiled(images)
        return compiled

    def compile_for_shape(self, model: fx.GraphModule) -> Callable[[Tensor], Tensor]:
        """Return the model as this runner calls it: compiled, or as it is."""
        if not self.compile:
            return model
        # A module of its own for each shape: torch.compile gives up on a module that it has
        # compiled for eight shapes, and then runs it as it is.
        own = fx.GraphModule(model, copy.deepcopy(model.graph))
        if self.on_gpu:
            return torch.compile(own, mode="max-autotune-no-cudagraphs", dynamic=False)
        return torch.compile(own, dynamic=False)

    def capture_for_shape(self, model: fx.GraphModule, images: Tensor) -> CapturedModel:
        """Return the model captured in a CUDA graph that reads these images."""
        try:
            compiled = self.compile_for_shape(model)
            graph, logits = cuda_graphs.capture(partial(compiled, images))
        except RuntimeError as error:
            cuda_graphs.raise_if_context_is_broken(error)
            raise RunnerError(
                f"{self.name}: the model cannot be prepared for {len(images)} images of shape "
                f"{tuple(images.shape[1:])} ({error}). Use a smaller batch if memory is short."
            ) from error
        return CapturedModel(graph, images, one_tensor(logits, self.name))

    @torch.inference_mode()
    def run(self) -> None:
        ready = self.ready[self.images.shape]
        if not isinstance(ready, CapturedModel):
            self.logits = one_tensor(ready(self.images), self.name)
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


class OnnxRunner(Runner):
    """ONNX Runtime on the CPU, a dense library: it multiplies by zeros as by any other number.

    Args:
        path: an ONNX file with one input and the output `logits`.

    Raises:
        InputError: the file is missing, has no such output, or ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path) -> None:
        self.session = OnnxSession(path)
        if OUTPUT not in self.session.outputs:
            raise InputError(
                f"{shown(path)} has no output `{OUTPUT}`, only {', '.join(self.session.outputs)}. "
                "Export the model again with export_onnx."
            )
        self.dtype = self.session.dtype
        precision = "FP16" if self.dtype == np.float16 else "FP32"
        self.name = f"ONNX Runtime {self.session.version}, CPU, {precision}"

    def load(self, images: Tensor) -> None:
        self.images = np.ascontiguousarray(images.numpy(), dtype=self.dtype)

    def run(self) -> None:
        (self.logits,) = self.session.run(self.images, [OUTPUT])

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

    PyCUDA is bound to one GPU, by default the first, and to the thread that imports it first.

    Raises:
        RunnerError: there is no GPU or no PyCUDA, PyCUDA uses another GPU than PyTorch, or the
            engine is for another GPU or version; later on, it cannot be captured.
        InputError: the file cannot be read; later on, the engine does not take such images.
    """

    on_gpu = True

    def __init__(self, path: Path, graph: bool = True) -> None:
        if reason := why_no_engine():
            raise RunnerError(reason)
        import pycuda.autoprimaryctx  # the context that PyTorch uses too
        import pycuda.driver as cuda

        # Both number the GPUs that this process may use in the same way.
        bound, used = pycuda.autoprimaryctx.device, cuda.Device(torch.cuda.current_device())
        if bound.pci_bus_id() != used.pci_bus_id():
            raise RunnerError(
                f"PyCUDA is bound to the GPU {bound.pci_bus_id()}, but PyTorch uses "
                f"{used.pci_bus_id()}. Set CUDA_DEVICE={torch.cuda.current_device()} before "
                "Python starts, or hide the other GPUs by CUDA_VISIBLE_DEVICES."
            )
        self.cuda = cuda
        loaded = load_engine(path, graph)
        self.trt, self.engine, self.context = loaded.builder.module, loaded.engine, loaded.context
        self.captures, self.name = loaded.captures, loaded.name
        # One that does not wait for the default stream, which nothing may use during a capture.
        self.stream, self.start, self.end = cuda.Stream(NON_BLOCKING), cuda.Event(), cuda.Event()
        self.torch_stream = torch.cuda.ExternalStream(self.stream.handle)
        self.shape: tuple[int, ...] | None = None
        self.buffers: dict[str, Any] = {}

    def load(self, images: Tensor) -> None:
        if tuple(images.shape) != self.shape:
            self._bind_shape(tuple(images.shape))
        self.images[...] = images.numpy()
        self.cuda.memcpy_htod_async(self.buffers[INPUT], self.images, self.stream)
        self.stream.synchronize()

    def _bind_shape(self, shape: tuple[int, ...]) -> None:
        """Make buffers for images of a shape, and capture the engine with them."""
        self.shape, self.graph = None, None
        if not self.context.set_input_shape(INPUT, shape):
            raise InputError(
                f"{self.name}: the engine does not take images of shape {shape}; it was built "
                "for other image sizes or batch sizes. Build it with `profile_batch_sizes` that "
                "cover this one."
            )
        self.images = self._bind(INPUT)
        self.logits = self._bind(OUTPUT)
        if self.captures:
            try:
                self.graph, _ = cuda_graphs.capture(self._enqueue, self.torch_stream)
            except RuntimeError as error:
                cuda_graphs.raise_if_context_is_broken(error)
                raise RunnerError(
                    f"{self.name}: the engine cannot be captured in a CUDA graph ({error}). "
                    "Run it with TensorRTRunner(path, graph=False)."
                ) from error
        self.shape = shape

    def _bind(self, name: str) -> np.ndarray:
        """Allocate GPU memory for a tensor; return page-locked memory of its size on the host."""
        shape = tuple(self.context.get_tensor_shape(name))
        dtype = self.trt.nptype(self.engine.get_tensor_dtype(name))
        host = self.cuda.pagelocked_empty(shape, dtype)
        self.buffers[name] = self.cuda.mem_alloc(host.nbytes)  # frees the one before
        self.context.set_tensor_address(name, int(self.buffers[name]))
        return host

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise RunnerError(
                f"{self.name}: the engine refused to run; see what TensorRT printed above."
            )

    def run(self) -> None:
        with torch.cuda.stream(self.torch_stream):  # before the start, so that it is not timed
            self.start.record(self.stream)
            if self.graph is None:
                self._enqueue()
            else:
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


@dataclass(frozen=True)
class LoadedEngine:
    """An engine on the GPU with what it needs to run."""

    name: str  # of the builder, its version and the GPU
    builder: Builder
    runtime: Any  # has to outlive the engine
    engine: Any
    context: Any
    captures: bool  # whether PyTorch has to capture the CUDA graph; TensorRT-RTX does it itself


def load_engine(path: Path, graph: bool = True) -> LoadedEngine:
    """Return an engine, loaded by the builder that `find_builder` finds here.

    Args:
        path: an engine. Engines hold native code: load only files that you trust.
        graph: use a CUDA graph.

    Raises:
        InputError: the file cannot be read.
        RunnerError: the engine is for another GPU or version.
    """
    try:
        plan = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{shown(path)} cannot be read ({error.strerror}). Build an engine with build_engine."
        ) from error
    builder = find_builder()
    trt = builder.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RunnerError(
            f"{shown(path)} cannot be loaded by {builder.name} {builder.version} on this "
            "GPU: an engine runs only on the kind of GPU and the version it was built with. "
            "Build it on this machine with build_engine."
        )
    if builder.name == "TensorRT" or not graph:
        context = engine.create_execution_context()
    else:
        runtime_config = engine.create_runtime_config()
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # The kernels of a shape are compiled when it first runs, not while it is being timed.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        context = engine.create_execution_context(runtime_config)
    name = f"{builder.name} {builder.version}, {torch.cuda.get_device_name()}"
    captures = graph and builder.name == "TensorRT"
    return LoadedEngine(name, builder, runtime, engine, context, captures)


def why_no_engine() -> str:
    """Return in one sentence why engines cannot run on this machine; empty if they can."""
    if not torch.cuda.is_available():
        return (
            "No NVIDIA GPU was found, so engines can be built here but not run; "
            "the 2:4 kernels, PyTorch and ONNX Runtime run the same models on the CPU instead."
        )
    try:
        import pycuda.driver  # noqa: F401
    except ImportError as error:
        return (
            f"PyCUDA does not load ({error}), so engines cannot be run; install it with "
            "`conda env create -f environment.yml` or `pip install '.[gpu]'`."
        )
    return ""
