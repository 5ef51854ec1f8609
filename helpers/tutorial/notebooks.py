"""Run the notebooks in order, and keep their outputs.

What `make tutorial` and `make notebooks` call.
"""

import os
import tempfile
from collections.abc import Sequence
from hashlib import sha256 as digest
from pathlib import Path
from typing import Any

from helpers.files import atomic_write
from helpers.inference.engine import why_no_builder
from helpers.progress_bar import progress_bar
from helpers.tutorial.artifacts import NOTEBOOKS
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import Settings, project_root

ENGINES = "05"  # the notebook that needs an engine builder; those after it can do without


def source_digest(cells: Sequence[Any]) -> str:
    """Return a checksum of a notebook's code, which shows whether outputs are of that code."""
    code = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return digest(code.encode()).hexdigest()


def run_notebooks(settings: Settings, save: bool = False) -> None:
    """Run every notebook from top to bottom, one after the other.

    Args:
        settings: the preset; its artifacts folder receives executed copies.
        save: write the outputs into `notebooks/` as well, without progress bars.

    Raises:
        TutorialError: Jupyter is not installed, or a cell failed.
    """
    try:
        import nbclient  # noqa: F401  (fail before anything runs)
        import nbformat
    except ImportError as error:
        raise TutorialError(
            f"Notebooks cannot be run here ({error}). Install the project with its notebooks: "
            "pip install -e '.[notebooks]'. `python -m helpers` runs the same steps without them."
        ) from error
    folder = project_root() / "notebooks"
    copies = settings.artifacts_dir / "notebooks"
    no_builder = why_no_builder()
    for number, name in progress_bar(NOTEBOOKS.items(), desc="notebooks", leave=True):
        if number == ENGINES and no_builder:
            print(f"{name} is left out: {no_builder}")
            continue
        notebook = nbformat.read(folder / name, as_version=4)
        _execute(notebook, name, folder, settings.preset)
        tidy(notebook)
        for target in [copies, folder] if save else [copies]:
            with atomic_write(target / name) as part:
                nbformat.write(notebook, part)


def _execute(notebook: Any, name: str, folder: Path, preset: str) -> None:
    """Run a notebook in place, in a kernel of its own."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as sockets:
        # Sockets in a private folder: over TCP, which Windows needs, any user of the machine could
        # listen.
        ipc = Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")})
        transport = ipc if os.name == "posix" else Config()
        client = NotebookClient(
            notebook, config=transport, timeout=None, resources={"metadata": {"path": folder}}
        )
        try:
            # A progress bar would be stored as a line for each of its states.
            client.execute(env=os.environ | {"TUTORIAL_PRESET": preset, "TQDM_DISABLE": "1"})
        except CellExecutionError as error:
            raise TutorialError(f"{name} stopped: {error.ename}: {error.evalue}") from error
        except DeadKernelError as error:
            raise TutorialError(
                f"{name} stopped: its kernel died, as it does when memory runs out."
            ) from error


def tidy(notebook: Any) -> None:
    """Remove widgets, timings and the kernel's version from an executed notebook, in place.

    The checksum of the code is recorded, so that a test detects outputs of older code.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "tutorial": {"source_sha256": source_digest(notebook.cells)},
    }
