"""The course: presets, artifacts, checks, figures, and the commands of `python -m helpers`.

It imports the other packages, and none of them imports it. Imported in a notebook, it shows
an error of `helpers` as one sentence, and so an interrupted cell, and prints what the library
logs; `show_tracebacks()` brings the tracebacks back.
"""

import logging
import sys
from typing import Any

from helpers.errors import HelpersError

# IPython looks for this method on an exception before it formats a traceback.
_HOOK = "_render_traceback_"


def _sentence(error: HelpersError) -> list[str]:
    return [f"{type(error).__name__}: {error}"]


def show_sentences() -> None:
    """Let notebooks show an error of `helpers` as one sentence: a traceback would bury it.

    A cell that is interrupted gets one sentence too.
    """
    setattr(HelpersError, _HOOK, _sentence)
    if shell := _notebook():
        shell.set_custom_exc((KeyboardInterrupt,), _print_interrupt)


def show_tracebacks() -> None:
    """Let notebooks show the whole traceback of every error again."""
    if _HOOK in vars(HelpersError):
        delattr(HelpersError, _HOOK)
    if shell := _notebook():
        shell.set_custom_exc((), None)


def _print_interrupt(_shell: Any, _kind: type, stop: BaseException, *_: Any, **__: Any) -> None:
    print(str(stop) or "Interrupted.", file=sys.stderr)


class _Printer(logging.Handler):
    """Prints messages to wherever `print` writes at the time, such as the current cell."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


def print_log() -> None:
    """Print what `helpers` logs from level INFO on; a second call changes nothing."""
    # torch.compile warns of a CUDA toolkit on a machine without a GPU, which is no fault.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logger = logging.getLogger("helpers")
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())
        logger.setLevel(logging.INFO)


def _notebook() -> Any:
    """Return IPython's shell, or None."""
    # IPython runs if it is imported and has a shell; a program may import it without one.
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


if _notebook() is not None:
    show_sentences()
    print_log()
