"""The stranger's path: from `make lab` through notebooks 00 to 03, all exercises solved."""

from jupyter_lab import errors_of, text_of

from helpers.tutorial.artifacts import NOTEBOOKS


def finished(lab, number: str) -> None:
    """Check that the notebook in front has run to its end, with every exercise solved."""
    cells = lab.cells()
    assert errors_of(cells) == []
    assert all(cell["count"] for cell in cells)
    exercises = [cell for cell in cells if cell["id"] in lab.project.solutions(number)]
    assert exercises
    for cell in exercises:
        assert "[OK]" in text_of(cell), text_of(cell)
    lab.screenshot(f"path_{number}")


def test_a_stranger_gets_from_the_welcome_page_through_the_retraining(lab):
    page, project = lab.page, lab.project
    originals = {path: path.read_bytes() for path in (project.folder / "notebooks").glob("*.ipynb")}
    page.goto(f"{project.url}/lab/tree/build/learn/Welcome.md")
    page.wait_for_selector(".jp-MarkdownViewer h1:has-text('Welcome')")
    assert page.locator("text=official Jupyter news").count() == 0
    lab.screenshot("path_welcome")
    page.click(".jp-MarkdownViewer a:has-text('00 Check your setup')")

    for number in ("00", "01", "02"):
        lab.wait_for_notebook(NOTEBOOKS[number])
        assert all(cell["outputs"] == [] for cell in lab.cells()), "a prediction is spoiled"
        lab.fill_in(project.solutions(number))
        lab.run_all()
        finished(lab, number)
        following = NOTEBOOKS[f"{int(number) + 1:02}"]
        page.locator(f".jp-NotebookPanel:not(.lm-mod-hidden) a[href*='{following}']").last.click()

    # Stopped after the first epoch, the retraining goes on there.
    lab.wait_for_notebook(NOTEBOOKS["03"])
    lab.fill_in(project.solutions("03"))
    lab.start_all()
    lab.wait_for_output("epoch 1/4: loss", minutes=10)
    page.locator("[data-command='notebook:interrupt-kernel']:visible").first.click()
    lab.wait_for_end()
    (stopped,) = [cell for cell in lab.cells() if "Interrupted; " in text_of(cell)]
    assert "Interrupted; epoch 1 of 4 is kept. Run it again to go on." in text_of(stopped)
    assert "Traceback" not in str(stopped)
    assert errors_of(lab.cells()) == []
    lab.screenshot("path_03_interrupted")
    lab.run_all()
    finished(lab, "03")
    assert "continuing after epoch 1" in str(lab.cells())

    # Saved, closed and opened again, a notebook shows what it showed before.
    lab.close()
    lab.open(NOTEBOOKS["03"])
    assert page.locator("text=Error displaying widget").count() == 0
    assert "widget" not in project.copy(NOTEBOOKS["03"]).read_text()
    finished(lab, "03")
    lab.screenshot("path_03_opened_again")

    assert {path: path.read_bytes() for path in originals} == originals
