"""Choose the fastest kernel of a layer by timing, in spite of other programs.

Other programs that use the processor meanwhile can make any kernel look slow. So everything is
timed twice, and a choice is kept for later processes only if both measurements support it.
Explained in `06_infer_and_benchmark.ipynb`.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from helpers import machine
from helpers.errors import InputError
from helpers.files import shown, write_json
from helpers.inference import cuda_graphs
from helpers.inference.errors import RunnerError
from helpers.inference.kernels import Kernel

# Returns the milliseconds that each of several calls takes.
Timer = Callable[[Sequence[Callable[[], Tensor]]], list[float]]

NOISE = 0.02  # a kernel that is faster by less than this share of the time is not faster
# A measurement supports a kernel that takes at most this share longer than the fastest.
SPREAD = 0.05
# A call that an earlier process timed has to take the same time now, within this share.
DRIFT = 0.1
# Seconds after which the threads of another library have stopped waiting for work: PyTorch's on
# Linux do so for some 12 ms.
SETTLING = 0.02
TOLERANCE = 10  # roundings of the largest output by which two kernels may differ
CPU_TOLERANCE = 1e-4  # of the largest output, for FP32 on a CPU: the order of the sums differs


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The kernel of one layer for one input shape, with what was measured."""

    kernel: str
    algorithm: dict[str, int]
    milliseconds: dict[str, float]  # by kernel
    refused: dict[str, str] = field(default_factory=dict)  # why a kernel does not run, by kernel
    reliable: bool = True  # whether both measurements support it; if not, it is not kept on disk


@dataclass(frozen=True)
class Measured:
    """The milliseconds of several calls, by name, in measurements one after another."""

    measurements: tuple[dict[str, float], ...]

    @property
    def shortest(self) -> dict[str, float]:
        """The shortest time of each call: other programs only add to it."""
        first = self.measurements[0]
        return {name: min(times[name] for times in self.measurements) for name in first}

    def support(self, name: str) -> bool:
        """Return whether a call was among the fastest in every measurement."""
        return all(times[name] <= (1 + SPREAD) * min(times.values()) for times in self.measurements)


def measure_twice(timer: Timer, calls: Mapping[str, Callable[[], Any]]) -> Measured:
    """Return what a timer tells about several calls, by name, two times."""
    return Measured(
        tuple(dict(zip(calls, timer(list(calls.values())), strict=True)) for _ in range(2))
    )


def takes_still(timer: Timer, call: Callable[[], Any], milliseconds: float) -> bool:
    """Return whether a call takes as long as an earlier process measured.

    If not, one of the processes was disturbed by other programs, or the machine has changed.
    """
    (now,) = timer([call])
    return abs(now - milliseconds) <= DRIFT * milliseconds


def host_times(
    calls: Sequence[Callable[[], object]], seconds: float = 0.03, most_runs: float = 52
) -> list[float]:
    """Return how many milliseconds each call takes on the CPU, measured in turns.

    With one thread it is the lower quartile of the processor's time, of which other programs
    take nothing. Several threads wait for each other whenever another program takes a core, so
    with them it is the shortest time on the clock.

    Args:
        calls: what to time.
        seconds: for how long to time each, in at least three runs.
        most_runs: after which a call has been timed enough, however short it is.
    """
    taken: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for turn in order:
        _time_once(calls[turn])  # sets itself up
        taken[turn].append(_time_once(calls[turn]))
    runs = min(most_runs, seconds / max(1e-6, sum(map(sum, taken)) / len(calls)))
    for _ in range(max(1, math.ceil(runs / 2))):
        order.append(order.pop(0))
        for turn in order + order[::-1]:
            taken[turn].append(_time_once(calls[turn]))
    return [_typical(own) for own in taken]


def host_times_apart(
    calls: Sequence[Callable[[], object]], seconds: float = 0.2, rounds: int = 2
) -> list[float]:
    """Return how many milliseconds each call takes on the CPU, if it has the cores to itself.

    As `host_times`, for calls of several libraries, each with threads of its own: each call gets
    two turns in a round, of many runs, which begin with `settle`. Every run of that time counts:
    a model of less than a millisecond needs thousands before the difference between two of them
    is larger than that between two measurements.

    Args:
        calls: what to time.
        seconds: for how long to time each; it runs at least once in each turn.
        rounds: how often to go there and back again.
    """
    taken: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for _ in range(rounds):
        for turn in order + order[::-1]:
            settle(calls[turn])
            left = seconds / (2 * rounds)
            while left > 0:
                taken[turn].append(_time_once(calls[turn]))
                left -= taken[turn][-1]
        order.append(order.pop(0))
    return [_typical(own) for own in taken]


def settle(call: Callable[[], object]) -> None:
    """Run a call until what another library left behind no longer slows it down.

    Its first run finds the caches full of other data. With several threads it goes on for
    `SETTLING` seconds: the threads of a library wait for more work in a busy loop, and until they
    give up they hold cores that this call needs.
    """
    call()
    if torch.get_num_threads() > 1:
        until = time.perf_counter() + SETTLING
        while time.perf_counter() < until:
            call()


def _typical(taken: list[float]) -> float:
    """Return the milliseconds of a call from the seconds of its runs, as `host_times` says."""
    share = 25 if torch.get_num_threads() == 1 else 0
    return 1000 * float(np.percentile(taken, share))


def _time_once(call: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


# Choices that are not kept on disk. In one process they still hold for all caches with the same
# file, so that a sparse model and its dense twin choose alike.
_unreliable: dict[tuple[Path, str], Choice] = {}


class ChoiceCache:
    """Choices by a key that says in words what they depend on, kept in a JSON file.

    A choice that is not reliable lasts until the process ends, and the next one measures again.

    Args:
        path: the file; without one all choices last as long as this object.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.choices: dict[str, Choice] = {}

    def get(
        self,
        key: str,
        measure: Callable[[], Choice],
        still_holds: Callable[[Choice], bool] = lambda choice: True,
    ) -> Choice:
        """Return the choice that is kept under a key, or else measure it and keep it.

        Args:
            key: in words, what the choice depends on.
            measure: makes the choice.
            still_holds: asked once about a choice that comes from the file; if it does not hold,
                it is measured again.

        Raises:
            InputError: the file cannot be read.
            WriteError: the file cannot be written.
        """
        if key not in self.choices:
            self.choices[key] = self._kept(key, still_holds) or self._new(key, measure)
        return self.choices[key]

    def _kept(self, key: str, still_holds: Callable[[Choice], bool]) -> Choice | None:
        if self.path is None:
            return None
        if (self.path, key) in _unreliable:
            return _unreliable[self.path, key]
        choice = self._read().get(key)  # another runner may have measured it meanwhile
        return choice if choice is not None and still_holds(choice) else None

    def _new(self, key: str, measure: Callable[[], Choice]) -> Choice:
        choice = measure()
        if self.path is None:
            return choice
        if choice.reliable:
            write_json(self.path, self._read() | {key: choice})  # others may have written meanwhile
        else:
            # Once for a process: on a busy machine it is true of many layers.
            _logger.log(
                logging.DEBUG if _unreliable else logging.INFO,
                "Two measurements disagree on which kernel is the fastest, perhaps because other "
                "programs ran meanwhile. Such choices are made again in the next process.",
            )
            _logger.debug("chosen for this process alone: %s", key)
            _unreliable[self.path, key] = choice
        return choice

    def _read(self) -> dict[str, Choice]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            entries = json.loads(self.path.read_text())
            return {key: Choice(**entry) for key, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{shown(self.path)} does not hold choices of kernels ({error}). "
                "Delete it; they will be measured again."
            ) from error


class Autotuner:
    """Chooses among the kernels of a layer by timing them, and remembers the choices.

    Args:
        timer: times the kernels, such as `cuda_graphs.median_times` does on a GPU.
        cache: JSON file to keep the choices in; without a file they last as long as this
            object. Its keys name the processor (with the number of threads on a CPU), the
            version of PyTorch (on a GPU those of CUDA and cuSPARSELt too), types, shapes and
            kernels.
    """

    def __init__(self, timer: Timer, cache: Path | None = None) -> None:
        self.timer, self.cache = timer, ChoiceCache(cache)

    def choose(
        self,
        layer: str,
        kernels: Sequence[Kernel],
        input: Tensor,
        residual: Tensor | None = None,
    ) -> Choice:
        """Return the fastest of the kernels of one layer for an input.

        The first kernel is the reference: the others must return its numbers, or those that
        rounding to INT8 makes of them (`Kernel.expected`), and it is kept
        unless another one is faster by more than noise. A kernel that does not run for this
        input is left out, and the choice says why.

        Args:
            layer: name of the layer, for errors.
            kernels: at least one.
            input: what the layer is called with, real numbers of the right shape.
            residual: what it is called with too, if the kernels' epilogue adds one.

        Raises:
            RunnerError: memory is short, or a kernel returns other numbers than the first.
            DeadContextError: a kernel failed in a way after which the GPU cannot be used.
            InputError: the cache cannot be read.
        """
        key = measurement_key(kernels, input)
        return self.cache.get(key, lambda: self._time(layer, kernels, input, residual))

    def _time(
        self, layer: str, kernels: Sequence[Kernel], input: Tensor, residual: Tensor | None
    ) -> Choice:
        first, *others = kernels
        algorithms: dict[str, dict[str, int]] = {first.name: {}}
        calls: list[Callable[[], Tensor]] = [first.bind(input, residual)]
        refused: dict[str, str] = {}
        where = f"{layer}, input {_times(input.shape)} in {_type(input)}"
        with cuda_graphs.named(f"the {first.name} of {where}"):
            reference = first(input, residual)
            if input.is_cuda:  # its errors are not those of the next kernel
                torch.cuda.synchronize(input.device)
        for kernel in others:
            algorithm: dict[str, int] = {}
            try:
                algorithm = kernel.search(input)
                call = kernel.bind(input, residual, **algorithm)
                right = _agree(call(), kernel.expected(input, reference))
            except torch.OutOfMemoryError as error:
                raise RunnerError(
                    f"{layer}: memory is short for the {kernel.name} and an input of shape "
                    f"{tuple(input.shape)}; use a smaller batch."
                ) from error
            except RuntimeError as error:  # a library that does not take this shape
                tried = f"with {algorithm}" if algorithm else "while its algorithms were tried"
                cuda_graphs.raise_if_context_is_broken(
                    error, f"the {kernel.name} of {where}, {tried}"
                )
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
            calls.append(call)
        with cuda_graphs.named(f"one of {algorithms} of {where}, while they were timed,"):
            measured = measure_twice(self.timer, dict(zip(algorithms, calls, strict=True)))
        times = measured.shortest
        best = min(times, key=times.__getitem__)
        if times[best] >= (1 - NOISE) * times[first.name]:
            best = first.name
        return Choice(best, algorithms[best], times, refused, measured.support(best))


def measurement_key(kernels: Sequence[Kernel], input: Tensor) -> str:
    """Return in words everything that the speed of a layer's kernels depends on."""
    layer, epilogue = kernels[0].layer, str(kernels[0].epilogue)
    where = torch.cuda.get_device_name(input.device) if input.is_cuda else cpu_and_threads()
    libraries = machine.cuda_versions() if input.is_cuda else {}
    parts = [
        where,
        f"torch {torch.__version__}",
        *(f"{name} {version}" for name, version in libraries.items()),
        f"{_type(input)} {_times(input.shape)}",
        f"to {len(layer.weight)} channels",
    ]
    if isinstance(layer, nn.Conv2d):
        down, right = layer.stride
        parts.append(f"stride {down}x{right}")
        if layer.kernel_size != (1, 1):
            parts.append(f"kernel {_times(layer.kernel_size)}, padding {_times(layer.padding)}")
        if layer.dilation != (1, 1):
            parts.append(f"dilation {_times(layer.dilation)}")
        if layer.groups > 1:
            parts.append(f"{layer.groups} groups")
        if not input.is_cuda and not input.is_contiguous():
            parts.append("channels-last")
    if layer.bias is not None:
        parts.append("bias")
    if epilogue:
        parts.append(epilogue)
    return ", ".join(parts) + ": " + " or ".join(kernel.name for kernel in kernels)


def fingerprint(folded: fx.GraphModule) -> str:
    """Return what tells models of different speed apart: their steps and layers."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in folded.named_parameters()]
    return hashlib.sha256(f"{folded.code}{folded}{shapes}".encode()).hexdigest()[:16]


def network_key(model: str, images: Tensor, runners: Iterable[str]) -> str:
    """Return in words everything that the speed of whole models depends on.

    Args:
        model: its `fingerprint`.
        images: what it is called with.
        runners: what is compared.
    """
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "numba")]
    shape = "x".join(map(str, images.shape))
    parts = [cpu_and_threads(), *versions, f"model {model}", f"float32 {shape}"]
    return ", ".join(parts) + ": " + " or ".join(runners)


def cpu_and_threads() -> str:
    """Return the processor and how many threads PyTorch uses on it."""
    return f"{machine.cpu_name()} with {torch.get_num_threads()} threads"


def _times(sizes: tuple[int, ...] | str) -> str:
    return sizes if isinstance(sizes, str) else "x".join(map(str, sizes))


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _agree(output: Tensor, reference: Tensor) -> bool:
    """Return whether two kernels' outputs are equal but for rounding."""
    if not output.numel():
        return output.shape == reference.shape
    if output.is_cuda or output.dtype != torch.float32:
        # FP32 convolutions run in TF32 on a GPU, which rounds as FP16 does.
        tolerance = TOLERANCE * max(torch.finfo(output.dtype).eps, torch.finfo(torch.float16).eps)
    else:
        tolerance = CPU_TOLERANCE
    output, reference = output.float(), reference.float()
    # A NaN compares as false.
    return bool((output - reference).abs().max() <= tolerance * reference.abs().max())
