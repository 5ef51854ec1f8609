"""Copies of the notebooks to work in: without outputs, and with files of their own.

`make lab` makes them in `build/learn/` and opens them in JupyterLab. A copy in which somebody has
worked is never overwritten. Explained in docs/welcome.md.
"""

import os
import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from helpers.files import atomic_write
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import project_root, relative

FOLDER = Path("build/learn")  # in the project's folder
_WELCOME = "Welcome.md"
_CONFIGURATION = Path(__file__).with_name("jupyter")

# The target of a link or of a picture, in Markdown and in HTML.
_LINK = re.compile(r"""(?<=\]\()[^)\s]+(?=\))|(?<=src=")[^"]+(?=")""")


def artifacts_folder() -> Path:
    """Return where the learner's notebooks keep their files."""
    return Path(os.environ.get("TUTORIAL_ARTIFACTS") or project_root() / FOLDER / "artifacts")


def make_copies() -> None:
    """Write a copy of each notebook that has none, and the welcome page.

    A copy of an older version of a notebook is replaced, unless somebody has worked in it.

    Raises:
        TutorialError: there are no notebooks here.
        WriteError: the folder cannot be written to.
    """
    root = project_root()
    originals = sorted((root / "notebooks").glob("*.ipynb"))
    if not originals:
        raise TutorialError("There are no notebooks here. Run this in the project's folder.")
    from nbformat import write

    made, outdated = [], []
    for original in originals:
        notebook = blank(_read(original))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _relinked(cell.source, original, root)
        notebook.metadata["tutorial"] = {"copied": _digest(notebook.cells)}
        copy = root / FOLDER / original.name
        if not copy.exists() or _may_be_replaced(copy, notebook):
            with atomic_write(copy) as part:
                write(notebook, part)
            made.append(copy.name)
        elif _copied_from(copy) != _digest(notebook.cells):
            outdated.append(copy.name)
    page = root / "docs" / "welcome.md"
    with atomic_write(root / FOLDER / _WELCOME) as part:
        part.write_text(_relinked(page.read_text(), page, root))
    kept = len(originals) - len(made)
    print(f"{FOLDER}: {len(made)} notebooks copied, {kept} kept as they were.")
    if outdated:
        print(
            f"Newer in notebooks/ than your copies: {', '.join(outdated)}. Delete a copy to get "
            "the new one."
        )
    print(f"To start afresh, delete a notebook in {FOLDER}, or the folder with all your work.")


def blank(notebook: Any) -> Any:
    """Return a notebook without outputs, changed in place."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def solved(notebook: Any) -> Any:
    """Return a notebook with the solution filled into each exercise, changed in place.

    The solution is the one block of Python in the Markdown cell after the exercise.

    Raises:
        TutorialError: an exercise is not followed by a solution of one block.
    """
    for place, cell in enumerate(notebook.cells):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        following = notebook.cells[place + 1].source if place + 1 < len(notebook.cells) else ""
        _, _, solution = following.partition("<summary>Solution</summary>")
        blocks = re.findall(r"^```python\n(.*?)\n```$", solution, re.M | re.S)
        if len(blocks) != 1:
            raise TutorialError(
                f"The exercise {cell.get('id', place)} is followed by {len(blocks)} solutions "
                "in Python, not by one."
            )
        cell.source = blocks[0]
    return notebook


def open_lab(options: Sequence[str]) -> None:
    """Open JupyterLab on the welcome page and the copies, until it is shut down.

    Its root is the project's folder. JupyterLab may write nothing but the learner's files.

    Args:
        options: of the command line of `jupyter lab`, such as `--no-browser`.

    Raises:
        TutorialError: JupyterLab is not installed.
    """
    try:
        from jupyterlab.labapp import LabApp
    except ImportError as error:
        raise TutorialError(
            f"JupyterLab cannot be started ({error}). Install the project with its notebooks: "
            "pip install -e '.[notebooks]'."
        ) from error
    os.environ["TUTORIAL_ARTIFACTS"] = str(artifacts_folder())
    before = os.environ.get("JUPYTER_CONFIG_PATH")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, [str(_CONFIGURATION), before]))
    # A terminal in JupyterLab finds this Python first.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    LabApp.launch_instance(
        [
            f"--ServerApp.root_dir={project_root()}",
            f"--LabApp.default_url=/lab/tree/{(FOLDER / _WELCOME).as_posix()}",
            *options,
        ]
    )


def _may_be_replaced(copy: Path, newer: Any) -> bool:
    """Return whether a copy is as it was made, but not of this version of the notebook."""
    notebook = _read(copy)
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells):
        return False
    mine = _digest(notebook.cells)
    return mine == notebook.metadata.get("tutorial", {}).get("copied") != _digest(newer.cells)


def _copied_from(copy: Path) -> str:
    """Return the checksum of the notebook that a copy was made from."""
    return str(_read(copy).metadata.get("tutorial", {}).get("copied", ""))


def _read(path: Path) -> Any:
    from nbformat import NO_CONVERT, read
    from nbformat.reader import NotJSONError

    try:
        return read(path, NO_CONVERT)
    except (NotJSONError, UnicodeDecodeError) as error:
        raise TutorialError(
            f"{relative(path)} is damaged. Delete it and run this again to get a new copy."
        ) from error


def _digest(cells: Sequence[Any]) -> str:
    """Return a checksum of the text and code of a notebook."""
    text = "\0".join(f"{cell.cell_type}\0{cell.source}" for cell in cells)
    return sha256(text.encode()).hexdigest()


def _relinked(text: str, original: Path, root: Path) -> str:
    """Return Markdown with its links changed to be right in the learner's folder.

    Links to notebooks lead to the learner's copies.
    """

    def changed(found: re.Match[str]) -> str:
        path, mark, place = found[0].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        target = (original.parent / path).resolve()
        if target.suffix == ".ipynb" and target.parent == root / "notebooks":
            return f"{target.name}{mark}{place}"
        return Path(os.path.relpath(target, root / FOLDER)).as_posix() + mark + place

    return _LINK.sub(changed, text)
