"""Checks in plain words, which the reader sees and the notebooks assert.

Every step of the tutorial ends in an executed check. Introduced in `00_check_your_setup.ipynb`.
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
