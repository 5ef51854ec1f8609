"""Which of two whole models runs on the CPU, and that it computes the sparse one's outputs."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from inference_cases import random
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.inference import dense_cpu
from helpers.inference.cpu_runner import CpuRunner
from helpers.inference.dense_cpu import DenseCpuRunner
from helpers.inference.errors import RunnerError
from helpers.inference.runners import OnnxRunner, Runner, TorchRunner
from helpers.inference.sparse_cpu import SparseCpuRunner
from helpers.metrics import max_relative_error
from helpers.sparsity import prune_2to4_

GAP = 1e-5
SHAPE = (1, 28, 28)


def last(calls: Sequence) -> list[float]:
    return [1.0] * (len(calls) - 1) + [0.5]


def times(*milliseconds: float) -> Callable[[Sequence], list[float]]:
    """Return a timer that runs each model once and returns given times."""

    def timer(calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:
            call()
        assert len(calls) == len(milliseconds)
        return list(milliseconds)

    return timer


class Recording:
    """A timer that returns one time for one model, others for several, and how many there were."""

    def __init__(self, alone: float, *milliseconds: float) -> None:
        self.alone, self.milliseconds = alone, list(milliseconds)
        self.calls: list[int] = []

    def __call__(self, calls: Sequence) -> list[float]:
        self.calls.append(len(calls))
        return [self.alone] if len(calls) == 1 else self.milliseconds


def never(calls: Sequence) -> list[float]:
    raise AssertionError("measured again")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(dense_cpu, "has_compiler", lambda: False)


@pytest.fixture
def model(tiny_net) -> nn.Module:
    tiny_net(random(8, *SHAPE))
    prune_2to4_(tiny_net)
    return tiny_net.eval()


class Counting(TorchRunner):
    """PyTorch on the CPU, which counts its runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, device=torch.device("cpu"))
        self.runs = 0

    def run(self) -> None:
        self.runs += 1
        super().run()


@pytest.mark.parametrize(
    ("dense", "sparse", "runs"),
    [
        (2.0, 1.0, "2:4 kernels"),
        (1.0, 2.0, "dense runner"),
        (1.0, 0.98, "dense runner"),
        (1.0, 0.96, "2:4 kernels"),
    ],
    ids=["faster", "slower", "faster by noise", "faster by more"],
)
def test_the_faster_of_the_whole_models_runs(model, dense, sparse, runs):
    other = Counting(model)
    runner = SparseCpuRunner(model, dense=other, timer=last, network_timer=times(dense, sparse))
    for seed in range(2):
        images = random(3, *SHAPE, seed=seed)
        before = other.runs
        runner.load(images)
        measured = other.runs - before
        runner.run()
        runner.invalidate_output()
        assert runner.fetch().isnan().all()
        runner.run()
        assert other.runs - before - measured == (2 if runs == "dense runner" else 0)
        with torch.inference_mode():
            assert max_relative_error(runner.fetch(), model(images)) < GAP
    (row,) = runner.network_times().to_dict("records")
    assert row == {
        "input": "3x1x28x28", "threads": torch.get_num_threads(), "dense runner": dense,
        "2:4 kernels": sparse, "runs": runs,
    }  # fmt: skip
    assert set(runner.kernel_choices().kernel) == {"oneDNN", "2:4 kernel"}


@pytest.mark.parametrize(
    ("measurements", "runs"),
    [
        ([(2.0, 1.0), (2.0, 1.0)], "2:4 kernels"),
        ([(2.0, 1.0), (1.0, 1.0)], "dense runner"),
        ([(1.0, 2.0), (4.0, 1.0)], "dense runner"),
    ],
)
def test_the_sparse_model_has_to_win_in_both_measurements(model, tmp_path, measurements, runs):
    """Other programs slow down one of the models for a while; the dense one is never a loss."""
    each, cache = iter(measurements), tmp_path / "kernels.json"
    runner = SparseCpuRunner(
        model,
        cache=cache,
        dense=Counting(model),
        timer=last,
        network_timer=lambda _: list(next(each)),
    )
    runner.load(random(2, *SHAPE))
    (row,) = runner.network_times().to_dict("records")
    assert row["runs"] == runs
    assert row["2:4 kernels"] == min(sparse for _, sparse in measurements)
    agree = len({sparse < dense for dense, sparse in measurements}) == 1
    assert any("dense runner" in key for key in json.loads(cache.read_text())) == agree


class Unmade(Runner):
    """A dense runner that must not be needed."""

    name = "unmade"

    def load(self, images: Tensor) -> None:
        raise AssertionError("it was needed")

    run = fetch = invalidate_output = load


def test_with_a_cache_that_knows_the_winner_only_its_time_is_checked(model, tmp_path):
    cache, images = tmp_path / "kernels.json", random(2, *SHAPE)
    SparseCpuRunner(
        model, cache=cache, dense=Counting(model), timer=last, network_timer=times(2.0, 1.0)
    )(images)
    again = SparseCpuRunner(
        model, cache=cache, dense=Unmade(), timer=never, network_timer=times(1.08)
    )
    with torch.inference_mode():
        assert max_relative_error(again(images), model(images)) < GAP
    assert not again.dense_runs
    with pytest.raises(AssertionError, match="measured again"):
        again(random(3, *SHAPE))  # another batch size


@pytest.mark.parametrize("now", [1.3, 0.7], ids=["disturbed now", "disturbed then"])
@pytest.mark.parametrize(
    ("then", "outcome", "runs"),
    [((2.0, 1.0), (1.0, 1.1), "dense runner"), ((1.0, 2.0), (2.0, 1.1), "2:4 kernels")],
)
def test_models_are_compared_again_if_the_winner_takes_another_time(
    model, tmp_path, then, outcome, runs, now
):
    """What an earlier process chose while other programs disturbed it cannot cost speed."""
    cache, images = tmp_path / "kernels.json", random(2, *SHAPE)
    SparseCpuRunner(
        model, cache=cache, dense=Counting(model), timer=last, network_timer=times(*then)
    )(images)

    def timer(calls: Sequence[Callable[[], object]]) -> list[float]:
        return times(*([now] if len(calls) == 1 else outcome))(calls)

    again = SparseCpuRunner(
        model, cache=cache, dense=Counting(model), timer=never, network_timer=timer
    )
    with torch.inference_mode():
        assert max_relative_error(again(images), model(images)) < GAP
    (row,) = again.network_times().to_dict("records")
    assert row["runs"] == runs
    assert again.dense_runs == (runs == "dense runner")
    assert set(again.kernel_choices().kernel) == {"oneDNN", "2:4 kernel"}, "from the cache"


def test_the_name_says_at_which_batch_sizes_a_dense_runner_runs(model):
    by_batch = {1: (1.0, 2.0), 2: (2.0, 1.0), 3: (1.0, 2.0), 4: (2.0, 1.0)}
    runner = SparseCpuRunner(
        model,
        dense=Counting(model),
        timer=last,
        network_timer=lambda _: list(by_batch[len(runner.images)]),
    )
    own = runner.name
    assert "2:4 kernels" in own
    for batch in (2, 4):
        runner(random(batch, *SHAPE))
        assert runner.name == runner.running == own
    runner(random(1, *SHAPE))
    assert runner.running == runner.dense.name
    for batch in (3, 2):
        runner(random(batch, *SHAPE))
    assert runner.running == own
    assert runner.name == (f"{own}; at batch size 1, 3 {runner.dense.name}, which is faster there")


def test_the_dense_runners_name_says_at_which_batch_sizes_each_runs(model, no_compiler):
    by_batch = {1: [1.0, 2.0], 2: [2.0, 1.0], 3: [2.0, 1.0]}
    batch = 1
    runner = DenseCpuRunner(model, timer=lambda _: by_batch[batch])
    for batch in by_batch:
        runner(random(batch, *SHAPE))
    onnx, kernels = (runner.runners[key].name for key in runner.runners)
    assert runner.running == kernels
    assert runner.name == (
        f"at batch size 1 {onnx}; at batch size 2, 3 {kernels} (the fastest dense runner here)"
    )


def test_a_dense_runner_on_which_measurements_disagree_is_not_kept(model, no_compiler, tmp_path):
    cache, images = tmp_path / "kernels.json", random(2, *SHAPE)
    measurements = iter([[1.0, 3.0], [2.0, 1.5]])
    runner = DenseCpuRunner(model, cache, lambda _: next(measurements))
    runner(images)
    (row,) = runner.network_times().to_dict("records")
    assert row["runs"] == "ONNX Runtime"
    assert not any("ONNX Runtime" in key for key in json.loads(cache.read_text()))


@pytest.mark.parametrize("kernels", ["twin", "dense"])
def test_the_controls_run_whatever_is_the_fastest(model, kernels):
    other = Counting(model)
    runner = SparseCpuRunner(model, kernels, dense=other, timer=last, network_timer=never)
    images = random(2, *SHAPE)
    with torch.inference_mode():
        assert max_relative_error(runner(images), model(images)) < GAP
    assert other.runs == 0


def test_a_dense_runner_of_another_model_is_refused(model):
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    runner = SparseCpuRunner(model, dense=Counting(other), timer=last)
    with pytest.raises(InputError, match=r"differ by .* with the same weights"):
        runner.load(random(2, *SHAPE))


@pytest.mark.parametrize(
    ("milliseconds", "fastest", "kind"),
    [((1.0, 2.0), "ONNX Runtime", OnnxRunner), ((2.0, 1.0), "dense kernels", CpuRunner)],
)
def test_the_fastest_dense_runner_is_chosen_once(
    model, no_compiler, tmp_path, milliseconds, fastest, kind
):
    cache, images = tmp_path / "kernels.json", random(2, *SHAPE)
    runner = DenseCpuRunner(model, cache, times(*milliseconds))
    with torch.inference_mode():
        assert max_relative_error(runner(images), model(images)) < GAP
    assert isinstance(runner.current, kind)
    assert runner.name.endswith("(the fastest dense runner here)")
    (row,) = runner.network_times().to_dict("records")
    assert row["runs"] == fastest
    again = DenseCpuRunner(model, cache, times(1.0))
    again(images)
    assert len(again.runners) == 1, "only what runs is made"
    DenseCpuRunner(model, cache, once_more := Recording(1.5, *milliseconds))(images)
    assert once_more.calls == [1, 2, 2], "another time than then: measured again"
    runner.invalidate_output()
    assert runner.fetch().isnan().all()
    runner.run()
    with torch.inference_mode():
        assert max_relative_error(runner.fetch(), model(images)) < GAP


def test_a_dense_runner_that_does_not_take_the_model_is_left_out(
    model, no_compiler, monkeypatch, caplog
):
    def refuse(*_: object) -> Path:
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(dense_cpu, "export_onnx", refuse)
    runner = DenseCpuRunner(model, timer=times(1.0))
    with caplog.at_level(logging.WARNING):
        runner(random(2, *SHAPE))
    assert "ONNX Runtime does not take the model and is left out: no such operator" in caplog.text
    runner.makers = {"ONNX Runtime": runner.makers["ONNX Runtime"]}
    with pytest.raises(RunnerError, match=r"No dense runner takes the model.*no such operator"):
        runner(random(3, *SHAPE))


def test_compiled_code_is_considered_where_there_is_a_compiler(model, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(dense_cpu, "has_compiler", lambda there=there: there)
        assert ("PyTorch compiled" in DenseCpuRunner(model).makers) == there
        assert "PyTorch compiled" not in DenseCpuRunner(model, compile=False).makers
