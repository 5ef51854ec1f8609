"""The bar of a long loop: where it is drawn, and that it is gone at the end."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType

from helpers.progress_bar import progress_bar


class Cell(io.StringIO):
    """What `print` writes to in a notebook."""


@contextmanager
def notebook(monkeypatch) -> Iterator[Cell]:
    """Let this process be the kernel of a notebook, and give what its cell shows."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    module = ModuleType("ipykernel.iostream")
    module.OutStream = Cell
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", module)
    with redirect_stdout(Cell()) as cell:
        yield cell


def visible(text: str) -> list[str]:
    """Return the lines that a notebook shows of a text with carriage returns."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_in_a_terminal_the_bar_goes_to_standard_error_and_vanishes(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert list(progress_bar(range(3), desc="weights")) == [0, 1, 2]
    output, errors = capsys.readouterr()
    assert output == ""
    assert "weights:" in errors
    assert visible(errors) == [""]


def test_in_a_notebook_it_is_one_line_of_the_output(monkeypatch, capsys):
    with notebook(monkeypatch) as cell:
        for number in progress_bar(range(3), desc="weights", mininterval=0):
            (line,) = visible(cell.getvalue())
            assert line.startswith("weights: ")
            assert f"{number}/3" in line
            assert len(line) <= 79
    assert visible(cell.getvalue()) == [""]
    assert capsys.readouterr() == ("", "")


def test_in_a_notebook_a_bar_inside_another_takes_its_line(monkeypatch):
    with notebook(monkeypatch) as cell:
        for _ in progress_bar(range(2), desc="outer", mininterval=0):
            for _ in progress_bar(range(2), desc="inner", mininterval=0):
                (line,) = visible(cell.getvalue())
                assert line.startswith("inner: ")
    assert visible(cell.getvalue()) == [""]
    assert "\x1b" not in cell.getvalue()


def test_a_bar_that_an_error_left_open_does_not_move_the_next_one(monkeypatch):
    with notebook(monkeypatch) as cell:
        left = iter(progress_bar(range(2), desc="left", mininterval=0))
        next(left)
        for _ in progress_bar(range(2), desc="next", mininterval=0):
            (line,) = visible(cell.getvalue())
            assert line.startswith("next: ")


def test_what_is_printed_after_it_stands_on_its_line(monkeypatch):
    with notebook(monkeypatch) as cell:
        list(progress_bar(range(2), desc="weights", mininterval=0))
        print("done")
    assert visible(cell.getvalue()) == ["done", ""]


def test_it_may_stay(monkeypatch):
    with notebook(monkeypatch) as cell:
        list(progress_bar(range(2), desc="weights", leave=True))
    first, last = visible(cell.getvalue())
    assert "2/2" in first
    assert last == ""
