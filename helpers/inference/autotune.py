"""Choose the fastest kernel of a layer by timing. Explained in `06_infer_and_benchmark.ipynb`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers import machine
from helpers.files import shown, write_json
from helpers.inference import cuda_graphs
from helpers.inference.kernels import Kernel
from helpers.inference.runners import RunnerError

Timer = Callable[[Sequence[Callable[[], Tensor]]], list[float]]

NOISE = 0.02  # a kernel that wins by less than this share of the time has not won
TOLERANCE = 10  # roundings of the largest output that two kernels may differ by


@dataclass(frozen=True)
class Choice:
    """The kernel of one layer for one input shape, with what was measured."""

    kernel: str
    algorithm: dict[str, int]
    milliseconds: dict[str, float]  # by kernel
    refused: dict[str, str] = field(default_factory=dict)  # why a kernel does not run, by kernel


class Autotuner:
    """Chooses among the kernels of a layer by timing them, and remembers.

    Args:
        timer: returns the milliseconds that each of several calls takes.
        cache: JSON file to keep the choices in; without one they last as long as this
            object. Its keys name GPU, version of PyTorch, type and shapes.
    """

    def __init__(self, timer: Timer, cache: Path | None = None) -> None:
        self.timer, self.cache = timer, cache
        self.choices: dict[str, Choice] = {}
        self.where = machine.gpu().get("gpu", machine.cpu_name())

    def choose(self, layer: str, kernels: Sequence[Kernel], input: Tensor) -> Choice:
        """Return the fastest of the kernels of one layer for an input.

        The first kernel is the dense layer, which stays unless another beats it by more
        than noise. A kernel that does not run for this input is left out, and the choice
        says why.

        Args:
            layer: name of the layer, for errors.
            kernels: at least one.
            input: what the layer is called with, real numbers of the right shape.

        Raises:
            RunnerError: the memory is short, a kernel gives other numbers than the first, or
                the cache cannot be read.
        """
        key = f"{self.where}, torch {torch.__version__}, {_describe(kernels, input)}"
        if key not in self.choices:
            self.choices |= self._read()  # another runner may have measured it meanwhile
        if key not in self.choices:
            self.choices[key] = self._measure(layer, kernels, input)
            if self.cache is not None:
                write_json(self.cache, self.choices)
        return self.choices[key]

    def _measure(self, layer: str, kernels: Sequence[Kernel], input: Tensor) -> Choice:
        dense, *others = kernels
        calls, refused = {dense.name: partial(dense, input)}, {}
        reference = dense(input)
        for kernel in others:
            try:
                algorithm = _search(layer, kernel, input, reference)
                calls[kernel.name] = partial(kernel, input, **algorithm)
            except torch.OutOfMemoryError as error:
                raise RunnerError(
                    f"{layer}: memory is short for the {kernel.name} and an input of shape "
                    f"{tuple(input.shape)}; use a smaller batch."
                ) from error
            except RuntimeError as error:  # a library that does not take this shape
                refused[kernel.name] = str(error)
        times = dict(zip(calls, self.timer(list(calls.values())), strict=True))
        best = min(times, key=times.get)
        if times[best] >= (1 - NOISE) * times[dense.name]:
            best = dense.name
        return Choice(best, calls[best].keywords, times, refused)

    def _read(self) -> dict[str, Choice]:
        if self.cache is None or not self.cache.exists():
            return {}
        try:
            entries = json.loads(self.cache.read_text())
            return {key: Choice(**entry) for key, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise RunnerError(
                f"{shown(self.cache)} does not hold choices of kernels ({error}). "
                "Delete it; they will be measured again."
            ) from error


def _describe(kernels: Sequence[Kernel], input: Tensor) -> str:
    """Return all that the speed of a layer's kernels depends on, but for the machine."""
    layer, relu = kernels[0].layer, kernels[0].relu
    size = "x".join(map(str, input.shape))
    parts = [f"{str(input.dtype).removeprefix('torch.')} {size}"]
    parts.append(f"to {len(layer.weight)} channels")
    if isinstance(layer, nn.Conv2d):
        parts.append("stride {}x{}".format(*layer.stride))
    parts += ["bias"] * (layer.bias is not None) + ["ReLU"] * relu
    return ", ".join(parts) + ": " + " or ".join(kernel.name for kernel in kernels)


def _search(layer: str, kernel: Kernel, input: Tensor, reference: Tensor) -> dict[str, int]:
    """Return a kernel's best arguments for an input, if it then gives the right numbers."""
    algorithm = kernel.search(input)
    if not _agree(kernel(input, **algorithm), reference):
        raise RunnerError(
            f"{layer}: the {kernel.name} does not give the numbers of the dense layer, or they "
            "are not finite. If the network gives finite numbers in PyTorch, this kernel cannot "
            f"be trusted with PyTorch {torch.__version__}: use another version."
        )
    return algorithm


def _agree(output: Tensor, reference: Tensor) -> bool:
    # FP32 convolutions run in TF32 on a GPU, which rounds as FP16 does.
    rounding = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float16).eps)
    output, reference = output.float(), reference.float()
    # A NaN compares as false.
    return bool((output - reference).abs().max() <= TOLERANCE * rounding * reference.abs().max())


def median_times(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Return the median GPU time of each call in milliseconds, measured in turns."""
    return cuda_graphs.medians(cuda_graphs.time_calls(calls))
