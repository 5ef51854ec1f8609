"""What the exercises of the notebooks expect, out of the reader's sight.

An exercise has a name that begins with the number of its notebook, such as `02-bytes`. What is
right, and what to tell a reader who makes a common mistake, says `answers.notebook_02`. Used by
every notebook.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from helpers.tutorial.checks import TutorialError

UNTOUCHED = "Replace the ... with your answer and run this cell again."
NO_HINT = "The hint below may help."

# Looks at an answer. Returns nothing if it is right, else a sentence that helps, or `NO_HINT`;
# `UNTOUCHED` if the reader has not begun.
Judge = Callable[[Any], str]


@dataclass(frozen=True)
class Value:
    """An exercise whose answer is a value, and not code.

    Args:
        expected: a number, text or list; lists compare in any order. Where it depends on the
            files of a run, a function that returns it.
        tolerance: largest difference at which a number still counts as right.
        mistakes: a sentence that helps, by the wrong answer that it fits.
    """

    expected: Any
    tolerance: float = 0.0
    mistakes: Mapping[Any, str] = field(default_factory=dict)

    def __call__(self, answer: Any) -> str:
        """Judge an answer, as a `Judge`."""
        expected = self.expected() if callable(self.expected) else self.expected
        if _agrees(answer, expected, self.tolerance):
            return ""
        for mistake, hint in self.mistakes.items():
            if _agrees(answer, mistake, self.tolerance):
                return hint
        return NO_HINT


@dataclass(frozen=True)
class Function:
    """An exercise whose answer is a function that returns something for its arguments.

    Args:
        right: a function that does what the exercise asks for.
        inputs: the arguments of each call that is tried.
        mistakes: a sentence that helps, by a function that makes the mistake which it fits.
        tolerance: largest difference at which a number still counts as right.
    """

    right: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    mistakes: Mapping[Callable[..., Any], str] = field(default_factory=dict)
    tolerance: float = 1e-6

    def __call__(self, answer: Callable[..., Any]) -> str:
        """Judge an answer, as a `Judge`."""
        results = self._results(answer)
        if all(result is None for result in results):
            return UNTOUCHED
        if _same(results, self._results(self.right), self.tolerance):
            return ""
        for mistake, hint in self.mistakes.items():
            if _same(results, self._results(mistake), self.tolerance):
                return hint
        return NO_HINT

    def _results(self, function: Callable[..., Any]) -> list[Any]:
        """Return what a function returns; it gets copies, since it may change its arguments."""
        return [function(*copy.deepcopy(arguments)) for arguments in self.inputs]


def check_answer(name: str, answer: Any) -> None:
    """Compare the reader's answer to an exercise with the expected one, and print the result.

    A wrong answer, of any type, is reported and does not stop the notebook. Nor does one that
    is still `...`, so that an untouched notebook runs from top to bottom.

    Args:
        name: of the exercise, such as `02-bytes`.
        answer: a value, or the function that the exercise asks for.

    Raises:
        TutorialError: there is no such exercise.
    """
    judge = judge_of(name)
    if answer is ...:
        print(UNTOUCHED)
        return
    shown = getattr(answer, "__name__", f"this object of type {type(answer).__name__}")
    try:
        hint = judge(answer)
        shown = shown if callable(answer) else f"{answer}"
    except Exception as error:  # the reader's code, or an object that cannot be compared
        hint = f"It stopped with {type(error).__name__}: {error}" if callable(answer) else NO_HINT
    if hint == UNTOUCHED:
        print(UNTOUCHED)
    elif hint:
        print(f"Not yet: {shown} is not the answer. {hint}")
    else:
        print(f"[OK] {shown} is right.")


def judge_of(name: str) -> Judge:
    """Return what judges the answers to an exercise.

    Raises:
        TutorialError: there is no such exercise.
    """
    known = exercises_of(name.partition("-")[0])
    if name not in known:
        others = f"This notebook has {', '.join(known)}." if known else "Begin with a number."
        raise TutorialError(f"There is no exercise {name!r}. {others}")
    return known[name]


def exercises_of(number: str) -> Mapping[str, Judge]:
    """Return the exercises of a notebook by name; none if there is no notebook of that number."""
    module = f"helpers.tutorial.answers.notebook_{number}"
    try:
        return import_module(module).EXERCISES
    except ModuleNotFoundError as error:
        if error.name != module:  # something that the module imports
            raise
        return {}


def _agrees(answer: Any, expected: Any, tolerance: float) -> bool:
    answer, expected = _plain(answer), _plain(expected)
    if isinstance(expected, int | float) and isinstance(answer, int | float):
        return abs(answer - expected) <= tolerance
    if isinstance(expected, list) and isinstance(answer, list):
        return len(answer) == len(expected) and all(
            answer.count(item) == expected.count(item) for item in expected
        )
    return bool(answer == expected)


def _same(one: Any, other: Any, tolerance: float) -> bool:
    """Return whether two results are equal, in order too, up to a tolerance."""
    one, other = _plain(one), _plain(other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            _same(*pair, tolerance) for pair in zip(one, other, strict=True)
        )
    return _agrees(one, other, tolerance)


def _plain(value: Any) -> Any:
    """Return tensors, arrays and their numbers as Python's own, and collections as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    return value
