import hashlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from nbformat import v4

from helpers import machine
from helpers.errors import HelpersError
from helpers.files import write_json
from helpers.inference import engine
from helpers.tutorial import backends, setup
from helpers.tutorial import notebooks as module
from helpers.tutorial import summary as results
from helpers.tutorial.artifacts import ArtifactError, Artifacts
from helpers.tutorial.notebooks import run_notebooks, source_digest, tidy
from helpers.tutorial.summary import summary

# --- notebooks -----------------------------------------------------------------------------

WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"}


def executed() -> v4.nbbase.NotebookNode:
    """A notebook as Jupyter leaves it: with a progress bar, times and a kernel's version."""
    code = v4.new_code_cell("print(1)", execution_count=1)
    code.outputs = [
        v4.new_output("display_data", WIDGET),
        v4.new_output("stream", text="1\n"),
        v4.new_output("display_data", {"text/plain": "a figure"}),
    ]
    code.metadata = {"execution": {"iopub.execute_input": "2026"}, "tags": ["kept"]}
    metadata = {"language_info": {"name": "python", "version": "3.11.7"}, "widgets": {"state": {}}}
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), code], metadata=metadata)


def test_tidying_drops_progress_bars_and_timings_and_nothing_else():
    notebook = executed()
    tidy(notebook)
    title, code = notebook.cells
    assert title.source == "# Title"
    assert [output.output_type for output in code.outputs] == ["stream", "display_data"]
    assert code.outputs[1].data["text/plain"] == "a figure"
    assert code.metadata == {"tags": ["kept"]}
    assert code.execution_count == 1
    assert "widgets" not in notebook.metadata
    assert notebook.metadata["language_info"] == {"name": "python"}


def test_tidying_records_the_checksum_of_the_code():
    notebook = executed()
    tidy(notebook)
    recorded = notebook.metadata["tutorial"]["source_sha256"]
    assert recorded == source_digest(notebook.cells) == hashlib.sha256(b"print(1)").hexdigest()


def test_the_checksum_is_of_the_code_alone():
    def digest(*cells) -> str:
        return source_digest(cells)

    code, text = v4.new_code_cell, v4.new_markdown_cell
    same = digest(code("a"), code("b"))
    assert digest(text("words"), code("a", execution_count=5), code("b")) == same
    assert digest(code("a"), code("c")) != same
    assert digest(code("b"), code("a")) != same
    assert digest(code("ab")) != same


@pytest.fixture
def notebooks(monkeypatch, tmp_path):
    """Let the tutorial consist of these notebooks, each of one code cell."""
    monkeypatch.setenv("TUTORIAL_PRESET", "quick")  # run_notebooks sets it; this puts it back
    folder = tmp_path / "project" / "notebooks"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "project_root", lambda: folder.parent)

    def make(**sources: str) -> Path:
        names = {name: f"{name}.ipynb" for name in sources}
        monkeypatch.setattr(module, "NOTEBOOKS", names)
        for name, source in sources.items():
            notebook = v4.new_notebook(cells=[v4.new_code_cell(source)])
            (folder / names[name]).write_text(json.dumps(notebook))
        return folder

    return make


def test_the_notebooks_are_run_in_their_folder_and_saved_on_request(
    notebooks, tiny_settings, tmp_path
):
    source = "import os\nprint(os.getcwd(), os.environ['TUTORIAL_PRESET'])"
    folder = notebooks(n00_first=source)
    before = (folder / "n00_first.ipynb").read_text()

    run_notebooks(tiny_settings)
    assert (folder / "n00_first.ipynb").read_text() == before, "saved without being asked to"
    copy = tiny_settings.artifacts_dir / "notebooks" / "n00_first.ipynb"
    assert json.loads(copy.read_text())["cells"][0]["outputs"]

    run_notebooks(tiny_settings, save=True)
    saved = json.loads((folder / "n00_first.ipynb").read_text())
    (cell,) = saved["cells"]
    assert "".join(cell["outputs"][0]["text"]) == f"{folder} quick\n"
    digest = hashlib.sha256(source.encode()).hexdigest()
    assert saved["metadata"]["tutorial"]["source_sha256"] == digest


def test_a_cell_that_fails_stops_the_run_in_one_sentence(notebooks, tiny_settings):
    failing = "from helpers.checks import check\ncheck(False, 'water runs uphill')"
    folder = notebooks(n00_fails=failing, n01_never="print(1)")
    before = (folder / "n00_fails.ipynb").read_text()
    with pytest.raises(HelpersError) as raised:
        run_notebooks(tiny_settings, save=True)
    message = str(raised.value)
    assert message == "n00_fails.ipynb stopped: CheckError: [FAIL] water runs uphill"
    assert (folder / "n00_fails.ipynb").read_text() == before
    assert not (tiny_settings.artifacts_dir / "notebooks").exists()


def test_a_kernel_that_dies_stops_the_run_in_one_sentence(notebooks, tiny_settings):
    notebooks(n00_dies="import os\nos._exit(1)")  # as when the memory runs out
    with pytest.raises(HelpersError, match=r"^n00_dies\.ipynb stopped"):
        run_notebooks(tiny_settings)


def test_every_kernel_is_ended_with_its_notebook(notebooks, tiny_settings, tmp_path):
    note = f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    notebooks(n00_first=note)
    run_notebooks(tiny_settings)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # asks whether the process is there, and sends nothing


def test_without_jupyter_the_reader_is_told_how_to_get_it(monkeypatch, tiny_settings):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(HelpersError, match=r"pip install -e '\.\[notebooks\]'"):
        run_notebooks(tiny_settings)


# --- setup ---------------------------------------------------------------------------------


def test_the_setup_is_printed_and_recorded(tiny_settings, monkeypatch, capsys):
    found = engine.Builder("TensorRT-RTX", json, "1.7", "the test says so")
    monkeypatch.setattr(engine, "find_builder", lambda: found)
    monkeypatch.setattr(setup, "setup_report", lambda _: [(True, "Python"), (False, "onnx")])
    reasons = {"TensorRT": "No GPU.", "ONNX Runtime": ""}
    monkeypatch.setattr(backends, "backend_status", lambda: reasons)
    setup.check_setup(tiny_settings)
    assert capsys.readouterr().out.splitlines() == [
        "[OK] Python",
        "[FAIL] onnx",
        "[OK] engines: TensorRT-RTX 1.7 (the test says so)",
        "[--] inference with TensorRT: No GPU.",
        "[OK] inference with ONNX Runtime",
    ]
    record = json.loads(Artifacts(tiny_settings).require("00_setup.json").read_text())
    assert record == {"machine": machine.describe(), "builder": "TensorRT-RTX"}


# --- the summary ---------------------------------------------------------------------------

PRUNING = {"sparse_layers": 9, "layers": 14, "parameters_share": 90.5, "macs_share": 80.25}
BUILT = {"megabytes": 1.5, "builder": "TensorRT-RTX", "version": "1.7", "built_for": "8.6"}
RUN = {
    "01_dense.safetensors": {"test": {"correct": 92, "total": 100}},
    "02_pruned.safetensors": {"test": {"correct": 50, "total": 100}, **PRUNING},
    "03_retrained.safetensors": {"test": {"correct": 91, "total": 100}},
    "04_dense_fp32.onnx": {"gap": 1e-6},
    "04_sparse_fp32.onnx": {"gap": 3e-6},
    "04_dense_fp16.onnx": {"gap": 2e-3},
    "04_sparse_fp16.onnx": {"gap": 1e-3},
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
    assert rows["ONNX gap to PyTorch, FP32"] == "3.0e-06 of the largest logit"
    assert rows["ONNX gap to PyTorch, FP16"] == "2.0e-03 of the largest logit"
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
    assert set(parents) == {"04_dense_fp32.onnx", "04_sparse_fp32.onnx"}
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


def test_what_a_runner_does_not_measure_is_null(finished):
    rows = pd.DataFrame({"batch": [1, 2], "gpu_p50": [0.5, float("nan")]})
    results.save_benchmark(finished, {"sparse": SimpleNamespace(name="mixed")}, rows)
    content = json.loads(finished.path("06_benchmark.json").read_text())
    assert content["rows"] == [{"batch": 1, "gpu_p50": 0.5}, {"batch": 2, "gpu_p50": None}]


def test_the_figures_of_a_run_can_be_kept_as_reference(finished, monkeypatch):
    monkeypatch.setattr(machine, "gpu", dict)
    path = results.record(finished.settings)
    assert path == finished.settings.data_dir / "reference" / "quick_cpu.json"
    kept = json.loads(path.read_text())
    assert kept["summary"] == summary(finished.settings)
    assert kept["benchmark"]["runner"] == "made up"
    assert {"date", "machine", "versions"} <= set(kept)
