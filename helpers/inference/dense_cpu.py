"""The fastest dense runner of a model on a CPU: what sparsity has to be compared with.

Neither ONNX Runtime nor PyTorch is always the faster one, and PyTorch's plain calls are up to
three times slower than its best on some processors. So all are measured.
Explained in `06_infer_and_benchmark.ipynb`.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from helpers.errors import HelpersError
from helpers.inference.autotune import (
    Choice,
    ChoiceCache,
    fingerprint,
    host_times_apart,
    measure_twice,
    network_key,
    takes_still,
)
from helpers.inference.cpu_runner import CpuRunner
from helpers.inference.errors import RunnerError
from helpers.inference.export import export_onnx
from helpers.inference.fold import fold_batch_norm
from helpers.inference.runners import OnnxRunner, Runner, TorchRunner

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger(__name__)


# Returns the milliseconds that a run of each of several models takes.
NetworkTimer = Callable[[Sequence[Callable[[], object]]], list[float]]


class DenseCpuRunner(Runner):
    """A model in the fastest dense runner of this CPU, chosen for each shape of images.

    It is one of ONNX Runtime, PyTorch compiled with frozen weights (where a C++ compiler is
    there), and `CpuRunner` with dense kernels alone. Each shape is prepared when it is first
    loaded.

    Args:
        model: a model in FP32 that torch.fx can trace; it is not changed.
        cache: JSON file for the choices, so that they are measured once. A choice on which two
            measurements disagree is not kept, and one is measured again if its runner takes
            another time in a later process.
        timer: times the runs of whole models.
        compile: consider PyTorch compiled, which takes up to minutes for a large model.

    Raises:
        InputError: the model cannot be traced, or as `CpuRunner`.
        RunnerError: later on, none of the runners takes the model.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: Path | None = None,
        timer: NetworkTimer = host_times_apart,
        compile: bool = True,
    ) -> None:
        self.model, self.timer, self.cache = model, timer, ChoiceCache(cache)
        self.fingerprint = fingerprint(fold_batch_norm(model))
        self.makers: dict[str, Callable[[tuple[int, ...]], Runner]] = {
            "ONNX Runtime": self._onnx_runner,
            "dense kernels": lambda shape: CpuRunner(model, "dense", cache),
        }
        if compile and has_compiler():
            self.makers["PyTorch compiled"] = self._compiled_runner
        self.runners: dict[str, Runner] = {}
        self.choices: dict[tuple[torch.Size, int], Choice] = {}
        self.ran: dict[int, str] = {}  # the name of the runner, by batch size
        self.name = "the fastest dense runner, CPU, FP32"

    def _onnx_runner(self, shape: tuple[int, ...]) -> Runner:
        channels, height, width = shape[1:]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            return OnnxRunner(export_onnx(self.model, path, (channels, height, width)))

    def _compiled_runner(self, shape: tuple[int, ...]) -> Runner:
        return TorchRunner(self.model, torch.float32, compile=True, device=torch.device("cpu"))

    def load(self, images: Tensor) -> None:
        key = images.shape, torch.get_num_threads()
        if key not in self.choices:
            own = network_key(self.fingerprint, images, self.makers)
            self.choices[key] = self.cache.get(
                own, partial(self._measure, images), partial(self._still_holds, images)
            )
        self.current = self._runner(self.choices[key].kernel, images.shape)
        self.ran[len(images)] = self.current.name
        self.name = f"{_by_batch_size(self.ran)} (the fastest dense runner here)"
        self.current.load(images)

    def _runner(self, name: str, shape: tuple[int, ...]) -> Runner:
        # ONNX Runtime keeps the number of threads, compiled code the shape.
        key = f"{name}, {torch.get_num_threads()} threads"
        if key not in self.runners:
            self.runners[key] = self.makers[name](shape)
        return self.runners[key]

    def _measure(self, images: Tensor) -> Choice:
        runners: dict[str, Runner] = {}
        refused: dict[str, str] = {}
        for name in self.makers:
            try:
                runner = self._runner(name, images.shape)
                runner(images)
            except (HelpersError, RuntimeError, torch.onnx.OnnxExporterError) as error:
                refused[name] = str(error)
                _logger.warning("%s does not take the model and is left out: %s", name, error)
                continue
            runners[name] = runner
        if not runners:
            raise RunnerError(
                f"No dense runner takes the model on images of shape {tuple(images.shape)}: "
                + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            )
        measured = measure_twice(self.timer, {name: runner.run for name, runner in runners.items()})
        times = measured.shortest
        fastest = min(times, key=times.__getitem__)
        return Choice(fastest, {}, times, refused, measured.support(fastest))

    @property
    def running(self) -> str:
        return self.current.name

    def _still_holds(self, images: Tensor, choice: Choice) -> bool:
        runner = self._runner(choice.kernel, images.shape)
        runner.load(images)
        return takes_still(self.timer, runner.run, choice.milliseconds[choice.kernel])

    def run(self) -> None:
        self.current.run()

    def fetch(self) -> Tensor:
        return self.current.fetch()

    def invalidate_output(self) -> None:
        self.current.invalidate_output()

    def network_times(self) -> "pd.DataFrame":
        """Return one row for each input shape so far: how fast each runner is, and which runs."""
        return network_table(self.choices)


def _by_batch_size(names: Mapping[int, str]) -> str:
    """Return the names of runners in words, with their batch sizes if there are several names."""
    sizes = batch_sizes_by_name(names)
    if len(sizes) == 1:
        return next(iter(sizes))
    return "; ".join(f"at batch size {own} {name}" for name, own in sizes.items())


def batch_sizes_by_name(names: Mapping[int, str]) -> dict[str, str]:
    """Return the batch sizes of each name, in words."""
    return {
        name: ", ".join(str(size) for size in sorted(names) if names[size] == name)
        for name in dict.fromkeys(names[size] for size in sorted(names))
    }


def network_table(choices: Mapping[tuple[torch.Size, int], Choice]) -> "pd.DataFrame":
    """Return one row for each input shape and number of threads, with what was measured."""
    import pandas as pd

    rows = [
        {
            "input": "x".join(map(str, shape)),
            "threads": threads,
            **choice.milliseconds,
            "runs": choice.kernel,
        }
        for (shape, threads), choice in sorted(choices.items(), key=lambda each: each[0])
    ]
    return pd.DataFrame(rows, columns=None if rows else ["input", "threads", "runs"])


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which `torch.compile` needs on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
