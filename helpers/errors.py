"""Errors whose message is for the reader: what was wrong, where, and what to do next.

Each is also of the built-in kind that a program expects, so `except ValueError` catches a
wrong argument. Notebooks and the command line show the message alone; `helpers.tutorial`
says how to see the traceback.
"""


class HelpersError(Exception):
    """The base of all errors that this package raises on purpose."""


class InputError(HelpersError, ValueError):
    """An argument, a model or a file does not fit."""


class UnavailableError(HelpersError, RuntimeError):
    """The machine or the model cannot do what was asked for."""


class WriteError(HelpersError, OSError):
    """A file could not be written; what was there before is unchanged."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if the message is empty."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """Return the error that started the chain of `raise ... from ...` that ends in this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
