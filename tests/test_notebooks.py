"""Running the notebooks, and what they show of errors and of the log."""

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import v4
from traitlets.config import Config

from helpers.errors import HelpersError
from helpers.tutorial import notebooks as module
from helpers.tutorial.notebooks import run_notebooks, source_digest, tidy

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


def test_without_an_engine_builder_the_notebook_that_builds_is_left_out(
    notebooks, tiny_settings, monkeypatch, capsys
):
    notebooks(**{"04": "print('exports')", "05": "1 / 0", "06": "print('measures')"})
    monkeypatch.setattr(module, "why_no_builder", lambda: "None loads here.")
    run_notebooks(tiny_settings)
    copies = (tiny_settings.artifacts_dir / "notebooks").glob("*.ipynb")
    assert {copy.stem for copy in copies} == {"04", "06"}
    assert "05.ipynb is left out: None loads here." in capsys.readouterr().out


def test_a_failed_cell_stops_the_run_in_one_sentence(notebooks, tiny_settings):
    failing = "from helpers.tutorial.checks import check\ncheck(False, 'water runs uphill')"
    folder = notebooks(n00_fails=failing, n01_never="print(1)")
    before = (folder / "n00_fails.ipynb").read_text()
    with pytest.raises(HelpersError) as raised:
        run_notebooks(tiny_settings, save=True)
    message = str(raised.value)
    assert message == "n00_fails.ipynb stopped: CheckError: [FAIL] water runs uphill"
    assert (folder / "n00_fails.ipynb").read_text() == before
    assert not (tiny_settings.artifacts_dir / "notebooks").exists()


def test_a_dead_kernel_stops_the_run_in_one_sentence(notebooks, tiny_settings):
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


@pytest.mark.parametrize("before", ["imagenette", None])
def test_the_preset_is_set_for_the_kernels_alone(notebooks, tiny_settings, monkeypatch, before):
    monkeypatch.delenv("TUTORIAL_PRESET", raising=False)
    if before:
        monkeypatch.setenv("TUTORIAL_PRESET", before)
    notebooks(n00_first="import os\nassert os.environ['TUTORIAL_PRESET'] == 'quick'")
    run_notebooks(tiny_settings)
    assert os.environ.get("TUTORIAL_PRESET") == before


def test_stored_outputs_have_no_progress_bars(notebooks, tiny_settings):
    loop = "from helpers.progress_bar import progress_bar\nlist(progress_bar(range(3)))"
    folder = notebooks(n00_first=f"{loop}\nprint('done')")
    run_notebooks(tiny_settings, save=True)
    (output,) = json.loads((folder / "n00_first.ipynb").read_text())["cells"][0]["outputs"]
    assert "".join(output["text"]) == "done\n"


# --- what helpers.tutorial does in a notebook ----------------------------------------------

FAILS = "from helpers.errors import InputError\nraise InputError('Give it a matrix.')"


def execute(*sources: str) -> tuple[v4.nbbase.NotebookNode, CellExecutionError | None]:
    """Run cells in a kernel until one fails."""
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
    with tempfile.TemporaryDirectory() as sockets:
        ipc = Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")})
        try:
            NotebookClient(notebook, config=ipc, timeout=300).execute()
        except CellExecutionError as error:
            return notebook, error
    return notebook, None


def traceback(cell: v4.nbbase.NotebookNode) -> str:
    """Return what a cell shows of its error, without colours."""
    (output,) = cell.outputs
    return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output.traceback))


def test_an_error_is_one_sentence_in_a_notebook_and_nbclient_knows_it():
    notebook, error = execute("import helpers.tutorial", FAILS)
    (output,) = notebook.cells[1].outputs
    assert (output.ename, output.evalue) == ("InputError", "Give it a matrix.")
    assert traceback(notebook.cells[1]) == "InputError: Give it a matrix."
    assert (error.ename, error.evalue) == ("InputError", "Give it a matrix.")


def test_one_line_in_a_notebook_brings_the_traceback_back():
    notebook, error = execute("import helpers.tutorial as t\nt.show_tracebacks()", FAILS)
    assert "raise InputError" in traceback(notebook.cells[1])
    assert (error.ename, error.evalue) == ("InputError", "Give it a matrix.")


INTERRUPT = "import signal\nsignal.raise_signal(signal.SIGINT)"
STOPPED = "from helpers.training.loop import TrainingInterrupted as T\nraise T('2 are kept.')"


@pytest.mark.parametrize(("stops", "said"), [(INTERRUPT, "Interrupted."), (STOPPED, "2 are kept.")])
def test_an_interrupted_cell_says_so_in_one_sentence_and_stops_the_notebook(stops, said):
    notebook, error = execute("import helpers.tutorial", stops)
    (output,) = notebook.cells[1].outputs
    assert (output.name, output.text) == ("stderr", f"{said}\n")
    assert error is not None


def test_one_line_brings_the_traceback_of_an_interrupted_cell_back():
    notebook, _ = execute("import helpers.tutorial as t\nt.show_tracebacks()", INTERRUPT)
    assert "raise_signal" in traceback(notebook.cells[1])


def test_a_progress_bar_in_a_notebook_is_text_on_standard_output():
    loop = "for _ in progress_bar(range(3), mininterval=0): pass\nprint('done')"
    notebook, _ = execute("from helpers.progress_bar import progress_bar", loop)
    outputs = notebook.cells[1].outputs
    assert {output.name for output in outputs} == {"stdout"}
    text = "".join(output.text for output in outputs)
    assert "3/3" in text
    assert text.endswith(f"\r{' ' * 79}\rdone\n")


def test_a_notebook_that_uses_the_library_alone_keeps_its_tracebacks():
    notebook, _ = execute(FAILS)
    assert "raise InputError" in traceback(notebook.cells[0])


def test_a_notebook_prints_what_the_library_logs_in_the_cell_that_does_it():
    log = "import logging\nlogging.getLogger('helpers.training.loop').info('epoch %d', {})"
    notebook, _ = execute("import helpers.tutorial", log.format(1), log.format(2))
    texts = [[output.text for output in cell.outputs] for cell in notebook.cells]
    assert texts == [[], ["epoch 1\n"], ["epoch 2\n"]]


def test_a_notebook_shows_no_warning_about_a_cuda_toolkit_without_a_gpu():
    warn = "import logging\nlogging.getLogger('torch.utils.cpp_extension').warning('No CUDA')"
    before, after = (execute(first, warn)[0] for first in ("", "import helpers.tutorial"))
    assert [output.name for output in before.cells[1].outputs] == ["stderr"]
    assert after.cells[1].outputs == []
