"""The records of benchmarks that go on where an earlier run has stopped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.errors import InputError


def earlier_lists(path: Path, names: Sequence[str], *packages: str) -> list[list[dict[str, Any]]]:
    """Return the lists of a record that earlier runs left; all are empty if there is no file.

    Args:
        path: the record.
        names: of the lists, in the order in which they are returned.
        packages: whose versions it holds, besides the project's.

    Raises:
        InputError: the file is no such record, or one of another machine or other versions.
    """
    if not path.exists():
        return [[] for _ in names]
    try:
        earlier = json.loads(path.read_text())
        lists = [list(earlier[name]) for name in names]
        where = earlier["machine"], earlier["versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path.name} does not hold a record of this script ({error}). Delete it, or pass "
            "another file as --out."
        ) from error
    if where != (machine.describe(), machine.versions(*packages)):
        raise InputError(
            f"{path.name} holds the results of another machine or of other versions. Pass "
            "another file as --out."
        )
    return lists
