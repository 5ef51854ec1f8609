"""Notebook 09 in a browser, begun in the middle of the course."""

import subprocess

from jupyter_lab import errors_of

from helpers.tutorial.artifacts import NOTEBOOKS


def test_the_triton_notebook_runs_after_catching_up(lab):
    project = lab.project
    subprocess.run(
        project.command("catch-up", "09"), cwd=project.folder, env=project.environment, check=True
    )
    lab.open(NOTEBOOKS["09"])
    lab.fill_in(project.solutions("09"))
    lab.run_all()
    cells = lab.cells()
    assert errors_of(cells) == []
    assert all(cell["count"] for cell in cells)
