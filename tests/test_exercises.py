"""Exercises: what is said of a right, a wrong and an untouched answer."""

import sys
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.tutorial.checks import TutorialError
from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Value, check_answer, judge_of


@pytest.fixture
def exercise(monkeypatch):
    """Let notebook 99 have one exercise, with this judge."""

    def make(judge):
        module = ModuleType("notebook_99")
        module.EXERCISES = {"99-made-up": judge}
        monkeypatch.setitem(sys.modules, "helpers.tutorial.answers.notebook_99", module)

    return make


def test_an_untouched_answer_is_asked_for(capsys):
    check_answer("02-bytes", ...)
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
def test_a_right_answer_is_confirmed(capsys, exercise, answer, expected, tolerance):
    exercise(Value(expected, tolerance))
    check_answer("99-made-up", answer)
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
def test_a_wrong_answer_stops_nothing(capsys, exercise, answer, expected, tolerance):
    exercise(Value(expected, tolerance))
    check_answer("99-made-up", answer)
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
def test_an_answer_of_any_type_stops_nothing(capsys, exercise, answer, expected):
    exercise(Value(expected, tolerance=0.1))
    check_answer("99-made-up", answer)
    assert capsys.readouterr().out.startswith("Not yet:")


def test_a_common_mistake_gets_the_hint_that_fits(capsys, exercise):
    exercise(Value(6, mistakes={4: "That counts one survivor."}))
    check_answer("99-made-up", 4)
    check_answer("99-made-up", 5)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Not yet: 4 is not the answer. That counts one survivor."
    assert second == f"Not yet: 5 is not the answer. {NO_HINT}"


def test_an_expected_value_may_be_computed_when_it_is_asked_for(capsys, exercise):
    exercise(Value(lambda: 3))
    check_answer("99-made-up", 3)
    assert capsys.readouterr().out == "[OK] 3 is right.\n"


def double(number):
    return 2 * number


def untouched(number): ...


def broken(number):
    raise ValueError("no such axis")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (double, "[OK] double is right.\n"),
        (untouched, f"{UNTOUCHED}\n"),
        (abs, "Not yet: abs is not the answer. Twice as much.\n"),
        (
            broken,
            "Not yet: broken is not the answer. It stopped with ValueError: no such axis\n",
        ),
    ],
)
def test_an_answer_may_be_code(capsys, exercise, answer, said):
    def judge(function):
        result = function(4)
        if result is None:
            return UNTOUCHED
        return "" if result == 8 else "Twice as much."

    exercise(judge)
    check_answer("99-made-up", answer)
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("name", ["02-no-such", "98-none", "bytes", ""])
def test_an_exercise_that_does_not_exist_is_named(name):
    with pytest.raises(TutorialError, match=rf"^There is no exercise '{name}'\."):
        judge_of(name)
