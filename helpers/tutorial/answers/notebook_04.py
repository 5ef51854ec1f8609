"""The answers to the exercises of notebook 04."""

from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.exercises import Judge, Value
from helpers.tutorial.settings import Settings


def _sizes() -> float:
    artifacts = Artifacts(Settings.load())
    dense, sparse = (artifacts.path(f"04_{name}_fp32.onnx").stat().st_size for name in NETWORKS)
    return sparse / dense


EXERCISES: dict[str, Judge] = {
    "04-file-sizes": Value(
        _sizes,
        tolerance=0.05,
        mistakes={
            0.6: "That would be so if the file left out the zeros. How does it store a zero?"
        },
    ),
}
