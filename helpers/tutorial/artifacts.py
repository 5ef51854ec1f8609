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
from typing import TYPE_CHECKING, Any

from helpers.errors import WriteError
from helpers.files import atomic_write, sha256, write_json
from helpers.machine import versions
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

NOTEBOOKS = {
    "00": "00_check_your_setup.ipynb",
    "01": "01_load_pretrained.ipynb",
    "02": "02_prune_2_4.ipynb",
    "02b": "02b_better_pruning.ipynb",  # optional: no other notebook needs it
    "03": "03_retrain.ipynb",
    "04": "04_export_onnx.ipynb",
    "05": "05_build_engine.ipynb",
    "06": "06_infer_and_benchmark.ipynb",
    "07": "07_sparse_tensor_cores.ipynb",
    "08": "08_int8.ipynb",
    "09": "09_serve_with_triton.ipynb",
    "10": "10_accuracy_across_networks.ipynb",
}

# What each notebook leaves, as its header promises it.
LEAVES = {
    "00": ["00_setup.json"],
    "01": ["01_dense.safetensors"],
    "02": ["02_pruned.safetensors"],
    "02b": ["02b_pruning.json"],
    "03": ["03_retrained.safetensors", "03_progress.pt"],
    "04": [
        "04_dense_fp32.onnx",
        "04_dense_fp16.onnx",
        "04_sparse_fp32.onnx",
        "04_sparse_fp16.onnx",
    ],
    "05": ["05_dense.engine", "05_sparse.engine"],
    "06": ["06_benchmark.json"],
    "07": ["07_products.json"],
    "08": [
        "08_dense_int8.onnx",
        "08_sparse_int8.onnx",
        "08_dense_int8_cpu.onnx",
        "08_sparse_int8_cpu.onnx",
        "08_int8.json",
    ],
    "09": ["09_repository", "09_serving.json"],
    "10": ["10_row.json"],
}

# Without a sidecar: a training that goes on, and a folder that the server checks itself.
BARE = ["03_progress.pt", "09_repository"]

# The networks that are exported, built and measured, and their checkpoints.
NETWORKS = {"dense": "01_dense.safetensors", "sparse": "03_retrained.safetensors"}


class ArtifactError(TutorialError):
    """An artifact is missing, damaged or out of date."""


def notebook_of(name: str) -> str:
    """Return the notebook that makes the artifact `name`.

    Raises:
        ArtifactError: the name does not begin with the number of a notebook.
    """
    number, _, rest = name.partition("_")
    if number not in NOTEBOOKS or not rest:
        raise ArtifactError(
            f"{name!r} is not a name for an artifact: begin it with the number of the notebook "
            f"that makes it, {min(NOTEBOOKS)} to {max(NOTEBOOKS)}, and an underscore."
        )
    return NOTEBOOKS[number]


class Artifacts:
    """The artifacts folder of one preset.

    The number before the underscore says which notebook makes the file:
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
            name: file name; it begins with the number of the notebook.
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
            known = all(parent.partition("_")[0] in NOTEBOOKS for parent in parents)
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

    def left_by(self, number: str) -> "pd.DataFrame":
        """Return what a notebook has left, after checking that all of it is there and sound.

        Args:
            number: of the notebook, such as `02`.

        Returns:
            A table by file name, with `size` and `made from`, the artifacts that it depends on.

        Raises:
            ArtifactError: there is no such notebook, or one of its artifacts is missing, damaged
                or out of date.
        """
        import pandas as pd

        if number not in LEAVES:
            raise ArtifactError(f"There is no notebook {number!r}. There are {', '.join(LEAVES)}.")
        rows = {}
        for name in LEAVES[number]:
            if name in BARE:
                if not self.path(name).exists():
                    raise ArtifactError(f"{name} is missing. Run {notebook_of(name)} again.")
                parents: list[str] = []
            else:
                parents = list(self.describe(name)["parents"])
            rows[name] = {"size": _size(self.path(name)), "made from": ", ".join(parents)}
        return pd.DataFrame.from_dict(rows, orient="index")

    def _checksum(self, name: str) -> str:
        """Return the SHA-256 of an artifact; it is taken once while the file is unchanged."""
        path = self.path(name)
        status = path.stat()
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if name not in self._checksums or self._checksums[name][0] != state:
            self._checksums[name] = (state, sha256(path))
        return self._checksums[name][1]


def _size(path: Path) -> str:
    """Return the size of a file, or of all files in a folder, with its unit."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
