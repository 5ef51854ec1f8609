"""Latency and throughput of runners, measured side by side.

Explained in `06_infer_and_benchmark.ipynb`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from helpers.energy import EnergyCounter, EnergyError, joules_per_call
from helpers.runners import Runner


@dataclass(frozen=True)
class Latency:
    """The times of many runs at one batch size, in milliseconds."""

    batch: int
    p50: float
    p90: float
    p99: float
    mean: float
    runs: int

    @property
    def images_per_second(self) -> float:
        """Throughput: images over mean time, with nothing between the runs."""
        return 1000 * self.batch / self.mean

    def __repr__(self) -> str:
        return (
            f"batch {self.batch}: p50 {self.p50:.2f} ms, p90 {self.p90:.2f} ms, "
            f"p99 {self.p99:.2f} ms, {self.images_per_second:,.0f} images/s ({self.runs} runs)"
        )


def latency(times: Sequence[float], batch: int) -> Latency:
    """Sum up the times of single runs, given in seconds."""
    milliseconds = 1000 * np.asarray(times)
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    return Latency(batch, p50, p90, p99, float(milliseconds.mean()), len(times))


def time_in_turns(
    runners: Sequence[Runner], images: torch.Tensor, seconds: float, warmup: float = 0.2
) -> list[Latency]:
    """Time several runners on the same images, in turns.

    They run one after the other and then in the opposite order (ABBA), again and
    again and each time beginning with the next one, so that a machine that grows
    slower or faster does so for all of them.
    Moving the images to the device is not timed.

    Args:
        runners: the networks to compare.
        images: one batch (N, C, H, W).
        seconds: least time to measure, for each runner.
        warmup: seconds to run each before measuring.

    Returns:
        The latencies, in the order of the runners.
    """
    for runner in runners:
        runner.load(images)
        until = time.perf_counter() + warmup
        runner.run()
        while time.perf_counter() < until:
            runner.run()
    times: list[list[float]] = [[] for _ in runners]
    order = list(range(len(runners)))
    while min(map(sum, times)) < seconds or len(times[0]) < 10:
        order.append(order.pop(0))  # so that nobody always follows the same one
        for turn in order + order[::-1]:
            start = time.perf_counter()
            runners[turn].run()
            times[turn].append(time.perf_counter() - start)
    return [latency(own, len(images)) for own in times]


def sweep(
    runners: dict[str, Runner],
    image_shape: tuple[int, int, int],
    batches: Sequence[int],
    seconds: float,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure runners over batch sizes, on random images.

    Args:
        runners: by the name they get in the table, such as "dense" and "sparse".
        image_shape: channels, height and width.
        batches: batch sizes.
        seconds: least time to measure for each runner and batch size.
        seed: of the random images.

    Returns:
        One row for each runner and batch: `network`, `batch`, `p50`, `p90`, `p99` and
        `mean` in milliseconds, `runs`, `images_per_second`, and `images_per_joule`
        where there is a GPU with an energy counter.
    """
    counter = _gpu_energy()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch in tqdm(batches, desc="batch sizes", leave=False):
        images = torch.randn(batch, *image_shape, generator=generator)
        results = time_in_turns(list(runners.values()), images, seconds)
        for (name, runner), result in zip(runners.items(), results, strict=True):
            row = {"network": name, **vars(result)}
            row["images_per_second"] = result.images_per_second
            if counter is not None:
                row["images_per_joule"] = batch / joules_per_call(runner.run, counter)
            rows.append(row)
    return pd.DataFrame(rows)


def _gpu_energy() -> EnergyCounter | None:
    if not torch.cuda.is_available():
        return None
    try:
        return EnergyCounter()
    except EnergyError as error:
        print(error)
        return None


def speedup(table: pd.DataFrame, base: str = "dense", other: str = "sparse") -> pd.Series:
    """Return how many times faster `other` is than `base` at the median, for each batch."""
    p50 = table.pivot(index="batch", columns="network", values="p50")
    return (p50[base] / p50[other]).rename("speed-up")
