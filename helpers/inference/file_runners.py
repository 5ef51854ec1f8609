"""Run any ONNX file, or the engine built from it: any number of inputs and outputs, any type.

`helpers.inference.runners` is for the models of the course, which take one batch of images and
return logits. Used by `python -m helpers benchmark` for a file of your own (docs/cli.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers import machine
from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.inference import cuda_graphs
from helpers.inference.engine import RTX_COMPUTE_CAPABILITIES, find_builder
from helpers.inference.errors import EngineError, RunnerError
from helpers.inference.onnx_session import open_session
from helpers.inference.runners import load_engine
from helpers.sparsity.onnx_inputs import OnnxInput, Shape

Inputs = Mapping[str, np.ndarray]


def random_inputs(
    inputs: Sequence[OnnxInput], shapes: Mapping[str, Shape], seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random numbers for the inputs of a file, by their names.

    Floating-point numbers are normally distributed. Integers are 0 or 1: both are valid as
    tokens, masks and indices of most models.

    Args:
        inputs: as `helpers.sparsity.onnx_inputs.onnx_inputs` returns them.
        shapes: of all of them, as `complete_shapes` returns them.
        seed: of the random numbers.

    Raises:
        InputError: an input holds text.
    """
    generator = np.random.default_rng(seed)
    arrays = {}
    for item in inputs:
        if item.dtype == object:
            raise InputError(f"The input {item} holds text. Give real inputs from a file.")
        shape = shapes[item.name]
        if np.issubdtype(item.dtype, np.integer) or item.dtype == bool:
            arrays[item.name] = np.asarray(generator.integers(2, size=shape)).astype(item.dtype)
        else:  # NumPy does not count BF16 and FP8 among its floating-point types
            numbers = generator.standard_normal(shape, dtype=np.float32)
            arrays[item.name] = np.asarray(numbers).astype(item.dtype)
    return arrays


def load_inputs(path: Path, inputs: Sequence[OnnxInput]) -> dict[str, np.ndarray]:
    """Return the inputs of a file from an `.npz` file with one array for each, by its name.

    Args:
        path: as `numpy.savez` writes it.
        inputs: as `helpers.sparsity.onnx_inputs.onnx_inputs` returns them.

    Raises:
        InputError: the file cannot be read, or an array is missing or of another type.
    """
    arrays = load_arrays(path)
    for item in inputs:
        found = arrays.get(item.name)
        if found is None or found.dtype != item.dtype:
            text = "is missing" if found is None else f"is {found.dtype}"
            raise InputError(
                f"The input {item.name} {text} in {shown(path)}; it must be {item.dtype}."
            )
    return {item.name: arrays[item.name] for item in inputs}


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file by their names.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # of the file system, zipfile or NumPy
        raise InputError(
            f"{shown(path)} cannot be read as inputs: {first_line(error)}. Write one array for "
            "each input with numpy.savez."
        ) from error


class FileRunner(ABC):
    """A file with its inputs in place, ready to infer."""

    name: str
    on_gpu = False  # where it computes

    @abstractmethod
    def run(self) -> None:
        """Infer once; return when the outputs are ready."""

    @abstractmethod
    def fetch(self) -> dict[str, Tensor]:
        """Return copies of the last run's outputs on the CPU; text and sequences are left out."""

    def gpu_seconds(self) -> float | None:
        """Return how long the GPU computed in the last run, by CUDA events; None on a CPU."""
        return None


class OnnxFileRunner(FileRunner):
    """ONNX Runtime on the CPU, a dense library: it multiplies by zeros as by any other number.

    Args:
        path: an ONNX file.
        inputs: one array for each input, by its name.

    Raises:
        InputError: ONNX Runtime cannot load the file; later on, it does not take these inputs.
    """

    def __init__(self, path: Path, inputs: Inputs) -> None:
        import onnxruntime as ort

        self.path = path
        self.session = open_session(path)
        self.inputs = {name: _ort_value(array) for name, array in inputs.items()}
        self.names = [output.name for output in self.session.get_outputs()]
        self.outputs: list[Any] = []
        self.name = f"ONNX Runtime {ort.__version__}, CPU"

    def run(self) -> None:
        try:
            self.outputs = self.session.run_with_ort_values(self.names, self.inputs)
        except Exception as error:  # ONNX Runtime has a dozen classes without a common base
            raise InputError(
                f"{shown(self.path)} does not run in ONNX Runtime on these inputs: "
                f"{first_line(error)}"
            ) from error

    def fetch(self) -> dict[str, Tensor]:
        return {
            name: torch.from_dlpack(value).clone()
            for name, value in zip(self.names, self.outputs, strict=True)
            if value.is_tensor() and value.data_type() != "tensor(string)"
        }


def _ort_value(array: np.ndarray) -> Any:
    """Return an array as ONNX Runtime takes it, BF16 and FP8 by their bits."""
    from onnx.helper import np_dtype_to_tensor_dtype
    from onnxruntime import OrtValue

    array = np.ascontiguousarray(array)
    if array.dtype.kind != "V":  # the kind of the types that NumPy does not know itself
        return OrtValue.ortvalue_from_numpy(array)
    bits = array.view(f"u{array.dtype.itemsize}")
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, np_dtype_to_tensor_dtype(array.dtype))


class EngineFileRunner(FileRunner):
    """An engine of TensorRT or TensorRT-RTX on the GPU, in a CUDA graph, with PyTorch's buffers.

    Args:
        path: an engine, as `helpers.inference.runners.load_engine` takes it.
        inputs: one array for each input, by its name.
        graph: use a CUDA graph; without one the host launches every kernel.
        device: the GPU unless given.

    Raises:
        RunnerError: the engine cannot be loaded or captured, or the size of an output depends on
            the numbers in the inputs.
        InputError: the engine does not take inputs of these shapes.
    """

    on_gpu = True

    def __init__(
        self, path: Path, inputs: Inputs, graph: bool = True, device: torch.device | None = None
    ) -> None:
        self.loaded = loaded = load_engine(path, graph)
        self.name = loaded.name
        self.device = device or machine.device()
        self.inputs = {name: _tensor(array).to(self.device) for name, array in inputs.items()}
        for name, tensor in self.inputs.items():
            if not loaded.context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(
                    f"{self.name}: the engine does not take {name} of shape "
                    f"{tuple(tensor.shape)}. Build it for shapes that cover this one."
                )
            loaded.context.set_tensor_address(name, tensor.data_ptr())
        self.outputs = {name: self._make_output(name) for name in self._output_names()}
        self.stream = torch.cuda.Stream()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph: torch.cuda.CUDAGraph | None = None
        if loaded.captures:
            try:
                self.graph, _ = cuda_graphs.capture(self._enqueue, self.stream)
            except RuntimeError as error:
                cuda_graphs.raise_if_context_is_broken(error)
                raise RunnerError(
                    f"{self.name}: the engine cannot be captured in a CUDA graph "
                    f"({first_line(error)}). Run it without one."
                ) from error

    def _output_names(self) -> list[str]:
        engine, modes = self.loaded.engine, self.loaded.builder.module.TensorIOMode
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        return [name for name in names if engine.get_tensor_mode(name) == modes.OUTPUT]

    def _make_output(self, name: str) -> Tensor:
        """Return memory for an output, of NaN where there is one: a run has to overwrite it."""
        shape = tuple(self.loaded.context.get_tensor_shape(name))
        dtype = self.loaded.engine.get_tensor_dtype(name).name
        if -1 in shape:
            raise RunnerError(
                f"{self.name}: the size of the output {name} depends on the numbers in the inputs, "
                "which cannot be timed here. Make an engine without this output."
            )
        if dtype not in _DTYPES:
            raise RunnerError(f"{self.name}: the output {name} is {dtype}, which PyTorch lacks.")
        output = torch.zeros(shape, dtype=_DTYPES[dtype], device=self.device)
        if output.dtype.is_floating_point:
            output.fill_(float("nan"))
        self.loaded.context.set_tensor_address(name, output.data_ptr())
        return output

    def _enqueue(self) -> None:
        if not self.loaded.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RunnerError(f"{self.name}: the engine refused to run; see what it printed above.")

    def run(self) -> None:
        with torch.cuda.stream(self.stream):
            self.start.record()
            if self.graph is None:
                self._enqueue()
            else:
                self.graph.replay()
            self.end.record()
        self.end.synchronize()

    def fetch(self) -> dict[str, Tensor]:
        return {name: output.to("cpu", copy=True) for name, output in self.outputs.items()}

    def gpu_seconds(self) -> float | None:
        return self.start.elapsed_time(self.end) / 1000


def why_no_engine_runs() -> str:
    """Return in one sentence why no engine can be built and run here; empty if one can."""
    if not torch.cuda.is_available():
        return "No NVIDIA GPU was found, so no engine can run here."
    try:
        builder = find_builder()
    except EngineError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    if builder.name == "TensorRT-RTX" and f"{major}.{minor}" not in RTX_COMPUTE_CAPABILITIES:
        return (
            f"{builder.why}; and TensorRT-RTX builds no engines for compute capability "
            f"{major}.{minor}, which this GPU has."
        )
    return ""


# TensorRT's types by name, as far as PyTorch has them.
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, BF16 and FP8 by their bits."""
    if array.dtype.kind != "V":
        return torch.from_numpy(np.ascontiguousarray(array))
    bits = torch.from_numpy(np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}"))
    return bits.view(getattr(torch, array.dtype.name))
