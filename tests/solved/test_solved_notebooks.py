"""Every notebook with the solutions that it gives filled in: each exercise calls them right.

`make test` runs this after the notebooks, on the artifacts that they left.
"""

from pathlib import Path

import nbformat
import pytest

from helpers.tutorial.artifacts import NOTEBOOKS
from helpers.tutorial.learner_copies import solved
from helpers.tutorial.notebooks import _execute
from helpers.tutorial.settings import project_root

FOLDER = project_root() / "notebooks"


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_each_exercise_is_solved_by_its_solution(name: str) -> None:
    notebook = solved(nbformat.read(Path(FOLDER / name), as_version=4))
    exercises = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    _execute(notebook, name, FOLDER, "quick")
    assert exercises
    for cell in exercises:
        assert "[OK]" in printed(cell), f"{cell.id}: {printed(cell)}"
        assert "Not yet" not in printed(cell)
