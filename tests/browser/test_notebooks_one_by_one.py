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
        place = lab.evaluate(
            """id => {
                const content = window.jupyterapp.shell.currentWidget.content;
                const place = content.widgets.findIndex(cell => cell.model.id === id);
                content.activeCellIndex = place;
                return content.scrollToItem(place, 'center').then(() => place);
            }""",
            asked,
        )
        editor = lab.page.locator(
            ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-mod-active .cm-content"
        )
        editor.click()
        lab.page.keyboard.press("Control+a")
        lab.page.keyboard.insert_text(typed)
        lab.page.keyboard.press("Control+Enter")
        lab.wait_for_output(said)
        (cell,) = [cell for cell in lab.cells() if cell["id"] == asked]
        assert text_of(cell).startswith(said), (place, text_of(cell))
        lab.screenshot(f"exercise_{'right' if 'OK' in said else 'wrong'}")


def test_a_notebook_out_of_order_shows_its_error_where_the_reader_looks(lab):
    """JupyterLab stops at the first error, and scrolls to the end."""
    lab.open(NOTEBOOKS["04"])
    lab.run_all()
    errors = errors_of(lab.cells())
    assert errors[0] == (
        "ArtifactError: 03_retrained.safetensors is missing. Run 03_retrain.ipynb first, from top "
        "to bottom."
    )
    assert "Traceback" not in str(lab.cells())
    lab.screenshot("out_of_order")


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
