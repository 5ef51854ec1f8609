"""The bar of a long loop: one line of text, in a terminal and in a notebook.

tqdm's own bar for notebooks is a widget. A widget lives in the kernel, so a notebook that was
saved with one shows "Error displaying widget" when it is opened again.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_COLUMNS = 79  # the width of a cell's code


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return tqdm's bar for a loop; it vanishes at the end unless `leave` is true.

    In a notebook it is part of the cell's output, and a bar inside another one's loop takes its
    line. Elsewhere it goes to standard error, as tqdm's bars do.

    Args:
        iterable: what to loop over; None for a bar that `update` moves.
        options: as `tqdm` takes them.
    """
    if _prints_into_a_cell():
        # Notebooks show standard error as a fault, and cannot move the cursor to another line.
        # One step at least makes tqdm's own thread leave the bar alone, which could print into
        # another cell.
        options |= {"file": sys.stdout, "position": 0, "ncols": _COLUMNS, "miniters": 1}
    return tqdm(iterable, **{"leave": False, **options})


def _prints_into_a_cell() -> bool:
    """Return whether `print` writes into a notebook, and not to a terminal or a file."""
    ipykernel = sys.modules.get("ipykernel.iostream")
    return ipykernel is not None and isinstance(sys.stdout, ipykernel.OutStream)
