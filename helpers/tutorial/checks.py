"""Checks in plain words, which the reader sees and the notebooks assert.

Every step of the tutorial ends in an executed check; every exercise is compared
with its answer. Introduced in `00_check_your_setup.ipynb`.
"""

from typing import Any

from helpers.errors import HelpersError


class TutorialError(HelpersError, RuntimeError):
    """A step of the tutorial cannot go on; the message says what to do next."""


class CheckError(TutorialError):
    """A statement of the tutorial does not hold on this run."""


def check(holds: Any, statement: str) -> None:
    """Print `[OK]` and the statement, or stop with it.

    Args:
        holds: anything with a truth value.
        statement: what is claimed, in plain words.

    Raises:
        CheckError: the statement does not hold.
    """
    if not holds:
        raise CheckError(f"[FAIL] {statement}")
    print(f"[OK] {statement}")


def check_answer(answer: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Compare the reader's answer to an exercise with the expected one.

    A wrong answer, of any type, is reported and does not stop the notebook. Nor does one that
    is still `...`, so that an untouched notebook runs from top to bottom.

    Args:
        answer: a number, text or list, a tensor or an array; lists compare in any order.
        expected: the right answer.
        tolerance: largest difference at which a number still counts as right.
    """
    if answer is ...:
        print("Replace the ... with your answer and run this cell again.")
        return
    try:
        right, shown = _agrees(answer, expected, tolerance), f"{answer}"
    except Exception:  # objects of other types may fail to compare, in whatever way
        right, shown = False, f"this object of type {type(answer).__name__}"
    if right:
        print(f"[OK] {shown} is right.")
    else:
        print(f"Not yet: {shown} is not the answer. The hint below may help.")


def _agrees(answer: Any, expected: Any, tolerance: float) -> bool:
    answer, expected = _plain(answer), _plain(expected)
    if isinstance(expected, int | float) and isinstance(answer, int | float):
        return abs(answer - expected) <= tolerance
    if isinstance(expected, list) and isinstance(answer, list):
        return len(answer) == len(expected) and all(
            answer.count(item) == expected.count(item) for item in expected
        )
    return bool(answer == expected)


def _plain(value: Any) -> Any:
    """Return tensors, arrays and their numbers as Python's own, and collections as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    return value
