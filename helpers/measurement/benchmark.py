"""Latency, throughput and energy of runners, measured side by side.

The definitions are those of trtexec, TensorRT's own tool: a warm-up of 200 ms, at
least 3 s of runs, transfers measured separately, the GPU's time by CUDA events. Two
things differ. Each run finishes before the next one starts, where trtexec keeps two in
flight. And runners take turns within one measurement, so that their ratio comes with an
interval. Explained in `06_infer_and_benchmark.ipynb`.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from helpers.errors import HelpersError, InputError
from helpers.inference.autotune import settle
from helpers.inference.runners import Runner
from helpers.layers import in_mode
from helpers.measurement.energy import (
    CpuEnergyCounter,
    EnergyCounter,
    EnergyError,
    EnergyWindow,
    idle_watts,
    measure_energy,
)
from helpers.metrics import max_relative_error
from helpers.progress_bar import progress_bar

ROUNDING = 1e-3  # maximum relative error: some GPU kernels add in an order that varies

_logger = logging.getLogger(__name__)


class BenchmarkError(HelpersError, RuntimeError):
    """A runner does not do its work, so its time would mean nothing."""


class Run(NamedTuple):
    """The time of one run, in seconds."""

    host: float  # on the host's clock, until the result is ready
    gpu: float | None  # by CUDA events; None on a CPU


@dataclass(frozen=True, eq=False, repr=False)
class Latency:
    """The times of many runs at one batch size, in milliseconds."""

    batch: int
    rounds: tuple[np.ndarray, ...]  # one array for each round, by the host's clock
    gpu: np.ndarray | None = None  # each run by CUDA events; None on a CPU

    @property
    def times(self) -> np.ndarray:
        """The runs of all rounds."""
        return np.concatenate(self.rounds)

    @property
    def p50(self) -> float:
        """The median."""
        return float(np.median(self.times))

    def percentile(self, share: float) -> float:
        """Return the shortest time that `share` per cent of the runs do not exceed."""
        return float(np.percentile(self.times, share, method="inverted_cdf"))

    @property
    def images_per_second(self) -> float:
        """Throughput: images over the mean time of a run."""
        return 1000 * self.batch / float(self.times.mean())

    def row(self) -> dict[str, float]:
        """Return these runs as columns of a sweep's table."""
        row: dict[str, float] = {
            "batch": self.batch,
            "p50": self.p50,
            "p90": self.percentile(90),
            "p95": self.percentile(95),
            "p99": self.percentile(99),
            "mean": float(self.times.mean()),
            "runs": len(self.times),
            "images_per_second": self.images_per_second,
        }
        if self.gpu is not None:
            row["gpu_p50"] = float(np.median(self.gpu))
            row["overhead_p50"] = float(np.median(self.times - self.gpu))
        return row

    def __repr__(self) -> str:
        return (
            f"batch {self.batch}: p50 {self.p50:.2f} ms, p99 {self.percentile(99):.2f} ms, "
            f"{self.images_per_second:,.0f} images/s ({len(self.times)} runs)"
        )


def check_outputs(
    runner: Runner,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch: int,
    tolerance: float = 1e-2,
    repeats: int = 3,
    seed: int = 0,
) -> float:
    """Return the maximum relative error of a runner's logits against its model's own.

    Each repeat uses fresh random images, and invalidates the runner's earlier logits.

    Args:
        runner: the runner to check.
        model: the model in FP32, on any device; TF32 stays off.
        image_shape: channels, height and width.
        batch: images at a time.
        tolerance: the largest error that passes; 1e-2 suits FP16, 5e-2 BF16.
        repeats: number of batches to check.
        seed: of the images.

    Returns:
        The largest error of all repeats.

    Raises:
        InputError: `batch` or `repeats` is below 1.
        BenchmarkError: an error exceeds the tolerance, or a logit is not finite.
    """
    if batch < 1 or repeats < 1:
        raise InputError(
            f"{repeats} batches of {batch} images check nothing; both numbers must be at least 1."
        )
    generator = torch.Generator().manual_seed(seed)
    where = next(model.parameters()).device
    largest = 0.0
    for _ in range(repeats):
        images = torch.randn(batch, *image_shape, generator=generator)
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
            in_mode(model, training=False),
        ):
            expected = model(images.to(where)).cpu()
        runner.load(images)
        runner.run()
        runner.invalidate_output()
        runner.run()
        error = max_relative_error(runner.fetch(), expected)
        if not error <= tolerance:  # also refuses NaN
            raise BenchmarkError(
                f"{runner.name}: its logits of {batch} random images differ from the model's by "
                f"{error:.1e} of the largest, where {tolerance:g} is allowed. Its time would mean "
                "nothing; look for the layer that differs, or for numbers too large for its type."
            )
        largest = max(largest, error)
    return largest


def time_in_turns(
    runners: Sequence[Runner],
    images: Tensor,
    seconds: float = 3.0,
    warmup: float = 0.2,
    rounds: int = 12,
    clock: Callable[[], float] | None = None,
) -> list[Latency]:
    """Time several runners on the same images, in turns.

    In each round they run one after the other and then in the opposite order (ABBA), and
    each round starts with another runner, so that a machine that slows down or speeds up
    does so for all of them. A turn begins with runs that are not counted, as
    `helpers.inference.autotune.settle` says. Moving the images to the device is not timed.

    Args:
        runners: what to compare.
        images: one batch (N, C, H, W), not all of one value.
        seconds: least time to measure, for each runner.
        warmup: seconds to run each before measuring.
        rounds: each runner gets two turns in each; a multiple of the number of runners, as 12
            is of 2, 3 and 4, gives each runner every place equally often.
        clock: returns seconds; the host's clock unless given. `time.thread_time` counts only
            while this thread computes, which suits runners of one thread on a busy machine.

    Returns:
        The latencies, in the order of the runners.

    Raises:
        InputError: there is nothing to measure, or the images are constant.
        BenchmarkError: a runner's logits are not finite, do not depend on the images, or
            changed between warm-up and end.
    """
    if not (runners and rounds >= 1 and 0 <= seconds < math.inf and 0 <= warmup < math.inf):
        raise InputError(
            f"{len(runners)} runners cannot be measured in {rounds} rounds for {seconds} s after "
            f"{warmup} s: give at least one runner, one round, and no negative seconds."
        )
    if not images.numel():
        raise InputError(
            f"A batch of shape {tuple(images.shape)} holds no images; give at least one."
        )
    if images.min() == images.max():
        raise InputError(
            f"All values of the images are {images.min():g}. Constant data is faster to multiply, "
            "and takes less power, than any real image; use random images, as `torch.randn` makes "
            "them."
        )
    answers = [_warm_up(runner, images, warmup) for runner in runners]
    runs = take_turns(runners, seconds, rounds, f"batch {len(images)}", clock)
    for runner, answer in zip(runners, answers, strict=True):
        _check_unchanged(runner, answer)
    return [latency(own, len(images)) for own in runs]


class Timed(Protocol):
    """What can be timed: it runs, and says how long its GPU computed in the last run."""

    def run(self) -> None: ...

    def gpu_seconds(self) -> float | None: ...


def take_turns(
    runners: Sequence[Timed],
    seconds: float,
    rounds: int,
    title: str,
    clock: Callable[[], float] | None = None,
) -> list[list[list[Run]]]:
    """Return the runs of each runner in each round, measured in turns as `time_in_turns` says.

    Args:
        runners: warm, with their inputs in place.
        seconds: least time to measure, for each runner.
        rounds: each runner gets two turns in each.
        title: of the progress bar.
        clock: as `time_in_turns` takes it.
    """
    runs: list[list[list[Run]]] = [[[] for _ in range(rounds)] for _ in runners]
    order = list(range(len(runners)))
    for number in progress_bar(range(rounds), desc=title):
        order.append(order.pop(0))  # so that no runner always follows the same one
        for turn in order + order[::-1]:
            runs[turn][number] += _take_turn(runners[turn], seconds / (2 * rounds), clock)
    return runs


def _warm_up(runner: Runner, images: Tensor, seconds: float) -> Tensor:
    """Run for some seconds and return the logits, which must depend on the images."""
    others = runner(-images).clone()
    runner.load(images)
    runner.invalidate_output()  # so that a runner that writes nothing is detected
    until = time.perf_counter() + seconds
    answer = _answer(runner)
    while time.perf_counter() < until:
        runner.run()
    if not answer.isfinite().all():
        raise BenchmarkError(
            f"{runner.name}: the logits of {len(images)} random images are not all finite. "
            "Compare them with the model's own (`check_outputs`) before timing it."
        )
    if answer.equal(others):
        raise BenchmarkError(
            f"{runner.name}: two different batches of {len(images)} images have the same logits, "
            "so the model did not run, or its weights are zero. Load or build it again."
        )
    return answer


def _answer(runner: Runner) -> Tensor:
    """Return a copy of the logits, since a runner may overwrite them in its next run."""
    runner.run()
    return runner.fetch().clone()


def _take_turn(
    runner: Timed, seconds: float, clock: Callable[[], float] | None = None
) -> list[Run]:
    """Time runs for some seconds, at least one."""
    clock = clock or time.perf_counter
    settle(runner.run)
    runs: list[Run] = []
    left = seconds
    while not runs or left > 0:
        start = clock()
        runner.run()
        taken = clock() - start
        runs.append(Run(taken, runner.gpu_seconds()))
        left -= taken
    return runs


def _check_unchanged(runner: Runner, answer: Tensor) -> None:
    error = max_relative_error(runner.fetch(), answer)
    if not error < ROUNDING:  # also refuses NaN
        raise BenchmarkError(
            f"{runner.name}: its logits of the same images moved by {error:.1e} of the largest one "
            "while it was measured, so it does not always do the same work. Look for a buffer that "
            "it shares with another runner."
        )


def latency(rounds: list[list[Run]], batch: int) -> Latency:
    """Return the runs of one runner, as `take_turns` returns them, in milliseconds."""
    host = tuple(1000 * np.array([run.host for run in own]) for own in rounds)
    gpu = [run.gpu for own in rounds for run in own]
    return Latency(batch, host, None if None in gpu else 1000 * np.array(gpu))


def time_transfers(runner: Runner, images: Tensor, repeats: int = 10) -> dict[str, float]:
    """Return how long a runner takes to load images and to fetch logits, in milliseconds.

    `load_p50` covers all of `Runner.load`, including conversion and buffers.
    """
    loads, fetches = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        runner.load(images)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        loads.append(time.perf_counter() - start)
        runner.run()
        start = time.perf_counter()
        runner.fetch()
        fetches.append(time.perf_counter() - start)
    medians = {"load_p50": np.median(loads), "fetch_p50": np.median(fetches)}
    return {name: 1000 * float(median) for name, median in medians.items()}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two measurements with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def bootstrap_ratio(
    above: Sequence[np.ndarray],
    below: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float] = np.median,
    resamples: int = 1000,
    seed: int = 0,
) -> Ratio:
    """Return the ratio of two statistics with its 95 % bootstrap interval over the rounds.

    Whole rounds are resampled, the same for both sides: the runs of one round share the
    state of the machine, so resampling single runs would make the interval too narrow. With
    two or three rounds the interval is the range of the rounds; one round has none (NaN).

    Args:
        above: measurements of the numerator, one array for each round.
        below: those of the denominator, of the same rounds.
        statistic: of the measurements of all rounds together.
        resamples: number of resamples.
        seed: of the resampling.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (the
    percentile interval).
    """

    def ratio(rounds: Sequence[int]) -> float:
        numerator = statistic(np.concatenate([above[number] for number in rounds]))
        denominator = statistic(np.concatenate([below[number] for number in rounds]))
        return float(numerator / denominator)

    count = len(above)
    if count == 1:
        return Ratio(ratio([0]), math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.percentile([ratio(rounds) for rounds in draws], [2.5, 97.5])
    return Ratio(ratio(range(count)), float(low), float(high))


def sweep(
    runners: Mapping[str, Runner],
    image_shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    seconds: float = 3.0,
    seed: int = 0,
    energy_rounds: int = 3,
    idle: float | None = None,
) -> pd.DataFrame:
    """Measure runners over batch sizes, on random images.

    Args:
        runners: by their names in the table; the first is "dense", with which the others are
            compared.
        image_shape: channels, height and width.
        batch_sizes: images at a time.
        seconds: least time to measure for each runner and batch size.
        seed: of the random images.
        energy_rounds: windows of 5 s on a GPU, of 1 s on a CPU, for each runner and batch
            size; with one there is no interval, with none no energy.
        idle: the power in watts while nothing runs, as `idle_watts` measures it before any load;
            measured here unless given, when a GPU may still be warm.

    Returns:
        One row for each runner and batch size, times in milliseconds, with `network`, `batch`,
        `p50`, `p90`, `p95`, `p99`, `mean`, `runs`, `images_per_second`, `load_p50` and
        `fetch_p50` (the transfers), and `speedup` over the first runner at the median,
        with the ends of its 95 % interval, `speedup_low` and `speedup_high`.
        On a GPU also `gpu_p50` (by CUDA events) and `overhead_p50` (what the host adds);
        where the GPU or the processor has an energy counter also `images_per_joule`,
        `watts`, `idle_watts`, and `perf_per_watt`, relative to the first runner, with
        `perf_per_watt_low` and `perf_per_watt_high`; on a GPU then also `sm_mhz`, `celsius`
        and `throttles`.

    If the energy counter fails at a batch size, that is logged, and its rows have no energy.

    Raises:
        InputError: the first runner is not called "dense", or as `time_in_turns`.
        BenchmarkError: as `time_in_turns` and `energy_in_turns`.
    """
    if next(iter(runners), None) != "dense":
        raise InputError(
            f'The first of the runners, {", ".join(runners) or "none"}, must be "dense": all '
            "others are compared with it."
        )
    meter = _energy_meter(list(runners.values()), idle) if energy_rounds else None
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch in progress_bar(batch_sizes, desc="batch sizes"):
        images = torch.randn(batch, *image_shape, generator=generator)
        latencies = time_in_turns(list(runners.values()), images, seconds)
        batch_rows: list[dict[str, Any]] = [
            {"network": name, **own.row(), **time_transfers(runner, images)}
            | bounds("speedup", bootstrap_ratio(latencies[0].rounds, own.rounds))
            for (name, runner), own in zip(runners.items(), latencies, strict=True)
        ]
        if meter is not None:
            counter, idle = meter
            try:
                windows = energy_in_turns(list(runners.values()), counter, energy_rounds)
                for row, own in zip(batch_rows, windows, strict=True):
                    row.update(_energy_row(own, windows[0], batch), idle_watts=idle)
            except EnergyError as error:  # the latencies are kept
                _logger.warning("batch %d: no energy. %s", batch, error)
        rows += batch_rows
    return pd.DataFrame(rows)


def _energy_meter(
    runners: Sequence[Runner], idle: float | None
) -> tuple[EnergyCounter | CpuEnergyCounter, float] | None:
    """Return the energy counter of what the runners run on, and its idle power if not known.

    None, which is logged, if it has no counter.
    """
    try:
        counter = (
            EnergyCounter()
            if torch.cuda.is_available() and any(runner.on_gpu for runner in runners)
            else CpuEnergyCounter()
        )
        return counter, idle_watts(counter) if idle is None else idle
    except EnergyError as error:
        _logger.warning("%s", error)
        return None


def energy_in_turns(
    runners: Sequence[Runner], counter: EnergyCounter | CpuEnergyCounter, rounds: int = 3
) -> list[list[EnergyWindow]]:
    """Measure the energy of several runners on their loaded images, in turns.

    Each round is one window for each runner, and the order is reversed after each round: a
    GPU that warms up draws more power, whichever runner runs.

    Returns:
        The windows of each runner, in the order of the runners.

    Raises:
        BenchmarkError: a runner's logits changed while it was measured.
        EnergyError: the counter stood still or was reset.
    """
    answers = [_answer(runner) for runner in runners]
    windows: list[list[EnergyWindow]] = [[] for _ in runners]
    order = list(range(len(runners)))
    for _ in progress_bar(range(rounds), desc="energy"):
        for turn in order:
            windows[turn].append(measure_energy(runners[turn].run, counter))
        order.reverse()
    for runner, answer in zip(runners, answers, strict=True):
        _check_unchanged(runner, answer)
    return windows


def _energy_row(
    own: list[EnergyWindow], base: list[EnergyWindow], batch: int
) -> dict[str, float | str]:
    """Return a runner's energy as columns of a sweep's table."""
    joules = [np.array([window.joules_per_call]) for window in own]
    base_joules = [np.array([window.joules_per_call]) for window in base]
    row: dict[str, float | str] = {
        "images_per_joule": batch / float(np.mean(joules)),
        "watts": float(np.mean([window.watts for window in own])),
    }
    clocks = [window.sm_mhz for window in own if window.sm_mhz is not None]
    if clocks:
        row["sm_mhz"] = float(np.mean(clocks))
        row["celsius"] = max(window.celsius for window in own if window.celsius is not None)
        row["throttles"] = ", ".join(sorted({name for each in own for name in each.throttles}))
    return {
        **row,
        **bounds("perf_per_watt", bootstrap_ratio(base_joules, joules, np.mean)),
    }


def bounds(name: str, ratio: Ratio) -> dict[str, float]:
    """Return a ratio as three columns of a table: `name`, `name_low` and `name_high`."""
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def speedup_by_batch(table: pd.DataFrame, other: str = "sparse") -> pd.DataFrame:
    """Return how many times faster `other` is than dense at the median, by batch size.

    Args:
        table: as `sweep` returns it.
        other: the runner to compare with "dense".

    Returns:
        `value`, and the ends `low` and `high` of its 95 % interval, which are NaN in a table
        that was recorded without one; the index is the batch size.
    """
    p50 = table.pivot(index="batch", columns="network", values="p50")
    return _with_bounds(p50["dense"] / p50[other], table, "speedup", other)


def perf_per_watt_by_batch(table: pd.DataFrame, other: str = "sparse") -> pd.DataFrame:
    """Return the images per joule of `other` over those of dense, by batch size.

    Args:
        table: as `sweep` returns it on a GPU with an energy counter.
        other: the runner to compare with "dense".

    Returns:
        As `speedup_by_batch`.
    """
    images = table.pivot(index="batch", columns="network", values="images_per_joule")
    return _with_bounds(images[other] / images["dense"], table, "perf_per_watt", other)


def _with_bounds(values: pd.Series, table: pd.DataFrame, name: str, other: str) -> pd.DataFrame:
    own = table[table.network == other].set_index("batch")
    bounds = own.reindex(columns=[f"{name}_low", f"{name}_high"]).astype(float)  # None is NaN
    return pd.concat([values.rename("value"), bounds.set_axis(["low", "high"], axis=1)], axis=1)
