import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import InputError
from helpers.inference.runners import Runner, TorchRunner
from helpers.measurement import benchmark
from helpers.measurement.benchmark import (
    BenchmarkError,
    Latency,
    Ratio,
    bootstrap_ratio,
    check_outputs,
    energy_in_turns,
    perf_per_watt_by_batch,
    speedup_by_batch,
    sweep,
    time_in_turns,
    time_transfers,
)
from helpers.measurement.energy import EnergyError, EnergyWindow

IMAGES = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


class FakeRunner(Runner):
    """Notes its calls and takes as long as it is told, on a clock that it moves itself."""

    on_gpu = True

    def __init__(self, name: str, calls: list[str], clock, seconds: float = 0.125) -> None:
        self.name, self.calls, self.clock, self.seconds = name, calls, clock, seconds
        self.first = 0.0  # what the first run takes on top
        self.gpu: float | None = None  # seconds of each run that the GPU computes

    def load(self, images: torch.Tensor) -> None:
        self.calls.append(f"load {self.name}")
        self.clock.now += 0.5
        self.images = images

    def run(self) -> None:
        self.calls.append(self.name)
        self.clock.now += self.seconds + self.first
        self.first = 0.0
        self.logits = self.answer(self.images.flatten(1))

    def answer(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.cumsum(1)

    def fetch(self) -> torch.Tensor:
        self.calls.append(f"fetch {self.name}")
        self.clock.now += 0.25
        return self.logits

    def invalidate_output(self) -> None:
        self.calls.append(f"invalidate {self.name}")
        self.logits = torch.full_like(self.logits, float("nan"))

    def gpu_seconds(self) -> float | None:
        return self.gpu


def pair(clock, dense: float = 0.25, sparse: float = 0.125) -> dict[str, FakeRunner]:
    calls: list[str] = []
    return {
        "dense": FakeRunner("dense", calls, clock, dense),
        "sparse": FakeRunner("sparse", calls, clock, sparse),
    }


# --- the figures of many runs --------------------------------------------------------------


def test_percentiles_and_mean_by_hand():
    milliseconds = np.arange(1.0, 102)  # 1 to 101
    row = Latency(8, (milliseconds[:50], milliseconds[50:])).row()
    assert (row["p50"], row["p90"], row["p95"], row["p99"]) == (51, 91, 96, 100)
    assert row["mean"] == pytest.approx(51)
    assert (row["batch"], row["runs"]) == (8, 101)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=300), st.sampled_from([90, 95, 99]))
def test_a_percentile_is_the_run_that_trtexec_takes(times, share):
    count = len(times)
    expected = sorted(times)[max(count - 1 - (100 - share) * count // 100, 0)]
    assert Latency(1, (np.array(times),)).percentile(share) == expected


def test_throughput_is_images_over_mean_time():
    result = Latency(32, (np.array([10.0, 10.0]), np.array([40.0])))
    assert result.images_per_second == pytest.approx(1600)  # 32 images in 20 ms
    assert repr(result) == "batch 32: p50 10.00 ms, p99 40.00 ms, 1,600 images/s (3 runs)"


def test_the_overhead_is_host_time_minus_gpu_time():
    rounds = (np.array([10.0, 11.0]), np.array([30.0]))
    row = Latency(1, rounds, gpu=np.array([9.0, 9.5, 29.0])).row()
    assert row["gpu_p50"] == 9.5
    assert row["overhead_p50"] == pytest.approx(1)
    assert {"gpu_p50", "overhead_p50"}.isdisjoint(Latency(1, rounds).row())


# --- correct before fast ---


def network(scale: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    model[1].weight.data *= scale
    return model


def test_the_maximum_relative_error_of_a_runner_is_returned(no_gpu):
    assert check_outputs(TorchRunner(network()), network(), (1, 2, 2), batch=4) < 1e-6
    gap = check_outputs(TorchRunner(network(1.001)), network(), (1, 2, 2), batch=4)
    assert 1e-4 < gap < 1e-2


def test_a_runner_that_computes_something_else_is_refused(no_gpu):
    with pytest.raises(BenchmarkError, match=r"4 random images differ .* where 0\.01 is allowed"):
        check_outputs(TorchRunner(network(1.1)), network(), (1, 2, 2), batch=4)


def test_a_runner_that_leaves_old_logits_is_refused_even_if_correct(no_gpu, monkeypatch):
    runner = TorchRunner(network())
    run, calls = runner.run, []

    def only_every_other_time() -> None:
        calls.append(0)
        if len(calls) % 2:
            run()

    monkeypatch.setattr(runner, "run", only_every_other_time)
    with pytest.raises(BenchmarkError, match="differ from the model's by nan"):
        check_outputs(runner, network(), (1, 2, 2), batch=4)


# --- several in turns ----------------------------------------------------------------------


def test_the_runners_take_turns_in_order_and_in_reverse(clock):
    calls: list[str] = []
    runners = [FakeRunner(name, calls, clock, 1.0) for name in "abc"]
    time_in_turns(runners, IMAGES, seconds=6, warmup=0, rounds=3)
    turns = [call for call in calls if len(call) == 1][2 * 3 :]  # two runs each to warm up
    turn = 1 + 1  # one run that does not count, one of a second
    rounds = ["bcaacb", "cabbac", "abccba"]
    assert "".join(turns) == "".join(name * turn for name in "".join(rounds))


def test_every_runner_is_measured_for_the_time_asked_for(clock):
    slow, fast = time_in_turns(list(pair(clock).values()), IMAGES, seconds=5, warmup=0, rounds=5)
    assert slow.times.sum() == fast.times.sum() == 5000
    assert [len(own) for own in slow.rounds] == 5 * [4]
    assert [len(own) for own in fast.rounds] == 5 * [8]
    assert slow.batch == fast.batch == len(IMAGES)
    assert (slow.p50, fast.p50) == (250, 125)
    assert slow.gpu is None


def test_a_slow_runner_runs_in_every_turn(clock):
    (result,) = time_in_turns([FakeRunner("a", [], clock, 100.0)], IMAGES, seconds=1, rounds=4)
    assert [len(own) for own in result.rounds] == 4 * [2]


def test_another_clock_can_be_given(clock):
    """Here it counts half of the time, as a thread's own does that waits for the other half."""
    (result,) = time_in_turns(
        [FakeRunner("a", [], clock, 0.25)], IMAGES, seconds=1, clock=lambda: clock.now / 2
    )
    assert set(result.times) == {125}


def test_the_warm_up_does_not_count(clock):
    runners = pair(clock)
    for runner in runners.values():
        runner.first = 100.0
    results = time_in_turns(list(runners.values()), IMAGES, seconds=1, warmup=0)
    for result, runner in zip(results, runners.values(), strict=True):
        assert set(result.times) == {1000 * runner.seconds}


def test_the_first_run_of_a_turn_does_not_count(clock):
    """Another runner's weights are in the caches then."""
    calls: list[str] = []

    class Cached(FakeRunner):
        def run(self) -> None:
            self.first = 10.0 * (bool(calls) and calls[-1] != self.name)
            super().run()

    runners = [Cached(name, calls, clock) for name in "ab"]
    for result in time_in_turns(runners, IMAGES, seconds=3):
        assert set(result.times) == {125}


def test_the_warm_up_lasts_as_long_as_asked(clock):
    calls: list[str] = []
    time_in_turns([FakeRunner("a", calls, clock, 0.25)], IMAGES, seconds=0, warmup=2, rounds=1)
    warmup = 7  # and a fetch of 0.25 s are 2 s
    assert calls.count("a") == 1 + warmup + 2 * 2  # other images, warm-up, two turns


def test_the_gpus_time_is_kept_beside_the_hosts(clock):
    runner = FakeRunner("a", [], clock, 0.25)
    runner.gpu = 0.2
    (result,) = time_in_turns([runner], IMAGES, seconds=1, rounds=1)
    assert set(result.gpu) == {200}
    assert len(result.gpu) == len(result.times)


@pytest.mark.parametrize("images", [torch.zeros(4, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)])
def test_constant_images_are_not_timed(clock, images):
    runner = FakeRunner("a", [], clock)
    with pytest.raises(InputError, match="use random images"):
        time_in_turns([runner], images)
    assert runner.calls == []


def test_a_runner_whose_logits_are_not_finite_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(FakeRunner, "answer", lambda self, pixels: pixels / 0)
    with pytest.raises(BenchmarkError, match="net: the logits of 4 random images are not all fin"):
        time_in_turns([FakeRunner("net", [], clock)], IMAGES)


def test_a_runner_that_never_writes_its_logits_is_not_timed(clock, monkeypatch):
    buffer = torch.randn(4, 10)
    monkeypatch.setattr(FakeRunner, "answer", lambda self, pixels: buffer)
    with pytest.raises(BenchmarkError, match=r"net: two different batches .* the same logits"):
        time_in_turns([FakeRunner("net", [], clock)], IMAGES)


def test_a_runner_that_leaves_its_old_logits_is_not_timed(clock):
    class Idle(FakeRunner):
        def run(self) -> None:
            if not hasattr(self, "logits") or len(self.calls) < 3:
                super().run()

    with pytest.raises(BenchmarkError, match="net: the logits of 4 random images are not all fin"):
        time_in_turns([Idle("net", [], clock)], IMAGES)


@pytest.mark.parametrize("damage", [0.01, float("nan")])
def test_logits_that_change_while_timing_are_refused(clock, damage):
    class Drifting(FakeRunner):
        buffer = torch.zeros(4, 4)  # one for all runs, so that a view of it would change too

        def answer(self, pixels: torch.Tensor) -> torch.Tensor:
            self.buffer.copy_(pixels)
            return self.buffer.add_(damage) if self.clock.now > 10 else self.buffer

    with pytest.raises(BenchmarkError, match="net: its logits of the same images moved by"):
        time_in_turns([Drifting("net", [], clock)], IMAGES, seconds=20)


def test_rounding_that_varies_from_run_to_run_is_no_change(clock, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        FakeRunner,
        "answer",
        lambda self, pixels: pixels + 1e-5 * torch.rand(pixels.shape, generator=generator),
    )
    time_in_turns([FakeRunner("net", [], clock)], IMAGES)


def test_a_real_runner_is_timed(tiny_net):
    runner = TorchRunner(tiny_net)
    images = torch.randn(2, 1, 28, 28)
    first, second = time_in_turns([runner, runner], images, seconds=0.02, warmup=0.0, rounds=2)
    assert min(first.times.min(), second.times.min()) > 0
    assert set(time_transfers(runner, images)) == {"load_p50", "fetch_p50"}


def test_transfers_are_measured_separately(clock, no_gpu):
    runner = FakeRunner("a", [], clock)
    assert time_transfers(runner, IMAGES, repeats=3) == {"load_p50": 500, "fetch_p50": 250}
    assert runner.calls == 3 * ["load a", "a", "fetch a"], (
        "nothing is fetched that was not computed"
    )


# --- the interval --------------------------------------------------------------------------


def rounds_of(*medians: float) -> list[np.ndarray]:
    return [np.array([0.9, 1.0, 1.1]) * median for median in medians]


def test_a_ratio_without_noise_has_no_width():
    assert bootstrap_ratio(rounds_of(3, 3, 3), rounds_of(2, 2, 2)) == Ratio(1.5, 1.5, 1.5)


def test_a_shared_drift_does_not_widen_the_interval():
    drift = np.array([1.0, 1.5, 2.0, 4.0])
    ratio = bootstrap_ratio(rounds_of(*3 * drift), rounds_of(*2 * drift))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_more_runs_in_a_round_do_not_narrow_the_interval():
    """Else a longer measurement would promise what only more rounds can."""
    above, below = rounds_of(2.0, 2.6, 2.2, 2.1), rounds_of(1.0, 1.2, 0.9, 1.1)
    few = bootstrap_ratio(above, below)
    many = bootstrap_ratio([np.tile(a, 50) for a in above], [np.tile(b, 50) for b in below])
    assert (many.low, many.high) == pytest.approx((few.low, few.high))
    assert few.low < few.value < few.high


def test_the_seed_fixes_the_interval():
    generator = np.random.default_rng(1)
    above, below = generator.lognormal(size=(2, 8, 5))
    assert bootstrap_ratio(above, below, seed=3) == bootstrap_ratio(above, below, seed=3)
    assert bootstrap_ratio(above, below, seed=3) != bootstrap_ratio(above, below, seed=4)


def test_three_rounds_give_the_range_of_their_ratios():
    above = [np.array([value]) for value in (1.0, 2.0, 4.0)]
    below = [np.array([1.0])] * 3
    ratio = bootstrap_ratio(above, below, np.mean)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((7 / 3, 1, 4))


def test_a_single_round_has_no_interval():
    ratio = bootstrap_ratio(rounds_of(3), rounds_of(2))
    assert ratio.value == 1.5
    assert math.isnan(ratio.low)
    assert math.isnan(ratio.high)


@given(
    st.lists(st.tuples(*2 * [st.floats(0.1, 100)]), min_size=2, max_size=8),
    st.floats(0.01, 100),
    st.floats(0.01, 100),
)
def test_units_scale_the_ratio_and_its_interval_alike(medians, above_unit, below_unit):
    above, below = (rounds_of(*side) for side in zip(*medians, strict=True))
    plain = bootstrap_ratio(above, below, resamples=50)
    scaled = bootstrap_ratio(
        [above_unit * own for own in above], [below_unit * own for own in below], resamples=50
    )
    factor = above_unit / below_unit
    assert plain.low <= plain.high
    for name in ("value", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(factor * getattr(plain, name))


def test_the_interval_covers_the_true_ratio_as_often_as_stated():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        state = generator.lognormal(sigma=0.05, size=(10, 1))  # of the machine, in each round
        own = generator.lognormal(sigma=0.02, size=(2, 10, 1))  # of each contender in it
        runs = generator.lognormal(sigma=0.02, size=(2, 10, 9))
        above, below = state * own * runs * [[[1.2]], [[1.0]]]
        ratio = bootstrap_ratio(above, below, resamples=100)
        held += ratio.low <= 1.2 <= ratio.high
    assert 170 <= held <= 199  # 190 are promised; ten rounds keep a little less


def test_a_ratio_reads_as_a_factor_with_its_interval():
    assert str(Ratio(1.234, 1.2, 1.3)) == "1.23x [1.20, 1.30]"


# --- the table -----------------------------------------------------------------------------

COLUMNS = [
    "network", "batch", "p50", "p90", "p95", "p99", "mean", "runs", "images_per_second",
    "load_p50", "fetch_p50", "speedup", "speedup_low", "speedup_high",
]  # fmt: skip
ENERGY = [
    "images_per_joule", "watts", "sm_mhz", "celsius", "throttles",
    "perf_per_watt", "perf_per_watt_low", "perf_per_watt_high", "idle_watts",
]  # fmt: skip


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_sweep_has_a_row_for_each_runner_and_batch(clock, no_gpu):
    table = sweep(pair(clock), (1, 2, 2), batch_sizes=(1, 4), seconds=1)
    assert list(table.columns) == COLUMNS, "and no energy without a GPU"
    assert list(zip(table.batch, table.network, strict=True)) == [
        (1, "dense"), (1, "sparse"), (4, "dense"), (4, "sparse"),
    ]  # fmt: skip
    assert list(table.p50) == [250, 125, 250, 125]
    assert list(table.images_per_second) == [4, 8, 16, 32]
    for column in ("speedup", "speedup_low", "speedup_high"):
        assert list(table[column]) == [1, 2, 1, 2]


def test_all_runners_get_the_same_random_images(clock, no_gpu, monkeypatch):
    seen: list[torch.Tensor] = []
    load = FakeRunner.load

    def spy(self, images: torch.Tensor) -> None:
        seen.append(images)
        load(self, images)

    monkeypatch.setattr(FakeRunner, "load", spy)
    for _ in range(2):
        sweep(pair(clock), (1, 2, 2), batch_sizes=(3,), seconds=0, seed=7)
    assert seen[0].shape == (3, 1, 2, 2)
    assert seen[0].std() > 0
    kinds = {tuple(images.flatten().tolist()) for images in seen}
    assert kinds == {tuple((sign * seen[0]).flatten().tolist()) for sign in (1, -1)}


def window(joules: float, calls: int = 10, **changed: object) -> EnergyWindow:
    facts = {"seconds": 5.0, "sm_mhz": 1500.0, "celsius": 60, "throttles": frozenset()}
    return EnergyWindow(calls=calls, joules=joules, **(facts | changed))


def test_on_a_gpu_the_energy_of_each_runner_is_measured(clock, fake_gpu, monkeypatch):
    windows = {
        "dense": iter(5 * [window(600, celsius=50, throttles=frozenset({"power cap"}))]),
        "sparse": iter(3 * [window(400), window(500, celsius=70, sm_mhz=1600.0)]),
    }
    monkeypatch.setattr(benchmark, "EnergyCounter", lambda: "the counter")
    monkeypatch.setattr(benchmark, "idle_watts", lambda counter: 42.0)

    def measured(work, counter: str) -> EnergyWindow:
        assert counter == "the counter"
        return next(windows[work.__self__.name])

    monkeypatch.setattr(benchmark, "measure_energy", measured)
    table = sweep(pair(clock), (1, 2, 2), batch_sizes=(9, 18), seconds=0, energy_rounds=2)
    assert list(table.columns) == [*COLUMNS, *ENERGY]
    assert list(table.images_per_joule) == [9 / 60, 9 / 45, 18 / 60, 18 / 45]
    dense, sparse = table.to_dict("records")[:2]
    assert (dense["watts"], sparse["watts"]) == (120, 90)
    assert (dense["celsius"], sparse["celsius"]) == (50, 70)
    assert (dense["sm_mhz"], sparse["sm_mhz"]) == (1500, 1550)
    assert (dense["throttles"], sparse["throttles"]) == ("power cap", "")
    again = sweep(pair(clock), (1, 2, 2), batch_sizes=(9,), seconds=0, energy_rounds=1, idle=7.0)
    assert set(again.idle_watts) == {7}, "not measured again"
    assert (dense["perf_per_watt"], sparse["perf_per_watt"]) == pytest.approx((1, 60 / 45))
    assert sparse["perf_per_watt_low"] == pytest.approx(60 / 50)
    assert sparse["perf_per_watt_high"] == pytest.approx(60 / 40)
    assert set(table.idle_watts) == {42}


def test_on_a_cpu_the_energy_is_the_processors(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "CpuEnergyCounter", lambda: "the processor's counter")
    monkeypatch.setattr(benchmark, "idle_watts", lambda counter: 42.0)

    def measured(work, counter: str) -> EnergyWindow:
        assert counter == "the processor's counter"
        return EnergyWindow(
            calls=10, joules=600 if work.__self__.name == "dense" else 400, seconds=1
        )

    monkeypatch.setattr(benchmark, "measure_energy", measured)
    table = sweep(pair(clock), (1, 2, 2), batch_sizes=(9,), seconds=0, energy_rounds=2)
    clocks = {"sm_mhz", "celsius", "throttles"}
    assert list(table.columns) == [*COLUMNS, *(name for name in ENERGY if name not in clocks)]
    assert list(table.images_per_joule) == [9 / 60, 9 / 40]
    assert list(table.perf_per_watt) == pytest.approx([1, 1.5])


def test_runners_on_the_cpu_of_a_machine_with_a_gpu_use_the_processors_energy(
    clock, fake_gpu, monkeypatch, caplog
):
    def refuse() -> None:
        raise EnergyError("this processor counts no energy")

    monkeypatch.setattr(FakeRunner, "on_gpu", False)
    monkeypatch.setattr(benchmark, "CpuEnergyCounter", refuse)
    sweep(pair(clock), (1, 2, 2), batch_sizes=(1,), seconds=0)
    assert "this processor counts no energy" in caplog.text


def test_energy_windows_alternate_their_order(clock, monkeypatch):
    order: list[str] = []

    def measured(work, counter: object) -> EnergyWindow:
        order.append(work.__self__.name)
        return window(len(order))

    monkeypatch.setattr(benchmark, "measure_energy", measured)
    runners = [FakeRunner(name, [], clock) for name in "abc"]
    for runner in runners:
        runner.load(IMAGES)
    windows = energy_in_turns(runners, "the counter", rounds=3)
    assert "".join(order) == "abccbaabc"
    assert [own.joules for own in windows[0]] == [1, 6, 7]


def test_logits_that_change_while_energy_is_measured_are_refused(clock, monkeypatch):
    def measured(work, counter: object) -> EnergyWindow:
        work.__self__.images = IMAGES + 1
        work()
        return window(1)

    monkeypatch.setattr(benchmark, "measure_energy", measured)
    runner = FakeRunner("net", [], clock)
    runner.load(IMAGES)
    with pytest.raises(BenchmarkError, match="net: its logits of the same images moved by"):
        energy_in_turns([runner], "the counter")


def test_a_gpu_without_an_energy_counter_loses_only_those_columns(
    clock, fake_gpu, monkeypatch, caplog
):
    def refuse() -> None:
        raise EnergyError("this GPU counts no energy")

    monkeypatch.setattr(benchmark, "EnergyCounter", refuse)
    table = sweep(pair(clock), (1, 2, 2), batch_sizes=(1,), seconds=0)
    assert list(table.columns) == COLUMNS
    assert table.p50.notna().all()
    assert "this GPU counts no energy" in caplog.text


def test_a_stuck_counter_is_detected_before_measuring(clock, fake_gpu, monkeypatch, caplog):
    def stuck(counter: object) -> float:
        raise EnergyError("it stands still")

    monkeypatch.setattr(benchmark, "EnergyCounter", lambda: "the counter")
    monkeypatch.setattr(benchmark, "idle_watts", stuck)
    table = sweep(pair(clock), (1, 2, 2), batch_sizes=(1,), seconds=0)
    assert list(table.columns) == COLUMNS
    assert "it stands still" in caplog.text


@pytest.mark.parametrize(
    "how", [{"rounds": 0}, {"seconds": -1}, {"seconds": float("nan")}, {"warmup": float("nan")}]
)
def test_zero_seconds_are_refused(clock, how):
    with pytest.raises(InputError, match="cannot be measured in"):
        time_in_turns(list(pair(clock).values()), IMAGES, **how)


def test_without_runners_or_images_nothing_is_timed(clock):
    with pytest.raises(InputError, match="0 runners cannot be measured"):
        time_in_turns([], IMAGES)
    with pytest.raises(InputError, match=r"batch of shape \(0, .* holds no images"):
        time_in_turns(list(pair(clock).values()), IMAGES[:0])


@pytest.mark.parametrize("names", [(), ("sparse", "dense")])
def test_a_sweep_starts_with_dense(clock, names):
    runners = {name: FakeRunner(name, [], clock) for name in names}
    with pytest.raises(InputError, match='must be "dense"'):
        sweep(runners, (1, 2, 2), batch_sizes=(1,))


@pytest.mark.parametrize("how", [{"batch": 0}, {"batch": 1, "repeats": 0}])
def test_a_check_of_nothing_is_refused(clock, how):
    with pytest.raises(InputError, match="check nothing"):
        check_outputs(FakeRunner("net", [], clock), torch.nn.Flatten(), (1, 2, 2), **how)


def test_a_counter_that_fails_at_one_batch_costs_no_latency(clock, fake_gpu, monkeypatch, caplog):
    def measured(work, counter: str) -> EnergyWindow:
        if len(work.__self__.images) == 9:
            raise EnergyError("it was reset")
        return window(600)

    monkeypatch.setattr(benchmark, "EnergyCounter", lambda: "the counter")
    monkeypatch.setattr(benchmark, "idle_watts", lambda counter: 42.0)
    monkeypatch.setattr(benchmark, "measure_energy", measured)
    swept = sweep(pair(clock), (1, 2, 2), batch_sizes=(9, 18), seconds=0, energy_rounds=1)
    assert swept.p50.notna().all()
    assert swept.set_index("batch").images_per_joule.isna().groupby("batch").all().to_dict() == {
        9: True,
        18: False,
    }
    assert "batch 9: no energy. it was reset" in caplog.text


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "network": ["sparse", "dense", "dense", "sparse"],
            "batch": [1, 1, 8, 8],
            "p50": [2.0, 3.0, 8.0, 10.0],
            "images_per_joule": [6.0, 4.0, 5.0, 5.0],
            "speedup_low": [1.25, 1.0, 1.0, 0.75],
            "speedup_high": [1.75, 1.0, 1.0, 0.875],
            "perf_per_watt_low": [1.0, 1.0, 1.0, 0.5],
            "perf_per_watt_high": [2.0, 1.0, 1.0, 1.5],
        }
    )


def test_the_speed_up_is_the_ratio_of_the_medians():
    ratios = speedup_by_batch(table())
    assert list(ratios.columns) == ["value", "low", "high"]
    assert list(ratios.loc[1]) == [1.5, 1.25, 1.75]
    assert list(ratios.loc[8]) == [0.8, 0.75, 0.875]


def test_performance_per_watt_is_the_ratio_of_images_per_joule():
    ratios = perf_per_watt_by_batch(table())
    assert list(ratios.loc[1]) == [1.5, 1, 2]
    assert list(ratios.loc[8]) == [1, 0.5, 1.5]


def test_a_table_recorded_without_intervals_still_has_its_ratios():
    ratios = speedup_by_batch(table()[["network", "batch", "p50"]])
    assert list(ratios.value) == [1.5, 0.8]
    assert ratios[["low", "high"]].isna().all(axis=None)


def test_a_null_interval_in_json_is_nan():
    kept = table().astype(object)
    kept["speedup_low"] = kept["speedup_high"] = None
    assert speedup_by_batch(kept)[["low", "high"]].dtypes.eq(float).all()
    assert speedup_by_batch(kept)[["low", "high"]].isna().all(axis=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_a_sweep_on_a_gpu_measures_the_gpu(tiny_net):
    """Half a minute: idle power takes ten seconds, and each window of energy five."""
    runners = {name: TorchRunner(tiny_net) for name in ("dense", "sparse")}
    swept = sweep(runners, (1, 28, 28), batch_sizes=(64,), seconds=0.1, energy_rounds=2)
    assert (swept.gpu_p50 > 0).all()
    assert (swept.gpu_p50 <= swept.p50).all()
    if "watts" in swept:  # a GPU without a counter has none, and sweep has said so
        assert (swept.images_per_joule > 0).all()
        assert (swept.idle_watts > 0).all()


def test_the_ratios_of_a_sweep_are_those_of_its_rows(clock, no_gpu):
    swept = sweep(pair(clock, dense=0.3, sparse=0.2), (1, 2, 2), batch_sizes=(2,), seconds=2)
    assert list(speedup_by_batch(swept).loc[2]) == pytest.approx([1.5, 1.5, 1.5])
    assert swept.speedup[1] == pytest.approx(1.5)
