"""The dense and the sparse network on the best runner of this machine.

Explained in `06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helpers import engine
from helpers.artifacts import NETWORKS, Artifacts
from helpers.models import load_checkpoint
from helpers.runners import (
    OnnxRunner,
    Runner,
    RunnerError,
    TensorRTRunner,
    why_no_engine,
)
from helpers.sparse_torch import SparseTorchRunner, why_no_sparse_gemms

Make = Callable[[Path], Runner]


@dataclass(frozen=True)
class Kind:
    """A way to run both networks: what it needs of this machine and of the steps before."""

    why_not: Callable[[], str]  # in one sentence; empty if it runs here
    files: tuple[str, str]  # the artifacts of the dense and the sparse network
    make: tuple[Make, Make]


def _why_no_engine_of(builder: str) -> str:
    if reason := why_no_engine():
        return reason
    try:
        found = engine.find_builder()
    except engine.EngineError as error:
        return str(error)
    return "" if found.name == builder else f"Engines are {found.name}'s here: {found.why}."


def _torch_dense(path: Path) -> Runner:
    # With the same choice of dense kernels, so that only sparsity tells them apart.
    return SparseTorchRunner(load_checkpoint(path), "dense")


def _torch_sparse(path: Path) -> Runner:
    return SparseTorchRunner(load_checkpoint(path))


_CHECKPOINTS = tuple(NETWORKS.values())
_ENGINES = tuple(f"05_{name}.engine" for name in NETWORKS)
_ONNX = tuple(f"04_{name}_fp32.onnx" for name in NETWORKS)

# The best one first. TensorRT-RTX ignores sparsity, so cuSPARSELt in PyTorch is before it.
KINDS = {
    "TensorRT": Kind(partial(_why_no_engine_of, "TensorRT"), _ENGINES, (TensorRTRunner,) * 2),
    "cuSPARSELt": Kind(why_no_sparse_gemms, _CHECKPOINTS, (_torch_dense, _torch_sparse)),
    "TensorRT-RTX": Kind(
        partial(_why_no_engine_of, "TensorRT-RTX"), _ENGINES, (TensorRTRunner,) * 2
    ),
    "ONNX Runtime": Kind(lambda: "", _ONNX, (OnnxRunner,) * 2),
}


def reasons_against() -> dict[str, str]:
    """Return why each kind of runner does not run here, in one sentence; empty if it does.

    The best kind comes first: TensorRT, cuSPARSELt in PyTorch, TensorRT-RTX (which ignores
    sparsity), and ONNX Runtime on the CPU, which runs anywhere.
    """
    return {name: kind.why_not() for name, kind in KINDS.items()}


def network_files(kind: str | None = None) -> dict[str, str]:
    """Return the artifacts that a kind of runner takes, of the dense and the sparse network.

    Args:
        kind: as `find_runners` takes it.

    Raises:
        RunnerError: there is no such kind.
    """
    return dict(zip(NETWORKS, _kind(kind).files, strict=True))


def find_runners(artifacts: Artifacts, kind: str | None = None) -> dict[str, Runner]:
    """Return the dense and the sparse network on the best runner of this machine.

    Both always run on the same kind of runner, in the same precision.

    Args:
        artifacts: where the networks are.
        kind: `TensorRT`, `cuSPARSELt`, `TensorRT-RTX` or `ONNX Runtime` instead of the best.

    Raises:
        ArtifactError: a network is missing; names its notebook.
        RunnerError: there is no such kind, or it does not run here; or an engine was built
            for another GPU or version.
    """
    chosen = _kind(kind)
    if kind is not None and (reason := chosen.why_not()):
        raise RunnerError(reason)
    return {
        name: make(artifacts.require(file))
        for name, make, file in zip(NETWORKS, chosen.make, chosen.files, strict=True)
    }


def _kind(name: str | None) -> Kind:
    """Return a kind of runner by its name, or the best one that runs here."""
    if name is None:
        return next(kind for kind in KINDS.values() if not kind.why_not())
    if name not in KINDS:
        raise RunnerError(f"There is no kind of runner {name!r}; there are {', '.join(KINDS)}.")
    return KINDS[name]
