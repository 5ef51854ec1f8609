import numpy as np
import pandas as pd
import pytest
import torch

from helpers import tutorial
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
        (np.array([3, 1]), [1, 3], 0),
        (np.float64(1.78), 1.781, 0.01),
        (torch.tensor(3), 3, 0),
        (torch.tensor([1, 3]), [1, 3], 0),
        ([torch.tensor(3), torch.tensor(1)], [1, 3], 0),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]], 0),
        ([1, 2], torch.tensor([1, 2]), 0),
        (pd.Series([3, 1]), [1, 3], 0),
        ({"a": 1}, {"a": 1}, 0),
    ],
)
def test_a_right_answer_is_confirmed(capsys, answer, expected, tolerance):
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


class Odd:
    """An object that can neither be compared nor shown."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __hash__ = None


@pytest.mark.parametrize("expected", [3, 1.5, "grouped", [1, 2]])
@pytest.mark.parametrize(
    "answer",
    [
        [..., ...],
        ["two", 1],
        [None, 1],
        torch.tensor([1, 5]),
        torch.zeros(2, 3),
        torch.zeros(0),
        [torch.zeros(2), torch.zeros(3)],
        np.zeros((2, 2)),
        [np.zeros(2), 1],
        np.array([]),
        pd.DataFrame({"a": [1, 2]}),
        [pd.DataFrame({"a": [1, 2]}), 1],
        pd.Series([1, 5]),
        {"a": torch.zeros(2)},
        {"a", "b"},
        torch.nn.Linear(2, 2),
        10**400,
        1j,
        Odd(),
        [Odd(), Odd()],
        check_answer,
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_of_any_type_stops_nothing(capsys, answer, expected):
    check_answer(answer, expected, tolerance=0.1)
    assert capsys.readouterr().out.startswith("Not yet:")


@pytest.fixture
def sentences():
    """Let errors be shown as one sentence, as in a notebook, while the test runs."""
    tutorial.show_sentences()
    yield
    tutorial.show_tracebacks()


@pytest.mark.parametrize(
    "kind", [HelpersError, CheckError, ArtifactError, DataError, CheckpointError]
)
def test_a_notebook_shows_an_error_as_one_line(sentences, kind):
    lines = kind("The file is missing.")._render_traceback_()
    assert lines == [f"{kind.__name__}: The file is missing."]


def test_errors_outside_of_notebooks_keep_their_traceback():
    assert not hasattr(HelpersError, "_render_traceback_")


def test_asking_for_tracebacks_twice_is_harmless():
    tutorial.show_tracebacks()
    assert not hasattr(HelpersError, "_render_traceback_")


def test_ipython_shows_no_traceback(sentences, capsys):
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactiveshell.InteractiveShell()
    shell.run_cell("from helpers.errors import HelpersError\nraise HelpersError('Do this.')")
    output = capsys.readouterr()
    assert "HelpersError: Do this." in output.out + output.err
    assert "Traceback" not in output.out + output.err
