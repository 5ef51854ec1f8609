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
from helpers.tutorial.summary import describe_gain, summary

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
    results.save_benchmark(artifacts, named("made up"), rows)
    return artifacts


def named(sparse: str, dense: str | None = None) -> dict[str, SimpleNamespace]:
    """Stand for the runners of both networks, of which the record keeps the names."""
    return {"dense": SimpleNamespace(name=dense or sparse), "sparse": SimpleNamespace(name=sparse)}


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


def test_a_machine_without_an_engine_builder_has_a_summary_too(finished, monkeypatch):
    for name in ("dense", "sparse"):
        finished.path(f"05_{name}.engine").unlink()
    monkeypatch.setattr(results, "why_no_builder", lambda: "None loads here.")
    rows = summary(finished.settings)
    assert rows["engine, dense"] == rows["engine, sparse"] == "none: no engine builder loads here"
    assert "measured with" in rows


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
    results.save_benchmark(finished, named("made up"), pd.concat([rows, without]))
    figures = summary(finished.settings)
    assert figures["images per joule, batch 8"] == (
        "dense 4.00, sparse 5.00: 1.25x [1.20, 1.30] (dense against itself 1.05x [1.00, 1.10])"
    )
    assert {"latency p50, batch 1", "latency p50, batch 8"} <= set(figures)
    assert "images per joule, batch 1" not in figures


def test_the_summary_gives_the_twin_and_the_dense_runner_where_they_differ(finished):
    rows = sweep_table({"sparse": (4.0, 1.2, 1.3), "twin": (8.0, 0.6, 0.7)})
    results.save_benchmark(finished, named("2:4 kernels", "the fastest dense runner"), rows)
    figures = summary(finished.settings)
    assert figures["measured with"] == "2:4 kernels; dense: the fastest dense runner"
    assert figures["latency p50, batch 8"] == (
        "dense 5.00 ms, sparse 4.00 ms: 1.25x [1.20, 1.30] "
        "(dense against itself 1.00x [0.95, 1.05], dense twin 0.62x [0.60, 0.70])"
    )


def sweep_table(
    networks: dict[str, tuple[float, float, float]],
    batch: int = 8,
    again: tuple[float, float] = (0.95, 1.05),
) -> pd.DataFrame:
    """Return the rows of a batch size: of each network the p50, and its speed-up's interval."""
    networks = {"dense": (5.0, 1.0, 1.0), "dense again": (5.0, *again), **networks}
    columns = ["network", "p50", "speedup_low", "speedup_high"]
    rows = [[name, *values] for name, values in networks.items()]
    return pd.DataFrame(rows, columns=columns).assign(batch=batch)


@pytest.mark.parametrize(
    ("p50", "low", "high", "again", "expected"),
    [
        (4.0, 1.2, 1.3, (0.95, 1.05), "Sparse is faster than dense: 1.25x at batch 8."),
        (
            4.0, 1.2, 1.3, (0.7, 1.25),  # as large as chance
            "The speed-up does not show on this machine. "
            "No difference is clear of chance: 1.25x at batch 8.",
        ),
        (
            4.8, 0.9, 1.2, (0.95, 0.98),
            "The speed-up does not show on this machine. "
            "No difference is clear of chance: 1.04x at batch 8.",
        ),
        (
            10.0, 0.4, 0.6, (0.95, 1.05),
            "The speed-up does not show on this machine. "
            "Sparse is slower than dense: 0.50x at batch 8.",
        ),
        (
            10.0, 0.4, 0.6, (0.5, 1.05),
            "The speed-up does not show on this machine. "
            "No difference is clear of chance: 0.50x at batch 8.",
        ),
        (
            4.0, float("nan"), float("nan"), (0.95, 1.05),
            "The speed-up does not show on this machine. "
            "No difference is clear of chance: 1.25x at batch 8.",
        ),
    ],
    ids=["faster", "as chance", "contains 1", "slower", "slower as chance", "no interval"],
)  # fmt: skip
def test_a_gain_is_claimed_where_its_interval_is_clear_of_chance(p50, low, high, again, expected):
    assert describe_gain(sweep_table({"sparse": (p50, low, high)}, again=again)) == expected


def test_the_gain_is_described_for_every_batch_size_and_beside_the_twin():
    one = sweep_table({"sparse": (5.0, 0.9, 1.1), "twin": (6.0, 0.8, 0.9)}, batch=1)
    eight = sweep_table({"sparse": (4.0, 1.2, 1.3), "twin": (8.0, 0.6, 0.7)})
    more = sweep_table({"sparse": (2.5, 1.9, 2.1), "twin": (4.0, 1.2, 1.3)}, batch=32)
    assert describe_gain(pd.concat([one, eight, more])) == (
        "Sparse is faster than dense: 1.25x at batch 8, 2.00x at batch 32. "
        "No difference is clear of chance: 1.00x at batch 1. "
        "Skipping the zeros buys, over the dense twin: 2.00x at batch 8, 1.60x at batch 32."
    )


def test_without_a_gain_nothing_is_said_about_the_twin_since_the_dense_model_may_have_run():
    table = sweep_table({"sparse": (5.0, 0.9, 1.1), "twin": (20.0, 0.2, 0.3)})
    assert describe_gain(table).endswith("No difference is clear of chance: 1.00x at batch 8.")


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

    results.save_benchmark(finished, named("an engine"), pd.DataFrame({"batch": [1]}), "TensorRT")
    parents = finished.describe("06_benchmark.json")["parents"]
    assert set(parents) == {"05_dense.engine", "05_sparse.engine"}


def test_values_that_are_not_measured_are_null(finished):
    rows = pd.DataFrame({"batch": [1, 2], "gpu_p50": [0.5, float("nan")]})
    results.save_benchmark(finished, named("mixed"), rows)
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
