import copy
import json
from collections.abc import Sequence

import pytest
import torch
from inference_cases import random
from torch import Tensor, nn

from helpers import machine
from helpers.errors import InputError, UnavailableError
from helpers.inference.autotune import Autotuner
from helpers.inference.errors import RunnerError
from helpers.inference.kernels import DenseGemm, DenseLayer, Kernel


class FakeTimer:
    """A timer that returns given times, and counts its calls."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.used = list(milliseconds), 0

    def __call__(self, calls: Sequence) -> list[float]:
        self.used += 1
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


def test_two_runners_that_share_a_cache_keep_each_others_choices(layer, tmp_path):
    cache = tmp_path / "kernels.json"
    one, two = (Autotuner(FakeTimer(2.0, 1.0), cache) for _ in range(2))
    one.choose("fc", kernels_of(layer), random(1, 16))
    two.choose("fc", kernels_of(layer), random(2, 16))
    one.choose("fc", kernels_of(layer), random(3, 16))
    assert len(json.loads(cache.read_text())) == 3


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
