"""The course: presets, artifacts, checks, figures, and the commands of `python -m helpers`.

It stands on the other packages, and none of them knows it. Imported in a notebook, it
shows an error of `helpers` as one sentence, and prints what the library logs;
`show_tracebacks()` brings the tracebacks back.
"""

import logging
import sys

from helpers.errors import HelpersError


def _sentence(error: HelpersError) -> list[str]:
    return [f"{type(error).__name__}: {error}"]


def show_sentences() -> None:
    """Let notebooks show an error of `helpers` as one sentence: a traceback would bury it."""
    # IPython asks an exception for this method before it formats a traceback.
    HelpersError._render_traceback_ = _sentence  # type: ignore[attr-defined]  # not in the class


def show_tracebacks() -> None:
    """Let notebooks show the whole traceback of every error again."""
    if "_render_traceback_" in vars(HelpersError):
        del HelpersError._render_traceback_  # type: ignore[attr-defined]  # as above


class _Printer(logging.Handler):
    """Prints messages to wherever `print` writes at the time, such as the current cell."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


def print_log() -> None:
    """Print what `helpers` logs from level INFO on; a second call changes nothing."""
    logger = logging.getLogger("helpers")
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)


def _in_notebook() -> bool:
    # Whoever runs IPython has imported it; a program that merely has it has no shell.
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


if _in_notebook():
    show_sentences()
    print_log()
