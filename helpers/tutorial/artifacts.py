"""Files that one step leaves and the next one needs, each with its provenance.

Beside every artifact lies a JSON sidecar: who made it, when, with which versions
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
}

# The two networks that are exported, built and measured, and their checkpoints.
NETWORKS = {"dense": "01_dense.safetensors", "sparse": "03_retrained.safetensors"}


class ArtifactError(TutorialError):
    """An artifact is missing, damaged or out of date."""


class Artifacts:
    """The artifacts folder of one preset.

    The first two digits of a name say which notebook makes the file:
    `02_pruned.safetensors` is the work of `02_prune_2_4.ipynb`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.artifacts_dir
        self.figures = self.folder / "figures"

    def path(self, name: str) -> Path:
        """Return where the artifact `name` lies, whether it exists or not."""
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
            ArtifactError: a parent is not usable, or the disk refuses.
        """
        checksums = {parent: sha256(self.require(parent)) for parent in parents}
        with atomic_write(self.path(name)) as part:
            yield part
            checksum = sha256(part)
        sidecar = {
            "made_by": NOTEBOOKS[name[:2]],
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "preset": self.settings.preset,
            "seed": self.settings.seed,
            "sha256": checksum,
            "parents": checksums,
            "versions": versions(),
            "facts": facts or {},
        }
        write_json(self.sidecar(name), sidecar)

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
                of its parents has been made anew since.
        """
        notebook = NOTEBOOKS[name[:2]]
        run = f"Run {notebook} first, from top to bottom."
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
        if sha256(path) != recorded:
            raise ArtifactError(f"{name} is damaged: its checksum has changed. {run}")
        for parent, checksum in parents.items():
            if self.describe(parent)["sha256"] != checksum:
                raise ArtifactError(
                    f"{name} is out of date: {parent} has been made anew since. {run}"
                )
        return sidecar
