"""Single notebooks in a browser: exercises, a wrong order, a small screen."""

import re

import nbformat
from jupyter_lab import errors_of, text_of

from helpers.tutorial.artifacts import NOTEBOOKS
from helpers.tutorial.settings import project_root


def test_an_exercise_says_whether_an_answer_is_wrong_or_right(lab):
    """Typed into the cell, as a reader does it."""
    lab.open(NOTEBOOKS["00"])
    lab.run_all()
    notebook = nbformat.read(lab.project.copy(NOTEBOOKS["00"]), as_version=4)
    sources = {cell.id: cell.source for cell in notebook.cells}
    solutions = lab.project.solutions("00")
    asked = next(id for id in solutions if re.search(r"^\w+ = \.\.\.", sources[id], re.M))
    wrong = re.sub(r"^(\w+ = )\.\.\.", r"\1'no idea'", sources[asked], count=1, flags=re.M)
    for typed, said in ((wrong, "Not yet: "), (solutions[asked], "[OK] ")):
        lab.go_to(asked)
        editor = lab.page.locator(
            ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-mod-active .cm-content"
        )
        editor.click()
        lab.page.keyboard.press("Control+a")
        lab.page.keyboard.insert_text(typed)
        lab.page.keyboard.press("Control+Enter")
        # The check of the machine at the top of the notebook says "[OK]", too.
        lab.wait_for_output(said, asked)
        (cell,) = [cell for cell in lab.cells() if cell["id"] == asked]
        assert text_of(cell).startswith(said), text_of(cell)
        lab.screenshot(f"exercise_{'right' if 'OK' in said else 'wrong'}")


def test_a_notebook_out_of_order_shows_its_error_where_the_reader_looks(lab):
    """JupyterLab stops at the first error and shows the end, where nothing has run."""
    lab.open(NOTEBOOKS["04"])
    lab.run_all()
    (error,) = errors_of(lab.cells())
    assert re.fullmatch(r"ArtifactError: 0\w+\.safetensors is missing\. Run 0\w+\.ipynb .*", error)
    last = lab.cells()[-1]
    assert (last["count"], last["outputs"]) == (None, [])
    lab.screenshot("out_of_order")

    # The cell that computes what the reader has now says so in one sentence, too.
    lab.run_cell(last["id"])
    (error,) = errors_of(lab.cells()[-1:])
    assert error.startswith("ArtifactError: 04_dense_fp32.onnx is missing. Run 04_export_onnx")
    shown = lab.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-RenderedText").last
    assert shown.inner_text().strip() == error
    box = shown.bounding_box()
    assert box["y"] > 0
    assert box["y"] + box["height"] < lab.page.viewport_size["height"]
    assert "Traceback" not in str(lab.cells())
    lab.screenshot("out_of_order_at_the_end")


def test_at_1024_pixels_no_code_is_cut(lab):
    widths = {}
    for name in NOTEBOOKS.values():
        cells = nbformat.read(project_root() / "notebooks" / name, as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        widths[name] = max(len(line) for source in code for line in source.splitlines())
    widest = max(widths, key=widths.get)
    assert widths[widest] > 70
    lab.open(widest)
    cut = lab.page.evaluate(
        """() => [...document.querySelectorAll('.jp-CodeCell .cm-scroller')]
            .filter(editor => editor.scrollWidth > editor.clientWidth).map(e => e.innerText)"""
    )
    assert cut == []
