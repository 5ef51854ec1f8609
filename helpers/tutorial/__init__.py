"""The course: presets, artifacts, checks, figures, and the commands of `python -m helpers`.

It imports the other packages, and none of them imports it. Imported in a notebook, it shows
an error of `helpers` and an interruption as one sentence and prints what the library logs;
`show_tracebacks()` brings the tracebacks back.
"""

import logging
import sys
from types import TracebackType
from typing import Any

from helpers.errors import HelpersError

# IPython looks for this method on an exception before it formats a traceback.
_HOOK = "_render_traceback_"


def _sentence(error: HelpersError) -> list[str]:
    return [f"{type(error).__name__}: {error}"]


def show_interruption(
    shell: Any,
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
    tb_offset: int | None = None,
) -> list[str]:
    """Show in one sentence that the reader has interrupted a cell; called by IPython."""
    notes = getattr(error, "__notes__", ["Run the cell again to go on."])
    lines = [f"Interrupted. {' '.join(notes)}"]
    shell._showtraceback(kind, error, lines)
    return lines


def show_sentences() -> None:
    """Let notebooks show an error of `helpers` as one sentence: a traceback would bury it."""
    setattr(HelpersError, _HOOK, _sentence)
    if (shell := _shell()) is not None:
        shell.set_custom_exc((KeyboardInterrupt,), show_interruption)


def show_tracebacks() -> None:
    """Let notebooks show the whole traceback of every error again."""
    if _HOOK in vars(HelpersError):
        delattr(HelpersError, _HOOK)
    if (shell := _shell()) is not None:
        shell.set_custom_exc((), None)


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


def _shell() -> Any:
    """Return IPython's shell; None outside a notebook, where a program may import IPython."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


if _shell() is not None:
    show_sentences()
    print_log()
