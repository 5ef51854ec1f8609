import numpy as np
import pytest

from helpers.errors import HelpersError
from helpers.training.data import DataError
from helpers.training.networks import CheckpointError
from helpers.tutorial.artifacts import ArtifactError
from helpers.tutorial.checks import CheckError, check, check_answer


def test_check_prints_what_holds(capsys):
    check([1], "a list is not empty")
    assert capsys.readouterr().out == "[OK] a list is not empty\n"


def test_check_stops_with_what_does_not_hold(capsys):
    with pytest.raises(CheckError, match=r"^\[FAIL\] a list is not empty$"):
        check([], "a list is not empty")
    assert capsys.readouterr().out == ""


def test_an_untouched_answer_is_asked_for(capsys):
    check_answer(..., 3)
    assert capsys.readouterr().out.startswith("Replace the ...")


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance"),
    [
        (3, 3, 0),
        (1.78, 1.781, 0.01),
        ("grouped", "grouped", 0),
        ([3, 1], [1, 3], 0),
        ((3, 1), [1, 3], 0),
        ({1, 3}, [1, 3], 0),
        ([1.0, 3], [1, 3], 0),
        ([True, "a"], [1, "a"], 0),
        (list(np.array([3, 1])), [1, 3], 0),
    ],
)
def test_a_right_answer_is_told_so(capsys, answer, expected, tolerance):
    check_answer(answer, expected, tolerance)
    assert capsys.readouterr().out == f"[OK] {answer} is right.\n"


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance"),
    [
        (4, 3, 0),
        (1.8, 1.781, 0.01),
        (float("nan"), 3, 1),
        ("dense", "grouped", 0),
        ([1, 2], [1, 3], 0),
        ([1], [1, 3], 0),
        (None, 3, 0),
        ("three", 3, 1),
    ],
)
def test_a_wrong_answer_stops_nothing(capsys, answer, expected, tolerance):
    check_answer(answer, expected, tolerance)
    assert capsys.readouterr().out.startswith("Not yet:")


@pytest.mark.parametrize("answer", [[..., ...], ["two", 1], [None, 1]])
def test_a_list_of_anything_stops_nothing(capsys, answer):
    check_answer(answer, [1, 2])
    assert "[OK]" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind", [HelpersError, CheckError, ArtifactError, DataError, CheckpointError]
)
def test_a_notebook_shows_an_error_as_one_line(kind):
    lines = kind("The file is missing.")._render_traceback_()
    assert lines == [f"{kind.__name__}: The file is missing."]


def test_ipython_shows_no_traceback(capsys):
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactiveshell.InteractiveShell()
    shell.run_cell("from helpers.checks import HelpersError\nraise HelpersError('Do this.')")
    output = capsys.readouterr()
    assert "HelpersError: Do this." in output.out + output.err
    assert "Traceback" not in output.out + output.err
