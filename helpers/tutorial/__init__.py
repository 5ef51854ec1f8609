"""The course: presets, artifacts, checks, figures, and the commands of `python -m helpers`.

It stands on the other packages, and none of them knows it. Imported in a notebook, it
shows an error of `helpers` as one sentence, and prints what the library logs;
`show_tracebacks()` brings the tracebacks back.
"""

import logging
import sys
from typing import TextIO

from helpers.errors import HelpersError


def _sentence(error: HelpersError, *_: object, **__: object) -> list[str]:
    return [f"{type(error).__name__}: {error}"]


def show_sentences() -> None:
    """Let notebooks show an error of `helpers` as one sentence: a traceback would bury it."""
    # IPython asks an exception for this method before it formats a traceback.
    HelpersError._render_traceback_ = _sentence  # type: ignore[attr-defined]


def show_tracebacks() -> None:
    """Let notebooks show the whole traceback of every error again."""
    if "_render_traceback_" in vars(HelpersError):
        del HelpersError._render_traceback_  # type: ignore[attr-defined]


class _Printer(logging.Handler):
    """Prints messages wherever standard output goes at the time, a cell or a test."""

    def emit(self, record: logging.LogRecord) -> None:
        out: TextIO = sys.stdout
        out.write(self.format(record) + "\n")


def print_log() -> None:
    """Print what `helpers` logs from level INFO on; a second call changes nothing."""
    logger = logging.getLogger("helpers")
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)


if "IPython" in sys.modules:
    show_sentences()
    print_log()
