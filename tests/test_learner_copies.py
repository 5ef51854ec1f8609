"""The copies that a learner works in: what they are made of, and that none is lost."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import v4

from helpers.tutorial import learner_copies
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.learner_copies import make_copies, open_lab, solved
from helpers.tutorial.settings import project_root

TEXT = (
    "[next](01_b.ipynb), [words](../docs/words.md#here), [web](https://example.org/a.md), [up](#a)"
)


def notebook(code: str = "print(1)", text: str = TEXT) -> v4.nbbase.NotebookNode:
    """Return an executed notebook of one cell of each kind."""
    cell = v4.new_code_cell(code, execution_count=1)
    cell.outputs = [v4.new_output("stream", text="1\n")]
    return v4.new_notebook(cells=[v4.new_markdown_cell(text), cell])


@pytest.fixture
def project(monkeypatch, tmp_path) -> Path:
    """A project of two notebooks."""
    monkeypatch.setattr(learner_copies, "project_root", lambda: tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "welcome.md").write_text(
        "[first](../notebooks/00_a.ipynb) [words](words.md)"
    )
    (tmp_path / "notebooks").mkdir()
    for name in ("00_a.ipynb", "01_b.ipynb"):
        nbformat.write(notebook(), tmp_path / "notebooks" / name)
    return tmp_path


def copy_of(project: Path, name: str = "00_a.ipynb") -> v4.nbbase.NotebookNode:
    return nbformat.read(project / "build" / "learn" / name, as_version=4)


def test_copies_have_no_outputs_and_the_originals_are_as_they_were(project):
    before = {path: path.read_bytes() for path in (project / "notebooks").iterdir()}
    make_copies()
    assert {path: path.read_bytes() for path in (project / "notebooks").iterdir()} == before
    for path in before:
        _, code = copy_of(project, path.name).cells
        assert (code.source, code.outputs, code.execution_count) == ("print(1)", [], None)


def test_links_in_copies_lead_to_copies_and_to_the_documents(project):
    make_copies()
    assert copy_of(project).cells[0].source == (
        "[next](01_b.ipynb), [words](../../docs/words.md#here), [web](https://example.org/a.md), "
        "[up](#a)"
    )
    welcome = (project / "build" / "learn" / "Welcome.md").read_text()
    assert welcome == "[first](00_a.ipynb) [words](../../docs/words.md)"


def test_a_copy_with_work_in_it_is_kept_and_a_newer_original_is_told(project, capsys):
    make_copies()
    path = project / "build" / "learn" / "00_a.ipynb"
    worked = copy_of(project)
    worked.cells[1].source = "print(2)"
    nbformat.write(worked, path)
    mine = path.read_bytes()
    make_copies()
    assert path.read_bytes() == mine
    assert "Newer" not in capsys.readouterr().out

    nbformat.write(notebook("print(3)"), project / "notebooks" / "00_a.ipynb")
    make_copies()
    assert path.read_bytes() == mine
    said = capsys.readouterr().out
    assert "0 notebooks copied, 2 kept" in said
    assert "Newer in notebooks/ than your copies: 00_a.ipynb. Delete" in said

    path.unlink()
    make_copies()
    assert copy_of(project).cells[1].source == "print(3)"


def test_a_copy_that_was_run_is_kept_too(project):
    make_copies()
    ran = copy_of(project)
    ran.cells[1].execution_count = 1
    nbformat.write(ran, project / "build" / "learn" / "00_a.ipynb")
    nbformat.write(notebook("print(3)"), project / "notebooks" / "00_a.ipynb")
    make_copies()
    assert copy_of(project).cells[1].source == "print(1)"


def test_an_untouched_copy_follows_its_original(project, capsys):
    make_copies()
    nbformat.write(notebook("print(3)"), project / "notebooks" / "00_a.ipynb")
    make_copies()
    assert copy_of(project).cells[1].source == "print(3)"
    assert "1 notebooks copied, 1 kept" in capsys.readouterr().out.splitlines()[-2]


def test_a_damaged_copy_is_named_and_not_overwritten(project):
    make_copies()
    path = project / "build" / "learn" / "00_a.ipynb"
    path.write_text("{")
    with pytest.raises(TutorialError, match=r"00_a\.ipynb is damaged\. Delete it"):
        make_copies()
    assert path.read_text() == "{"


def test_outside_of_a_project_there_is_nothing_to_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(learner_copies, "project_root", lambda: tmp_path)
    with pytest.raises(TutorialError, match=r"^There are no notebooks here\."):
        make_copies()
    assert list(tmp_path.iterdir()) == []


def test_the_welcome_page_leads_to_every_notebook():
    text = (project_root() / "docs" / "welcome.md").read_text()
    names = sorted(path.name for path in (project_root() / "notebooks").glob("*.ipynb"))
    places = [text.index(f"](../notebooks/{name})") for name in names]
    assert places == sorted(places)


def test_jupyterlab_starts_at_the_project_with_files_of_the_learners_own(project, monkeypatch):
    started = []
    module = ModuleType("jupyterlab.labapp")
    module.LabApp = type("LabApp", (), {"launch_instance": started.append})
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", module)
    for name in ("TUTORIAL_ARTIFACTS", "JUPYTER_CONFIG_PATH", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    open_lab(["--no-browser"])
    assert started == [
        [
            f"--ServerApp.root_dir={project}",
            "--LabApp.default_url=/lab/tree/build/learn/Welcome.md",
            "--no-browser",
        ]
    ]
    assert os.environ["TUTORIAL_ARTIFACTS"] == str(project / "build" / "learn" / "artifacts")
    folder = Path(os.environ["JUPYTER_CONFIG_PATH"])
    for name in ("jupyter_lab_config.json", "labconfig/default_setting_overrides.json"):
        json.loads((folder / name).read_text())


# --- solutions -----------------------------------------------------------------------------

ANSWER = """<details><summary>Hint</summary>

Think of `3`:

```python
answer = 4
```

</details>

<details><summary>Solution</summary>

```python
answer = 3

print(answer)
```

Because two and one are three.

</details>"""


def exercise(answer: str) -> v4.nbbase.NotebookNode:
    cell = v4.new_code_cell("answer = ...\n\nprint(answer)", metadata={"tags": ["exercise"]})
    return v4.new_notebook(cells=[v4.new_code_cell("x = 1"), cell, v4.new_markdown_cell(answer)])


def test_the_solution_takes_the_place_of_the_exercise():
    first, second, third = solved(exercise(ANSWER)).cells
    assert (first.source, third.source) == ("x = 1", ANSWER)
    assert second.source == "answer = 3\n\nprint(answer)"


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("No solution.", 0),
        (ANSWER.replace("Solution", "Answer"), 0),
        (ANSWER.replace("Because", "```python\nanswer = 5\n```\n\nBecause"), 2),
    ],
)
def test_an_exercise_without_one_solution_is_refused(answer, count):
    with pytest.raises(TutorialError, match=f"is followed by {count} solutions"):
        solved(exercise(answer))


def test_an_exercise_at_the_end_has_no_solution():
    notebook = exercise(ANSWER)
    del notebook.cells[2]
    with pytest.raises(TutorialError, match="is followed by 0 solutions"):
        solved(notebook)
