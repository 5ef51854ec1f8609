"""Checks in plain words, for the reader to see and for the notebooks to rest on.

Every step of the tutorial ends in an executed check; every exercise is compared
with its answer. Introduced in `00_check_your_setup.ipynb`.
"""

from typing import Any

from helpers.errors import HelpersError


class TutorialError(HelpersError, RuntimeError):
    """A step of the tutorial cannot go on; the message says what to do."""


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

    An answer that is still `...` is left alone, so that an untouched notebook runs
    from top to bottom; a wrong one is told so and stops nothing either.

    Args:
        answer: a number, text or list; lists compare in any order.
        expected: the right answer.
        tolerance: largest difference at which a number still counts as right.
    """
    if answer is ...:
        print("Replace the ... with your answer and run this cell again.")
    elif _agrees(answer, expected, tolerance):
        print(f"[OK] {answer} is right.")
    else:
        print(f"Not yet: {answer} is not the answer. The hint below may help.")


def _agrees(answer: Any, expected: Any, tolerance: float) -> bool:
    if hasattr(answer, "item"):  # a number as PyTorch or NumPy hold it
        answer = answer.item()
    if isinstance(expected, int | float) and isinstance(answer, int | float):
        return abs(answer - expected) <= tolerance
    if isinstance(expected, list | tuple | set) and isinstance(answer, list | tuple | set):
        answer, expected = list(answer), list(expected)
        return len(answer) == len(expected) and all(
            answer.count(item) == expected.count(item) for item in expected
        )
    return answer == expected
