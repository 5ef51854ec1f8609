"""Files that one step leaves and the next one needs, each with its provenance.

Beside every artifact is a JSON sidecar: who made it, when, with which versions
and seed, its checksum, and the checksums of the artifacts it was made from. A
step asks for its input with `Artifacts.require`, which refuses a missing, damaged
or outdated file in one sentence. Used by every notebook.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.errors import WriteError
from helpers.files import atomic_write, sha256, write_json
from helpers.machine import versions
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import Settings

NOTEBOOKS = {
    "00": "00_check_your_setup.ipynb",
    "01": "01_load_pretrained.ipynb",
    "02": "02_prune_2_4.ipynb",
    "03": "03_retrain.ipynb",
    "04": "04_export_onnx.ipynb",
    "05": "05_build_engine.ipynb",
    "06": "06_infer_and_benchmark.ipynb",
    "07": "07_sparse_tensor_cores.ipynb",
    "08": "08_int8.ipynb",
}

# The networks that are exported, built and measured, and their checkpoints.
NETWORKS = {"dense": "01_dense.safetensors", "sparse": "03_retrained.safetensors"}


class ArtifactError(TutorialError):
    """An artifact is missing, damaged or out of date."""


def notebook_of(name: str) -> str:
    """Return the notebook that makes the artifact `name`.

    Raises:
        ArtifactError: the name does not begin with the number of a notebook.
    """
    if name[:2] not in NOTEBOOKS:
        raise ArtifactError(
            f"{name!r} is not a name for an artifact: begin it with the two digits of the "
            f"notebook that makes it, {min(NOTEBOOKS)} to {max(NOTEBOOKS)}."
        )
    return NOTEBOOKS[name[:2]]


class Artifacts:
    """The artifacts folder of one preset.

    The first two digits of a name say which notebook makes the file:
    `02_pruned.safetensors` is the work of `02_prune_2_4.ipynb`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.artifacts_dir
        self.figures = self.folder / "figures"
        # By name: when the file was last changed, and its checksum then.
        self._checksums: dict[str, tuple[tuple[int, int, int], str]] = {}

    def path(self, name: str) -> Path:
        """Return the path of the artifact `name`, whether it exists or not."""
        return self.folder / name

    @contextmanager
    def writing(
        self,
        name: str,
        parents: Sequence[str] = (),
        facts: dict[str, Any] | None = None,
    ) -> Iterator[Path]:
        """Yield the path to write the artifact to, then add its sidecar.

        Args:
            name: file name; its first two digits name the notebook.
            parents: names of the artifacts it is made from.
            facts: whatever else the sidecar should record (accuracy, recipe); entries
                added while the artifact is written are recorded too.

        Raises:
            ArtifactError: the name is not one of an artifact, a parent is missing,
                damaged or out of date, or the file cannot be written.
        """
        made_by = notebook_of(name)
        checksums = {parent: self.describe(parent)["sha256"] for parent in parents}
        try:
            with atomic_write(self.path(name)) as part:
                yield part
                checksum = sha256(part)
            sidecar = {
                "made_by": made_by,
                "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "preset": self.settings.preset,
                "seed": self.settings.seed,
                "sha256": checksum,
                "parents": checksums,
                "versions": versions(),
                "facts": facts or {},
            }
            write_json(self.sidecar(name), sidecar)
        except WriteError as error:
            raise ArtifactError(
                f"{error} The environment variable TUTORIAL_ARTIFACTS sets the folder."
            ) from error

    def sidecar(self, name: str) -> Path:
        """Return the path of the JSON file that describes the artifact `name`."""
        return self.folder / f"{name}.json"

    def require(self, name: str) -> Path:
        """Return the path of an artifact that is there, whole and up to date.

        Raises:
            ArtifactError: names the notebook to run.
        """
        self.describe(name)
        return self.path(name)

    def facts(self, name: str) -> dict[str, Any]:
        """Return the facts that were recorded with the artifact `name`."""
        return self.describe(name)["facts"]

    def describe(self, name: str) -> dict[str, Any]:
        """Return the whole sidecar of an artifact, after checking the artifact.

        Raises:
            ArtifactError: the artifact or its sidecar is missing or damaged, or one
                of its parents has been made again since.
        """
        run = f"Run {notebook_of(name)} first, from top to bottom."
        path = self.path(name)
        if not path.exists() or not self.sidecar(name).exists():
            raise ArtifactError(f"{name} is missing. {run}")
        try:
            sidecar = json.loads(self.sidecar(name).read_text())
            recorded, facts = sidecar["sha256"], sidecar["facts"]
            parents = dict(sidecar["parents"].items())
            known = all(parent[:2] in NOTEBOOKS for parent in parents)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{name}.json is damaged. {run}") from error
        if not known or not isinstance(facts, dict):
            raise ArtifactError(f"{name}.json is damaged. {run}")
        if self._checksum(name) != recorded:
            raise ArtifactError(f"{name} is damaged: its checksum has changed. {run}")
        for parent, checksum in parents.items():
            if self.describe(parent)["sha256"] != checksum:
                raise ArtifactError(
                    f"{name} is out of date: {parent} has been made again since. {run}"
                )
        return sidecar

    def _checksum(self, name: str) -> str:
        """Return the SHA-256 of an artifact; it is taken once while the file is unchanged."""
        path = self.path(name)
        status = path.stat()
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if name not in self._checksums or self._checksums[name][0] != state:
            self._checksums[name] = (state, sha256(path))
        return self._checksums[name][1]
