"""Choose the fastest kernel of a layer by timing. Explained in `06_infer_and_benchmark.ipynb`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers import machine
from helpers.errors import InputError
from helpers.files import shown, write_json
from helpers.inference.cuda_graphs import raise_if_context_is_broken
from helpers.inference.errors import RunnerError
from helpers.inference.kernels import Kernel

# Returns the milliseconds that each of several calls takes.
Timer = Callable[[Sequence[Callable[[], Tensor]]], list[float]]

NOISE = 0.02  # a kernel that is faster by less than this share of the time is not faster
TOLERANCE = 10  # roundings of the largest output by which two kernels may differ


@dataclass(frozen=True)
class Choice:
    """The kernel of one layer for one input shape, with what was measured."""

    kernel: str
    algorithm: dict[str, int]
    milliseconds: dict[str, float]  # by kernel
    refused: dict[str, str] = field(default_factory=dict)  # why a kernel does not run, by kernel


class Autotuner:
    """Chooses among the kernels of a layer by timing them, and remembers the choices.

    Args:
        timer: times the kernels, such as `cuda_graphs.median_times` does on a GPU.
        cache: JSON file to keep the choices in; without a file they last as long as this
            object. Its keys name the processor (with the number of threads on a CPU), the
            version of PyTorch, types, shapes and kernels.
    """

    def __init__(self, timer: Timer, cache: Path | None = None) -> None:
        self.timer, self.cache = timer, cache
        self.choices: dict[str, Choice] = {}

    def choose(self, layer: str, kernels: Sequence[Kernel], input: Tensor) -> Choice:
        """Return the fastest of the kernels of one layer for an input.

        The first kernel is the reference: the others must return its numbers, and it is kept
        unless another one is faster by more than noise. A kernel that does not run for this
        input is left out, and the choice says why.

        Args:
            layer: name of the layer, for errors.
            kernels: at least one.
            input: what the layer is called with, real numbers of the right shape.

        Raises:
            RunnerError: memory is short, or a kernel returns other numbers than the first.
            UnavailableError: a kernel failed in a way after which the GPU cannot be used.
            InputError: the cache cannot be read.
        """
        key = measurement_key(kernels, input)
        if key not in self.choices:
            self.choices |= self._read_cache()  # another runner may have measured it meanwhile
        if key not in self.choices:
            self.choices[key] = self._time(layer, kernels, input)
            if self.cache is not None:
                write_json(self.cache, self.choices)
        return self.choices[key]

    def _time(self, layer: str, kernels: Sequence[Kernel], input: Tensor) -> Choice:
        first, *others = kernels
        algorithms: dict[str, dict[str, int]] = {first.name: {}}
        calls: list[Callable[[], Tensor]] = [partial(first, input)]
        refused: dict[str, str] = {}
        reference = first(input)
        for kernel in others:
            try:
                algorithm = kernel.search(input)
                output = kernel(input, **algorithm)
                right = _agree(output, reference)
            except torch.OutOfMemoryError as error:
                raise RunnerError(
                    f"{layer}: memory is short for the {kernel.name} and an input of shape "
                    f"{tuple(input.shape)}; use a smaller batch."
                ) from error
            except RuntimeError as error:  # a library that does not take this shape
                raise_if_context_is_broken(error)
                refused[kernel.name] = str(error)
                continue
            if not right:
                raise RunnerError(
                    f"{layer}: the {kernel.name} does not return the numbers of the "
                    f"{first.name}, or they are not finite. If the model returns finite numbers "
                    "in PyTorch, this kernel cannot be trusted with PyTorch "
                    f"{torch.__version__}: use another version."
                )
            algorithms[kernel.name] = algorithm
            calls.append(partial(kernel, input, **algorithm))
        times = dict(zip(algorithms, self.timer(calls), strict=True))
        best = min(times, key=times.__getitem__)
        if times[best] >= (1 - NOISE) * times[first.name]:
            best = first.name
        return Choice(best, algorithms[best], times, refused)

    def _read_cache(self) -> dict[str, Choice]:
        if self.cache is None or not self.cache.exists():
            return {}
        try:
            entries = json.loads(self.cache.read_text())
            return {key: Choice(**entry) for key, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{shown(self.cache)} does not hold choices of kernels ({error}). "
                "Delete it; they will be measured again."
            ) from error


def measurement_key(kernels: Sequence[Kernel], input: Tensor) -> str:
    """Return in words everything that the speed of a layer's kernels depends on."""
    layer, epilogue = kernels[0].layer, str(kernels[0].epilogue)
    if input.is_cuda:
        where = torch.cuda.get_device_name(input.device)
    else:
        where = f"{machine.cpu_name()} with {torch.get_num_threads()} threads"
    parts = [
        where,
        f"torch {torch.__version__}",
        f"{str(input.dtype).removeprefix('torch.')} {'x'.join(map(str, input.shape))}",
        f"to {len(layer.weight)} channels",
    ]
    if isinstance(layer, nn.Conv2d):
        down, right = layer.stride
        parts.append(f"stride {down}x{right}")
    if layer.bias is not None:
        parts.append("bias")
    if epilogue:
        parts.append(epilogue)
    return ", ".join(parts) + ": " + " or ".join(kernel.name for kernel in kernels)


def _agree(output: Tensor, reference: Tensor) -> bool:
    """Return whether two kernels' outputs are equal but for rounding."""
    # FP32 convolutions run in TF32 on a GPU, which rounds as FP16 does.
    rounding = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float16).eps)
    output, reference = output.float(), reference.float()
    # A NaN compares as false.
    return bool((output - reference).abs().max() <= TOLERANCE * rounding * reference.abs().max())
