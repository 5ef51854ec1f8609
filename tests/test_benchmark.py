import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import benchmark
from helpers.benchmark import latency, speedup, sweep, time_in_turns
from helpers.energy import EnergyError
from helpers.runners import Runner

IMAGES = torch.zeros(4, 1, 2, 2)


class FakeRunner(Runner):
    """Notes its calls and takes as long as it is told, on a clock that it moves itself."""

    def __init__(self, name: str, calls: list[str], clock=None, seconds: float = 0.0) -> None:
        self.name, self.calls, self.clock, self.seconds = name, calls, clock, seconds
        self.first = 0.0  # what the first run takes on top

    def load(self, images: torch.Tensor) -> None:
        self.calls.append(f"load {self.name}")

    def run(self) -> None:
        self.calls.append(self.name)
        if self.clock is not None:
            self.clock.now += self.seconds + self.first
            self.first = 0.0

    def fetch(self) -> torch.Tensor:
        raise AssertionError("fetching is not part of the benchmark")


def pair(clock, dense: float = 0.25, sparse: float = 0.125) -> dict[str, FakeRunner]:
    calls: list[str] = []
    return {
        "dense": FakeRunner("dense", calls, clock, dense),
        "sparse": FakeRunner("sparse", calls, clock, sparse),
    }


# --- one runner ----------------------------------------------------------------------------


def test_percentiles_and_mean_by_hand():
    result = latency([0.001 * n for n in range(1, 102)], batch=8)  # 1 ms to 101 ms
    assert (result.p50, result.p90, result.p99) == pytest.approx((51, 91, 100))
    assert result.mean == pytest.approx(51)
    assert (result.batch, result.runs) == (8, 101)


def test_throughput_is_images_over_mean_time():
    result = latency([0.010, 0.010, 0.040], batch=32)
    assert result.images_per_second == pytest.approx(1600)  # 32 images in 20 ms
    assert repr(result) == (
        "batch 32: p50 10.00 ms, p90 34.00 ms, p99 39.40 ms, 1,600 images/s (3 runs)"
    )


# --- several in turns ----------------------------------------------------------------------


def test_the_runners_take_turns_forth_and_back(clock):
    calls: list[str] = []
    runners = [FakeRunner(name, calls, clock, 1.0) for name in "abc"]
    time_in_turns(runners, IMAGES, seconds=1, warmup=0)
    warmup = ["load a", "a", "load b", "b", "load c", "c"]
    rounds = ["bcaacb", "cabbac", "abccba", "bcaacb", "cabbac"]
    assert calls == warmup + list("".join(rounds))  # ten runs of each at the least


def test_every_runner_is_measured_for_the_time_asked_for(clock):
    slow, fast = time_in_turns(list(pair(clock).values()), IMAGES, seconds=5, warmup=0)
    assert (slow.runs, fast.runs) == (40, 40)  # 5 s of the faster one
    assert slow.batch == fast.batch == len(IMAGES)
    assert (slow.mean, fast.mean) == (250, 125)


def test_the_warm_up_does_not_count(clock):
    runners = pair(clock)
    for runner in runners.values():
        runner.first = 100.0
    for result, runner in zip(
        time_in_turns(list(runners.values()), IMAGES, seconds=1, warmup=0), runners.values(),
        strict=True,
    ):  # fmt: skip
        assert result.mean == 1000 * runner.seconds


def test_the_warm_up_lasts_as_long_as_asked(clock):
    calls: list[str] = []
    time_in_turns([FakeRunner("a", calls, clock, 0.25)], IMAGES, seconds=0, warmup=2)
    assert calls.count("a") == 8 + 10  # 2 s of warm-up, then the ten runs


# --- the table -----------------------------------------------------------------------------

COLUMNS = ["network", "batch", "p50", "p90", "p99", "mean", "runs", "images_per_second"]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_sweep_has_a_row_for_each_runner_and_batch(clock, no_gpu):
    table = sweep(pair(clock), (1, 2, 2), batches=(1, 4), seconds=1)
    assert list(table.columns) == COLUMNS, "and no energy without a GPU"
    assert list(zip(table.batch, table.network, strict=True)) == [
        (1, "dense"), (1, "sparse"), (4, "dense"), (4, "sparse"),
    ]  # fmt: skip
    assert list(table.p50) == [250, 125, 250, 125]
    assert list(table.images_per_second) == [4, 8, 16, 32]


def test_all_runners_get_the_same_random_images(clock, no_gpu, monkeypatch):
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(FakeRunner, "load", lambda self, images: seen.append(images))
    for _ in range(2):
        sweep(pair(clock), (1, 2, 2), batches=(3,), seconds=0, seed=7)
    assert seen[0].shape == (3, 1, 2, 2)
    assert seen[0].std() > 0
    assert all(torch.equal(seen[0], images) for images in seen[1:])


def test_on_a_gpu_the_energy_of_each_runner_is_measured(clock, fake_gpu, monkeypatch):
    joules = {"dense": 0.5, "sparse": 0.25}
    monkeypatch.setattr(benchmark, "EnergyCounter", lambda: "the counter")

    def measured(work, counter: str) -> float:
        assert counter == "the counter"
        return joules[work.__self__.name]

    monkeypatch.setattr(benchmark, "joules_per_call", measured)
    table = sweep(pair(clock), (1, 2, 2), batches=(1, 4), seconds=0)
    assert list(table.columns) == [*COLUMNS, "images_per_joule"]
    assert list(table.images_per_joule) == [2, 4, 8, 16]


def test_a_gpu_without_an_energy_counter_is_told_and_costs_only_that_column(
    clock, fake_gpu, monkeypatch, capsys
):
    def refuse() -> None:
        raise EnergyError("this GPU counts no energy")

    monkeypatch.setattr(benchmark, "EnergyCounter", refuse)
    table = sweep(pair(clock), (1, 2, 2), batches=(1,), seconds=0)
    assert list(table.columns) == COLUMNS
    assert table.p50.notna().all()
    assert "this GPU counts no energy" in capsys.readouterr().out


def test_the_speed_up_is_the_ratio_of_the_medians():
    table = pd.DataFrame(
        {
            "network": ["dense", "sparse", "dense", "sparse"],
            "batch": [1, 1, 8, 8],
            "p50": [3.0, 2.0, 8.0, 10.0],
            "mean": [9.0, 1.0, 9.0, 1.0],
        }
    )
    ratios = speedup(table)
    assert ratios.to_dict() == {1: 1.5, 8: 0.8}
    assert ratios.name == "speed-up"
    assert np.allclose(speedup(table, base="sparse", other="dense"), 1 / ratios)
    assert not any(map(math.isnan, ratios))
