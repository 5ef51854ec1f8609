"""The folder of a training run: its recipe, where it ran, and the metrics of its epochs.

Explained in docs/retraining.md.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers import machine
from helpers.files import atomic_write, json_text
from helpers.training.distributed import Processes
from helpers.training.progress import Epoch
from helpers.training.recipe import Recipe, write_recipe


class RunFolder:
    """The files of one training, which a person reads while it runs and afterwards.

    - `recipe.yaml`: every value of the recipe
    - `starts.jsonl`: a line for each start, with command, processes, git revision, machine and
      versions
    - `metrics.jsonl`: a line for each finished epoch
    - `events.out.tfevents.*`: the same for TensorBoard, if it is installed
    """

    def __init__(self, folder: Path, recipe: Recipe, together: Processes) -> None:
        """Record the start of a training in a folder, which is made if needed.

        Only the first process may do this.

        Raises:
            WriteError: the disk is full or the folder cannot be written to.
        """
        self.folder = folder
        write_recipe(recipe, folder / "recipe.yaml")
        start = {
            "command": shlex.join(sys.orig_argv[1:]),
            "processes": together.count,
            "git": git_revision(Path.cwd()),
            **machine.provenance(),
        }
        starts = folder / "starts.jsonl"
        before = starts.read_text(encoding="utf-8") if starts.exists() else ""
        _write_text(starts, before + _line(start))
        self._written = 0  # epochs that TensorBoard has
        self._board = _tensorboard(folder)

    def record(self, history: Sequence[Epoch]) -> None:
        """Write the metrics of all epochs so far.

        The whole file is written again, so it never disagrees with the training's own record.

        Raises:
            WriteError: the disk is full or the folder cannot be written to.
        """
        lines = "".join(_line(asdict(epoch)) for epoch in history)
        _write_text(self.folder / "metrics.jsonl", lines)
        if self._board is None:
            return
        for epoch in history[self._written :]:
            for name, value in asdict(epoch).items():
                if name != "number":
                    self._board.add_scalar(name, value, epoch.number)
        self._written = len(history)
        self._board.flush()


def git_revision(folder: Path) -> str | None:
    """Return the commit that a folder is at, with `-dirty` after it if files have changed.

    None outside of a repository and where git is not installed.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _line(values: dict[str, Any]) -> str:
    return json.dumps(json.loads(json_text(values)), ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def _tensorboard(folder: Path) -> Any:
    """Return a writer for TensorBoard, or None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=1)
