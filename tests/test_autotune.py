import copy
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from inference_cases import random
from torch import Tensor, nn

from helpers import machine
from helpers.errors import InputError, UnavailableError
from helpers.inference import autotune
from helpers.inference.autotune import Autotuner, host_times, host_times_apart
from helpers.inference.errors import DeadContextError, RunnerError
from helpers.inference.kernels import DenseGemm, DenseLayer, Kernel


class FakeTimer:
    """A timer that returns given times, and counts how often it measured two times."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.used = list(milliseconds), 0.0

    def __call__(self, calls: Sequence) -> list[float]:
        self.used += 0.5
        assert len(calls) == len(self.milliseconds)
        return self.milliseconds


def kernels_of(layer: nn.Module) -> list:
    return [DenseLayer(layer), DenseGemm(layer)]


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("dense", "gemm", "fastest"),
    [(2.0, 1.0, "dense GEMM"), (1.0, 2.0, "dense layer"), (1.0, 0.99, "dense layer")],
    ids=["faster", "slower", "within noise"],
)
def test_a_gemm_is_chosen_only_where_it_is_faster_by_more_than_noise(layer, dense, gemm, fastest):
    choice = Autotuner(FakeTimer(dense, gemm)).choose("fc", kernels_of(layer), random(8, 16))
    assert choice.kernel == fastest
    assert choice.milliseconds == {"dense layer": dense, "dense GEMM": gemm}


def test_a_kernel_that_rounds_is_compared_with_what_its_rounding_makes(layer):
    x = random(8, 16)

    class Rounded(DenseGemm):
        name = "rounded GEMM"
        promised = 1.0

        def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
            return super().multiply(rows).round()

        def expected(self, input: Tensor, reference: Tensor) -> Tensor:
            return self.promised * reference.round()

    with torch.inference_mode():
        rounded = Rounded(layer)
        choice = Autotuner(FakeTimer(2.0, 1.0)).choose("fc", [DenseLayer(layer), rounded], x)
        assert choice.kernel == "rounded GEMM"
        rounded.promised = 1.1
        with pytest.raises(RunnerError, match="the rounded GEMM does not return the numbers"):
            Autotuner(FakeTimer(2.0, 1.0)).choose("fc", [DenseLayer(layer), rounded], x)


def test_the_same_shape_is_measured_once_and_another_one_again(layer):
    timer = FakeTimer(2.0, 1.0)
    autotuner = Autotuner(timer)
    for name in ("layer1", "layer2"):
        autotuner.choose(name, kernels_of(layer), random(8, 16))
    assert timer.used == 1
    autotuner.choose("more rows", kernels_of(layer), random(9, 16))
    autotuner.choose("more outputs", kernels_of(nn.Linear(16, 32)), random(8, 16))
    autotuner.choose("without bias", kernels_of(nn.Linear(16, 16, bias=False)), random(8, 16))
    double = copy.deepcopy(layer).double()
    autotuner.choose("another type", kernels_of(double), random(8, 16).double())
    assert timer.used == 5
    autotuner.choose("the first again", kernels_of(layer), random(8, 16))
    assert timer.used == 5


def test_choices_are_kept_on_disk_for_the_same_processor_and_version(layer, tmp_path, monkeypatch):
    cache = tmp_path / "kernels.json"
    first = Autotuner(FakeTimer(2.0, 1.0), cache).choose("fc", kernels_of(layer), random(8, 16))
    again = FakeTimer(1.0, 2.0)
    assert Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16)) == first
    assert again.used == 0

    monkeypatch.setattr(machine, "cpu_name", lambda: "another CPU")
    elsewhere = Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16))
    assert (elsewhere.kernel, again.used) == ("dense layer", 1)
    monkeypatch.setattr(torch, "__version__", "9.9")
    Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16))
    assert again.used == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16))
    assert again.used == 3
    assert len(json.loads(cache.read_text())) == 4


def test_the_key_names_the_libraries_of_a_gpu(layer, monkeypatch):
    """Kernels come and go with them: a choice of another version does not count."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a fake GPU")
    monkeypatch.setattr(machine, "cuda_versions", lambda: {"cuda": "13.0", "cusparselt": "0.8.1"})
    x = MagicMock(spec=Tensor, is_cuda=True, shape=(8, 16), dtype=torch.float16)
    key = autotune.measurement_key(kernels_of(layer), x)
    assert key.startswith(f"a fake GPU, torch {torch.__version__}, cuda 13.0, cusparselt 0.8.1, ")
    assert "cuda" not in autotune.measurement_key(kernels_of(layer), random(8, 16))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("search", r"the odd kernel of fc, input 8x16 in float32, while its algorithms were tried"),
        ("call", r"the odd kernel of fc, input 8x16 in float32, with \{'alg_id': 3\} failed"),
        ("time", r"'odd kernel': \{'alg_id': 3\}.* of fc, input 8x16 in float32, while they were"),
    ],
)
def test_a_kernel_that_leaves_cuda_dead_is_named_with_its_algorithm(
    layer, tmp_path, monkeypatch, step, said
):
    dead = []

    def fail() -> None:
        dead.append(step)
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    class OddKernel(DenseGemm):
        name = "odd kernel"

        def search(self, input: Tensor) -> dict[str, int]:
            return fail() if step == "search" else {"alg_id": 3}

        def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
            return fail() if step == "call" else super().multiply(rows)

    def timer(calls: Sequence) -> list[float]:
        return fail() if step == "time" else [1.0 for _ in calls]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fail() if dead else None)
    cache = tmp_path / "kernels.json"
    with pytest.raises(DeadContextError, match=said):
        Autotuner(timer, cache).choose("fc", [DenseLayer(layer), OddKernel(layer)], random(8, 16))
    assert not cache.exists(), "nothing that a dead GPU said is kept"


def test_two_runners_that_share_a_cache_keep_each_others_choices(layer, tmp_path):
    cache = tmp_path / "kernels.json"
    one, two = (Autotuner(FakeTimer(2.0, 1.0), cache) for _ in range(2))
    one.choose("fc", kernels_of(layer), random(1, 16))
    two.choose("fc", kernels_of(layer), random(2, 16))
    one.choose("fc", kernels_of(layer), random(3, 16))
    assert len(json.loads(cache.read_text())) == 3


class FakeMachine:
    """A processor with a clock of its own, on which kernels take given times.

    Each of its `disturbances` makes some kernels slower for one measurement, as other programs
    do that want the cores.
    """

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.now = milliseconds, 0.0
        self.disturbances: list[dict[str, float]] = []
        self.disturbed: dict[str, float] = {}

    def run(self, name: str) -> None:
        factor = self.disturbed.get(name, 1)
        self.now += self.milliseconds[name] * factor / 1000

    def clock(self) -> float:
        return self.now

    def timer(self, calls: Sequence) -> list[float]:
        self.disturbed = self.disturbances.pop(0) if self.disturbances else {}
        return host_times(calls)


@pytest.fixture
def fake_machine(monkeypatch) -> FakeMachine:
    """One on which the GEMM takes half the time of the layer."""
    fake = FakeMachine(layer=2.0, gemm=1.0)
    monkeypatch.setattr(autotune, "_unreliable", {})
    monkeypatch.setattr(autotune.time, "thread_time", fake.clock)
    monkeypatch.setattr(autotune.time, "perf_counter", fake.clock)
    for kind, name in ((DenseLayer, "layer"), (DenseGemm, "gemm")):
        call = kind.__call__

        def timed(self, *arguments, name=name, call=call, **options):
            fake.run(name)
            return call(self, *arguments, **options)

        monkeypatch.setattr(kind, "__call__", timed)
    return fake


def choose_in_new_process(monkeypatch, fake: FakeMachine, cache: Path, layer: nn.Linear) -> str:
    monkeypatch.setattr(autotune, "_unreliable", {})
    return Autotuner(fake.timer, cache).choose("fc", kernels_of(layer), random(8, 16)).kernel


@pytest.mark.parametrize("disturbed", [0, 1], ids=["first", "second"])
def test_a_choice_on_which_measurements_disagree_is_not_kept(
    layer, fake_machine, monkeypatch, tmp_path, disturbed
):
    """A kernel that other programs slowed down once is still the fastest the next time."""
    cache = tmp_path / "kernels.json"
    fake_machine.disturbances = [{}, {}]
    fake_machine.disturbances[disturbed] = {"gemm": 10.0}
    # Of two measurements the shorter times count.
    assert choose_in_new_process(monkeypatch, fake_machine, cache, layer) == "dense GEMM"
    assert not cache.exists()
    assert choose_in_new_process(monkeypatch, fake_machine, cache, layer) == "dense GEMM"
    assert cache.exists()
    fake_machine.milliseconds = {}  # nothing is measured again
    assert choose_in_new_process(monkeypatch, fake_machine, cache, layer) == "dense GEMM"


def test_a_choice_that_is_not_kept_holds_for_the_process(layer, fake_machine, tmp_path, caplog):
    """The sparse model and its dense twin choose alike, from the same file."""
    caches = tmp_path / "kernels.json", tmp_path / "others.json"
    fake_machine.disturbances = [{"gemm": 10.0}]
    with caplog.at_level(logging.INFO):
        one = Autotuner(fake_machine.timer, caches[0])
        choice = one.choose("fc", kernels_of(layer), random(8, 16))
    assert (choice.kernel, choice.reliable) == ("dense GEMM", False)
    fake_machine.milliseconds["gemm"] = 8.0  # what another measurement would find
    assert "Two measurements disagree on which kernel is the fastest" in caplog.text
    for cache, kernel in zip(caches, ("dense GEMM", "dense layer"), strict=True):
        other = Autotuner(fake_machine.timer, cache)
        assert other.choose("fc", kernels_of(layer), random(8, 16)).kernel == kernel


def test_kernels_that_are_as_fast_as_each_other_are_kept(layer, tmp_path):
    """Whichever of them is measured as the faster one."""
    measurements = iter([[1.0, 0.97], [0.97, 1.0]])
    autotuner = Autotuner(lambda _: next(measurements), tmp_path / "kernels.json")
    choice = autotuner.choose("fc", kernels_of(layer), random(8, 16))
    assert (choice.kernel, choice.reliable) == ("dense layer", True)
    assert choice.milliseconds == {"dense layer": 0.97, "dense GEMM": 0.97}
    assert autotuner.cache.path.exists()


def test_a_busy_machine_is_told_once(layer, fake_machine, tmp_path, caplog):
    for cache in ("one.json", "other.json"):
        fake_machine.disturbances = [{"gemm": 10.0}]
        tuner = Autotuner(fake_machine.timer, tmp_path / cache)
        with caplog.at_level(logging.INFO):
            assert not tuner.choose("fc", kernels_of(layer), random(8, 16)).reliable
    assert caplog.text.count("Two measurements disagree") == 1


def test_an_unreliable_choice_is_not_kept_with_a_later_one(layer, tmp_path):
    measurements = iter([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    autotuner = Autotuner(lambda _: next(measurements), tmp_path / "kernels.json")
    for rows in (8, 9):
        autotuner.choose("fc", kernels_of(layer), random(rows, 16))
    (key,) = json.loads(autotuner.cache.path.read_text())
    assert "float32 9x16" in key


def test_a_call_gets_the_cores_to_itself_before_it_is_timed(fake_machine, monkeypatch):
    """The threads of another library slow it down for 12 ms after that library's last run."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ended = {"layer": -1.0, "gemm": -1.0}

    def run(name: str, other: str) -> None:
        disturbed = fake_machine.now - ended[other] < 0.012
        fake_machine.disturbed = {name: 1.5} if disturbed else {}
        fake_machine.run(name)
        ended[name] = fake_machine.now

    calls = [partial(run, "layer", "gemm"), partial(run, "gemm", "layer")]
    assert host_times_apart(calls) == pytest.approx([2.0, 1.0])
    assert host_times(calls) == pytest.approx([3.0, 1.5])


@pytest.mark.parametrize("content", ["", "[1]", '{"key": 1}', '{"key": {"kernel": "dense"}}'])
def test_a_damaged_cache_is_refused(layer, tmp_path, content):
    cache = tmp_path / "kernels.json"
    cache.write_text(content)
    with pytest.raises(InputError, match=r"kernels\.json does not hold choices .*Delete it"):
        Autotuner(FakeTimer(2.0, 1.0), cache).choose("fc", kernels_of(layer), random(8, 16))


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_kernel_with_wrong_numbers_is_refused_before_it_is_timed(layer, wrong):
    kernels = kernels_of(layer)
    kernels[1].weight = kernels[1].weight + wrong
    timer = FakeTimer(2.0, 1.0)
    with pytest.raises(RunnerError, match=r"^layer1\.fc: the dense GEMM does not return the numb"):
        Autotuner(timer).choose("layer1.fc", kernels, random(8, 16))
    assert timer.used == 0


def failing_with(error: Exception, layer: nn.Linear, monkeypatch) -> list[Kernel]:
    """Return the kernels of a layer, of which the second fails."""

    def fail(*_: object, **__: object) -> Tensor:
        raise error

    kernels = kernels_of(layer)
    monkeypatch.setattr(kernels[1], "multiply", fail)
    return kernels


def test_a_kernel_that_does_not_run_is_left_out_with_its_reason(layer, monkeypatch, tmp_path):
    kernels = failing_with(RuntimeError("operation not supported"), layer, monkeypatch)
    for _ in range(2):  # the second time from the cache
        autotuner = Autotuner(FakeTimer(2.0), tmp_path / "kernels.json")
        choice = autotuner.choose("layer1.fc", kernels, random(8, 16))
        assert choice.kernel == "dense layer"
        assert choice.milliseconds == {"dense layer": 2.0}
        assert choice.refused == {"dense GEMM": "operation not supported"}


def test_after_an_error_that_breaks_the_gpu_nothing_is_measured(layer, monkeypatch, tmp_path):
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    kernels = failing_with(RuntimeError("it wrote beyond its output"), layer, monkeypatch)
    timer, cache = FakeTimer(2.0), tmp_path / "kernels.json"
    with pytest.raises(UnavailableError, match=r"\(CUDA error: an illegal .* beyond its output"):
        Autotuner(timer, cache).choose("layer1.fc", kernels, random(8, 16))
    assert timer.used == 0
    assert not cache.exists()


def test_short_memory_does_not_rule_a_kernel_out(layer, monkeypatch):
    kernels = failing_with(torch.OutOfMemoryError("out of memory"), layer, monkeypatch)
    with pytest.raises(RunnerError, match=r"^layer1\.fc: memory is short .*\(8, 16\); use a small"):
        Autotuner(FakeTimer(2.0, 1.0)).choose("layer1.fc", kernels, random(8, 16))


def test_a_layer_whose_outputs_are_all_zero_is_no_error(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    Autotuner(FakeTimer(2.0, 1.0)).choose("fc", kernels_of(layer), random(8, 16))
