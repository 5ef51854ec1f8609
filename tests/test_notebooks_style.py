"""What every notebook has in common; the text, and the outputs that are stored with it."""

import re
from functools import cache
from itertools import pairwise

import nbformat
import pytest

from helpers.tutorial.artifacts import LEAVES, NOTEBOOKS
from helpers.tutorial.exercises import exercises_of as exercises_known
from helpers.tutorial.exercises import judge_of
from helpers.tutorial.notebooks import source_digest
from helpers.tutorial.settings import project_root

FOLDER = project_root() / "notebooks"
ROWS = ("You will", "You need", "Time", "Reads", "Leaves behind")
MACHINE_PATH = re.compile(r"/(?:home|root|tmp|work)\b|\b[A-Z]:\\")

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS.values())


def number_of(name: str) -> str:
    return name.partition("_")[0]


@cache
def load(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def sources(name: str, kind: str) -> list[str]:
    return [cell.source for cell in load(name).cells if cell.cell_type == kind]


def outputs(name: str) -> list[nbformat.NotebookNode]:
    return [out for cell in load(name).cells for out in cell.get("outputs", [])]


def readable(output: nbformat.NotebookNode) -> str:
    """Return the text of an output: all but its pictures, where any letters may turn up."""
    data = output.get("data", {})
    texts = [data[kind] for kind in data if not kind.startswith("image/")]
    return "\n".join(map(str, [output.get("text", ""), *texts]))


# --- the text ------------------------------------------------------------------------------


def test_the_notebooks_are_those_that_the_steps_name():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == list(NOTEBOOKS.values())
    for number, name in NOTEBOOKS.items():
        assert re.fullmatch(rf"{number}(_[a-z0-9]+)+\.ipynb", name)


@every_notebook
def test_it_is_a_valid_notebook_with_ids_of_its_own(name):
    notebook = load(name)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@every_notebook
def test_it_opens_with_a_title_and_what_it_takes_and_gives(name):
    first = load(name).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {number_of(name)} · ")
    for row in ROWS:
        assert re.search(rf"^\| \*\*{row}\*\* \| \S.* \|$", first.source, re.M), row


@every_notebook
def test_what_it_leaves_behind_carries_its_number(name):
    (row,) = re.findall(r"^\| \*\*Leaves behind\*\* \| (.*) \|$", load(name).cells[0].source, re.M)
    files = re.findall(r"`([^`]+)`", row)
    assert files == LEAVES[number_of(name)]
    code = "\n".join(sources(name, "code"))
    for file in files:
        # Some are written in a loop over networks and types.
        parts = re.split("dense|sparse|fp16|fp32", file)
        assert re.search(r"(dense|sparse|fp16|fp32|\{\w+\})".join(map(re.escape, parts)), code), (
            file
        )


@every_notebook
def test_it_reads_only_what_an_earlier_notebook_leaves(name):
    (row,) = re.findall(r"^\| \*\*Reads\*\* \| (.*) \|$", load(name).cells[0].source, re.M)
    assert all(number_of(file) < number_of(name) for file in re.findall(r"`([^`]+)`", row))


@every_notebook
def test_it_closes_with_what_the_reader_has_now(name):
    *_, heading, computed, last = load(name).cells
    assert last.cell_type == "markdown"
    assert (heading.cell_type, computed.cell_type) == ("markdown", "code")
    assert heading.source.startswith("## What you have now\n\n")
    assert computed.source == f'artifacts.left_by("{number_of(name)}")'
    assert last.source.startswith("**Key points**\n\n")
    points = last.source.partition("**Key points**")[2].partition("**Next:**")[0]
    assert len(re.findall(r"^\d\. ", points, re.M)) == 3
    assert "**Next:** " in last.source


def test_each_notebook_leads_to_the_next():
    for name, following in pairwise(NOTEBOOKS.values()):
        assert f"]({following})" in load(name).cells[-1].source
    assert f"]({NOTEBOOKS['03']})" in load(NOTEBOOKS["02"]).cells[-1].source  # 02b is optional


@every_notebook
def test_it_is_of_a_size_to_be_read_in_one_sitting(name):
    assert 20 <= len(load(name).cells) <= 40
    prose = re.sub(r"```.*?```", "", "\n".join(sources(name, "markdown")), flags=re.S)
    assert 450 <= len(prose.split()) <= 1400


@every_notebook
def test_its_cells_are_short_and_narrow(name):
    for source in sources(name, "code"):
        lines = source.splitlines()
        assert len(lines) <= 20, lines[0]
        for line in lines:
            assert len(line) <= 79, line


@every_notebook
def test_its_cells_are_python_alone(name):
    for source in sources(name, "code"):
        assert not re.search(r"^\s*[!%]", source, re.M), source
        compile(source, name, "exec")


@every_notebook
def test_it_checks_what_it_claims(name):
    assert any(re.search(r"\bcheck\(", source) for source in sources(name, "code"))


def exercises_of(name: str) -> list[int]:
    """Return the places of the exercise cells."""
    return [
        place
        for place, cell in enumerate(load(name).cells)
        if "exercise" in cell.metadata.get("tags", [])
    ]


@every_notebook
def test_it_has_two_exercises_one_of_them_code(name):
    cells = load(name).cells
    places = exercises_of(name)
    asked_for_code = [place for place in places if re.search(r"^def ", cells[place].source, re.M)]
    assert len(places) >= 2
    assert asked_for_code


@every_notebook
def test_its_exercises_are_left_open_and_have_a_hint_and_a_solution(name):
    cells = load(name).cells
    for place in exercises_of(name):
        source = cells[place].source
        assert re.search(r"^ *\w+ = \.\.\.$|^ +\.\.\.( +#.*)?$", source, re.M), "it is answered"
        (asked,) = re.findall(r'^check_answer\("([\w-]+)", \w+\)$', source, re.M)
        assert asked.partition("-")[0] == number_of(name)
        judge_of(asked)
        for part in ("Hint", "Solution"):
            assert f"<details><summary>{part}</summary>" in cells[place + 1].source


@every_notebook
def test_its_solutions_replace_their_exercises(name):
    cells = load(name).cells
    for place in exercises_of(name):
        solution = cells[place + 1].source.partition("<summary>Solution</summary>")[2]
        (code,) = re.findall(r"^```python\n(.*?)\n```$", solution, re.M | re.S)
        compile(code, name, "exec")
        calls = r'^check_answer\("[\w-]+", \w+\)$'
        assert re.findall(calls, code, re.M) == re.findall(calls, cells[place].source, re.M)


def test_no_two_exercises_share_a_name_and_each_one_is_asked():
    asked = [
        name
        for notebook in NOTEBOOKS.values()
        for source in sources(notebook, "code")
        for name in re.findall(r'^check_answer\("([\w-]+)"', source, re.M)
    ]
    assert len(set(asked)) == len(asked)
    known = {name for number in NOTEBOOKS for name in exercises_known(number)}
    assert known == set(asked)


@every_notebook
def test_it_saves_before_its_exercises_and_these_come_last(name):
    cells = load(name).cells
    first, *_, last = exercises_of(name)
    assert not any("artifacts.writing(" in cell.source for cell in cells[first:])
    assert last == len(cells) - 5  # then its solution, and the three cells that close


@every_notebook
def test_every_figure_has_a_text_for_those_who_cannot_see_it(name):
    for cell in load(name).cells:
        kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
        assert ("image/png" in kinds) == ("alt" in cell.metadata), cell.source
        if "alt" in cell.metadata:
            assert len(cell.metadata.alt.split()) >= 8


# --- the outputs ---------------------------------------------------------------------------


@every_notebook
def test_its_outputs_are_of_one_run_from_top_to_bottom(name):
    cells = [cell for cell in load(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every_notebook
def test_its_outputs_are_of_the_source_beside_them(name):
    notebook = load(name)
    recorded = notebook.metadata.get("tutorial", {}).get("source_sha256")
    assert recorded == source_digest(notebook.cells), "run `make notebooks`"


@every_notebook
def test_its_outputs_hold_no_error_and_nothing_of_stderr(name):
    assert outputs(name)
    for output in outputs(name):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.get("text")


@every_notebook
def test_its_outputs_hold_no_widget(name):
    kinds = {kind for output in outputs(name) for kind in output.get("data", {})}
    assert not any("widget" in kind for kind in kinds)
    assert "widgets" not in load(name).metadata


@every_notebook
def test_its_outputs_hold_no_path_of_a_machine(name):
    for output in outputs(name):
        found = MACHINE_PATH.search(readable(output))
        assert found is None, readable(output)


@every_notebook
def test_every_check_held(name):
    text = "\n".join(map(readable, outputs(name)))
    assert "[OK]" in text
    assert "[FAIL]" not in text


@every_notebook
def test_it_is_small_enough_to_be_shown_where_it_is_browsed(name):
    assert (FOLDER / name).stat().st_size < 500_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/root/x", True),
        ("in /tmp", True),
        (r"C:\Users", True),
        ("/workshop", False),
        ("a/b", False),
    ],
)
def test_a_path_of_a_machine_is_told_from_other_text(text, found):
    output = nbformat.v4.new_output("stream", text=text)
    assert bool(MACHINE_PATH.search(readable(output))) == found
