import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from helpers import machine
from helpers.files import sha256, write_json
from helpers.tutorial import artifacts as artifacts_module
from helpers.tutorial import summary as results
from helpers.tutorial.artifacts import ArtifactError, Artifacts
from helpers.tutorial.summary import summary

PRUNING = {"sparse_layers": 9, "layers": 14, "parameters_share": 90.5, "macs_share": 80.25}
BUILT = {"megabytes": 1.5, "builder": "TensorRT-RTX", "version": "1.7", "built_for": "8.6"}
RUN = {
    "01_dense.safetensors": {"test": {"correct": 92, "total": 100}},
    "02_pruned.safetensors": {"test": {"correct": 50, "total": 100}, **PRUNING},
    "03_retrained.safetensors": {"test": {"correct": 91, "total": 100}},
    "04_dense_fp32.onnx": {"max_relative_error": 1e-6},
    "04_sparse_fp32.onnx": {"max_relative_error": 3e-6},
    "04_dense_fp16.onnx": {"max_relative_error": 2e-3},
    "04_sparse_fp16.onnx": {"max_relative_error": 1e-3},
    "05_dense.engine": BUILT,
    "05_sparse.engine": BUILT | {"megabytes": 1.25},
}


@pytest.fixture
def finished(tiny_settings, monkeypatch) -> Artifacts:
    """The artifacts of a whole run on a CPU, all of them made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    artifacts = Artifacts(tiny_settings)
    for name, facts in RUN.items():
        with artifacts.writing(name, facts=facts) as path:
            path.write_text(name)
    rows = pd.DataFrame(
        {
            "network": ["dense", "sparse", "dense again"] * 2,
            "batch": [1, 1, 1, 8, 8, 8],
            "p50": [2.0, 1.0, 2.5, 5.0, 10.0, 5.0],
            "speedup_low": [1.0, 1.75, 0.75, 1.0, 0.25, 0.5],
            "speedup_high": [1.0, 2.25, 1.25, 1.0, 0.75, 1.5],
        }
    )
    results.save_benchmark(artifacts, {"sparse": SimpleNamespace(name="made up")}, rows)
    return artifacts


def test_the_summary_gives_the_key_figures_of_every_step(finished):
    rows = summary(finished.settings)
    assert rows["dense, test top-1"].startswith("92.00 %")
    assert rows["pruned, test top-1"].startswith("50.00 %")
    assert rows["retrained, test top-1"].startswith("91.00 %")
    assert rows["sparse layers"] == (
        "9 of 14, with 90.50 % of the parameters and 80.25 % of the MACs"
    )
    assert rows["ONNX against PyTorch, FP32"] == "3.0e-06 of the largest logit"
    assert rows["ONNX against PyTorch, FP16"] == "2.0e-03 of the largest logit"
    assert rows["engine, dense"] == "1.50 MB, TensorRT-RTX 1.7, 8.6"
    assert rows["engine, sparse"] == "1.25 MB, TensorRT-RTX 1.7, 8.6"
    assert rows["measured with"] == "made up"
    assert rows["latency p50, batch 1"] == (
        "dense 2.00 ms, sparse 1.00 ms: 2.00x [1.75, 2.25] "
        "(dense against itself 0.80x [0.75, 1.25])"
    )
    assert rows["latency p50, batch 8"] == (
        "dense 5.00 ms, sparse 10.00 ms: 0.50x [0.25, 0.75] "
        "(dense against itself 1.00x [0.50, 1.50])"
    )
    assert not any("joule" in name for name in rows), "none was measured"


def test_the_summary_gives_images_per_joule_where_they_were_measured(finished):
    networks = ["dense", "sparse", "dense again"]
    rows = pd.DataFrame(
        {
            "network": networks,
            "batch": 8,
            "p50": 1.0,
            "images_per_joule": [4.0, 5.0, 4.2],
            "perf_per_watt_low": [1.0, 1.2, 1.0],
            "perf_per_watt_high": [1.0, 1.3, 1.1],
        }
    )
    without = pd.DataFrame({"network": networks, "batch": 1, "p50": 1.0})  # the counter failed
    made_up = {"sparse": SimpleNamespace(name="made up")}
    results.save_benchmark(finished, made_up, pd.concat([rows, without]))
    figures = summary(finished.settings)
    assert figures["images per joule, batch 8"] == (
        "dense 4.00, sparse 5.00: 1.25x [1.20, 1.30] (dense against itself 1.05x [1.00, 1.10])"
    )
    assert {"latency p50, batch 1", "latency p50, batch 8"} <= set(figures)
    assert "images per joule, batch 1" not in figures


@pytest.mark.parametrize("name", [*RUN, "06_benchmark.json"])
def test_a_summary_of_half_a_run_names_the_notebook_that_is_missing(finished, name):
    finished.path(name).unlink()
    with pytest.raises(ArtifactError) as raised:
        summary(finished.settings)
    assert str(raised.value).startswith(f"{name} is missing. Run {name[:2]}_")


def test_the_summary_is_printed_with_the_folder_and_the_figures(finished, capsys):
    write_json(finished.figures / "02_pattern.png", "stands for a picture")
    results.print_summary(finished.settings)
    printed = capsys.readouterr().out
    for name, value in summary(finished.settings).items():
        assert f"{name:26} {value}" in printed
    assert f"results  {os.path.relpath(finished.folder)}" in printed
    assert f"figure   {os.path.relpath(finished.figures / '02_pattern.png')}" in printed


def test_the_benchmark_is_saved_with_its_machine_and_what_was_run(finished):
    content = json.loads(finished.path("06_benchmark.json").read_text())
    parents = finished.describe("06_benchmark.json")["parents"]
    assert set(parents) == {"01_dense.safetensors", "03_retrained.safetensors"}
    assert content["machine"] == machine.describe()
    assert content["versions"] == machine.versions()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"])
    assert content["rows"][1] == {
        "network": "sparse", "batch": 1, "p50": 1.0, "speedup_low": 1.75, "speedup_high": 2.25,
    }  # fmt: skip

    gpu = {"sparse": SimpleNamespace(name="an engine")}
    results.save_benchmark(finished, gpu, pd.DataFrame({"batch": [1]}), "TensorRT")
    parents = finished.describe("06_benchmark.json")["parents"]
    assert set(parents) == {"05_dense.engine", "05_sparse.engine"}


def test_values_that_are_not_measured_are_null(finished):
    rows = pd.DataFrame({"batch": [1, 2], "gpu_p50": [0.5, float("nan")]})
    results.save_benchmark(finished, {"sparse": SimpleNamespace(name="mixed")}, rows)
    content = json.loads(finished.path("06_benchmark.json").read_text())
    assert content["rows"] == [{"batch": 1, "gpu_p50": 0.5}, {"batch": 2, "gpu_p50": None}]


def test_the_figures_of_a_run_can_be_kept_as_the_reference(finished, monkeypatch):
    monkeypatch.setattr(machine, "gpu", dict)
    path = results.save_reference(finished.settings)
    assert path == finished.settings.data_dir / "reference" / "quick_cpu.json"
    kept = json.loads(path.read_text())
    assert kept["summary"] == summary(finished.settings)
    assert kept["benchmark"]["runner"] == "made up"
    assert {"date", "machine", "versions"} <= set(kept)


def test_one_summary_takes_the_checksum_of_each_file_once(finished, monkeypatch):
    taken = []

    def counted(path: Path) -> str:
        taken.append(path.name)
        return sha256(path)

    monkeypatch.setattr(artifacts_module, "sha256", counted)
    summary(finished.settings)
    assert sorted(taken) == sorted([*RUN, "06_benchmark.json"])
