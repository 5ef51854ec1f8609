"""`benchmarks/cpu.py` on the quick preset's network; no time is asserted."""

import json

import numpy as np
import pytest
import torch
from inference_cases import random
from torch import nn
from typer.testing import CliRunner

import cpu
from helpers.inference.cpu_runner import CpuRunner, SparseCpu
from helpers.inference.kernels import Kernel
from helpers.inference.onednn import OneDnn
from helpers.inference.runners import TorchRunner
from helpers.measurement.benchmark import BenchmarkError, Latency
from helpers.sparsity import prune_2to4_

NETWORK = "resnext14_8x1d"
CONTENDERS = {"onnxruntime", "torch", "twin", "sparse"}


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(tmp_path):
    """Run the script on the quick preset's network; return what it printed and its exit code."""

    def run(*arguments: str, code: int = 0) -> tuple[str, dict]:
        app = cpu.typer.Typer()
        app.command()(cpu.main)
        out = tmp_path / "cpu.json"
        result = CliRunner().invoke(
            app,
            ["--out", str(out), "--networks", NETWORK, "--seconds", "0", "--no-compile",
             *arguments],
        )  # fmt: skip
        assert result.exit_code == code, result.output
        return result.output, json.loads(out.read_text())

    return run


def test_every_contender_has_a_row_and_later_runs_keep_the_earlier_ones(
    measure, tmp_path, monkeypatch
):
    # Linear layers of any number of tokens, to measure one here.
    monkeypatch.setattr(cpu, "FEWEST_TOKENS", 1)
    monkeypatch.setitem(cpu.LAYER_KINDS, NETWORK, "linear")
    said, record = measure("--batches", "2")
    assert {"date", "machine", "versions", "what"} <= set(record)
    assert {row["contender"] for row in record["rows"]} == CONTENDERS
    assert {row["contender"] for row in record["layers"]} == CONTENDERS - {"torch"} | {"onednn"}
    for row in record["rows"]:
        assert (row["network"], row["batch"], row["threads"]) == (NETWORK, 2, 1)
        assert 0 < row["low_ms"] <= row["p50_ms"] <= row["high_ms"]
    (case,) = record["cases"]
    assert case["clock"] == "thread CPU time"
    assert all(first["max_relative_error"] < 1e-4 for first in case["first_outputs"].values())
    assert {"1x1", "3x3 grouped", "linear"} <= {row["kind"] for row in case["profile"]}
    assert sum(row["layers"] for row in case["profile"]) == 17
    assert {"layer", "kind", "shape", "p50_ms"} <= set(record["layers"][0])
    assert "sparse against" in said
    assert (tmp_path / "cpu.png").stat().st_size > 0

    _, later = measure("--batches", "1", "--threads", "2", "--no-layers")
    assert later["layers"] == record["layers"]
    assert all(row in later["rows"] for row in record["rows"])
    assert {(row["batch"], row["threads"]) for row in later["rows"]} == {(2, 1), (1, 2)}
    assert later["cases"][-1]["clock"] == "wall time"


def test_results_of_another_machine_are_not_mixed_with(measure, tmp_path):
    record = {"machine": {"cpu": "other"}, "versions": {}}
    record |= {name: [] for name in cpu.Record.LISTS}
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    said, after = measure(code=2)
    assert "another machine" in " ".join(said.replace("│", " ").split())
    assert after == record


def test_a_contender_of_another_model_is_refused():
    images = random(2, 8)
    model = nn.Sequential(nn.Linear(8, 4))
    runner = TorchRunner(nn.Sequential(nn.Linear(8, 4)), device=torch.device("cpu"))
    with torch.inference_mode(), pytest.raises(BenchmarkError, match="differ from the model's"):
        cpu.check({"other": runner}, images, model(images))


def test_the_ratio_is_against_the_fastest_dense_library():
    def latency(milliseconds: float) -> Latency:
        return Latency(1, tuple(np.full(3, milliseconds) for _ in range(4)))

    times = {"onnxruntime": 3.0, "torch": 2.0, "twin": 2.5, "sparse": 1.0}
    found = {name: latency(ms) for name, ms in times.items()}
    assert cpu.ratio_row(found, "sparse") == {
        "contender": "sparse", "best_dense": "torch", "ratio": 2.0, "low": 2.0, "high": 2.0,
    }  # fmt: skip
    assert cpu.ratio_row(found, "twin")["ratio"] == 0.8
    row = cpu.time_row("sparse", latency(1.0))
    assert (row["p50_ms"], row["low_ms"], row["high_ms"]) == (1, 1, 1)


def test_a_layer_is_measured_once_for_each_geometry():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)).eval()
    prune_2to4_(model, rules="any")
    flat = nn.Sequential(model, nn.Flatten())
    runner = CpuRunner(flat, timer=lambda calls: [1.0] * len(calls))
    runner(random(2, 8, 6, 6))
    found = cpu.layers_of("resnext101_32x8d", runner, 2)
    ((kind, _, shape),) = found.values()
    assert (kind, shape) == ("1x1", (2, 8, 6, 6))
    assert not cpu.layers_of("resnext101_32x8d", runner, 1)
    assert {kind for kind, *_ in cpu.layers_of("resnet50", runner, 2).values()} == {"3x3"}


@pytest.mark.parametrize("kernel", [OneDnn, SparseCpu])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 12, 3), nn.Linear(8, 12)])
def test_a_kernel_runs_as_a_runner(kernel: type[Kernel], layer):
    layer = nn.Sequential(layer)
    prune_2to4_(layer, rules="any")
    runner = cpu.LayerRunner(kernel(layer[0]), channels_last=kernel is OneDnn)
    images = random(2, 8, 5, 8)
    with torch.inference_mode():
        runner(images)
        runner.invalidate_output()
        assert runner.fetch().isnan().all()
        runner.run()
        torch.testing.assert_close(runner.fetch(), layer(images))
