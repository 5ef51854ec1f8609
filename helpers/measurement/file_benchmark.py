"""Compare the latencies of files of your own, measured in turns.

The same turns, times and intervals as in `helpers.measurement.benchmark`, for files with any
inputs and outputs. Used by `python -m helpers benchmark` (docs/cli.md).
"""

import math
import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from helpers.errors import InputError
from helpers.inference.file_runners import FileRunner
from helpers.measurement.benchmark import (
    ROUNDING,
    BenchmarkError,
    bootstrap_ratio,
    bounds,
    latency,
    take_turns,
)
from helpers.metrics import max_relative_error

AGAIN = "dense again"  # the control: the first file, loaded a second time


def compare_files(
    runners: Mapping[str, FileRunner],
    seconds: float = 3.0,
    warmup: float = 0.2,
    rounds: int = 12,
) -> pd.DataFrame:
    """Time several files on their inputs in turns, and compare them with the first.

    Args:
        runners: by their names in the table, with inputs in place.
        seconds: least time to measure, for each runner.
        warmup: seconds to run each before measuring.
        rounds: each runner gets two turns in each.

    Returns:
        One row for each runner, times of one run in milliseconds, with `network`, `p50`, `p90`,
        `p95`, `p99`, `mean`, `runs`, `runs_per_second`, and `speedup` over the first runner at
        the median with the ends of its 95 % interval, `speedup_low` and `speedup_high`. On a
        GPU also `gpu_p50` (by CUDA events) and `overhead_p50` (what the host adds).

    Raises:
        InputError: there is nothing to measure.
        BenchmarkError: an output is not finite, or outputs changed while they were
            measured.
    """
    if not (runners and rounds >= 1 and 0 <= seconds < math.inf and 0 <= warmup < math.inf):
        raise InputError(
            f"{len(runners)} files cannot be measured in {rounds} rounds for {seconds} s after "
            f"{warmup} s: give at least one file, one round, and no negative seconds."
        )
    answers = {name: _warm_up(name, runner, warmup) for name, runner in runners.items()}
    measured = take_turns(list(runners.values()), seconds, rounds, "rounds")
    for name, runner in runners.items():
        _check_unchanged(name, runner.fetch(), answers[name])
    latencies = [latency(own, batch=1) for own in measured]
    rows = []
    for name, own in zip(runners, latencies, strict=True):
        row = own.row()
        del row["batch"]
        row["runs_per_second"] = row.pop("images_per_second")
        ratio = bootstrap_ratio(latencies[0].rounds, own.rounds)
        rows.append({"network": name, **row, **bounds("speedup", ratio)})
    return pd.DataFrame(rows)


def describe_comparison(table: pd.DataFrame, name: str) -> str:
    """Return in one sentence whether a file is faster than the first one of a comparison.

    A difference counts if its 95 % interval lies beyond 1 and beyond that of the first file
    against itself.

    Args:
        table: as `compare_files` returns it, with the row `dense again`.
        name: of the row to describe.
    """
    rows = table.set_index("network")
    row, chance = rows.loc[name], rows.loc[AGAIN]
    ratio = f"{row.speedup:.2f}x [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    if row.speedup_low > max(1, chance.speedup_high):
        return f"{name} is faster than dense: {ratio}."
    if row.speedup_high < min(1, chance.speedup_low):
        return f"{name} is slower than dense: {ratio}."
    return f"No difference between {name} and dense is clear of chance: {ratio}."


def _warm_up(name: str, runner: FileRunner, seconds: float) -> dict[str, Tensor]:
    """Run for some seconds and return the outputs, which must be finite."""
    until = time.perf_counter() + seconds
    runner.run()
    answer = runner.fetch()
    while time.perf_counter() < until:
        runner.run()
    for output, numbers in answer.items():
        if not _is_finite(numbers):
            raise BenchmarkError(
                f"{name}, {runner.name}: the output {output} is not finite on these inputs, so "
                "weights are NaN or infinite, or the inputs are not what the model expects. "
                "Give real inputs."
            )
    return answer


def _is_finite(numbers: Tensor) -> bool:
    return not numbers.dtype.is_floating_point or bool(torch.isfinite(numbers.float()).all())


def _check_unchanged(name: str, after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for output, expected in before.items():
        found = after[output]
        same = found.shape == expected.shape
        if same and expected.numel():
            same = max_relative_error(found, expected) < ROUNDING
        if not same:
            raise BenchmarkError(
                f"{name}: the output {output} of the same inputs changed while it was measured, "
                "so the model does not always do the same work. Remove its random operators."
            )
