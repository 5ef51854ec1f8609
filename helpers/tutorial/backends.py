"""The dense and the sparse network on the best runner of this machine.

Explained in `06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helpers.inference import engine
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.runners import OnnxRunner, Runner, RunnerError, TensorRTRunner, why_no_engine
from helpers.inference.sparse_torch import SparseTorchRunner
from helpers.training.networks import load_checkpoint
from helpers.tutorial.artifacts import NETWORKS, Artifacts

Make = Callable[[Path], Runner]


@dataclass(frozen=True)
class Backend:
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
BACKENDS = {
    "TensorRT": Backend(partial(_why_no_engine_of, "TensorRT"), _ENGINES, (TensorRTRunner,) * 2),
    "cuSPARSELt": Backend(why_no_sparse_gemms, _CHECKPOINTS, (_torch_dense, _torch_sparse)),
    "TensorRT-RTX": Backend(
        partial(_why_no_engine_of, "TensorRT-RTX"), _ENGINES, (TensorRTRunner,) * 2
    ),
    "ONNX Runtime": Backend(lambda: "", _ONNX, (OnnxRunner,) * 2),
}


def backend_status() -> dict[str, str]:
    """Return why each backend of runner does not run here, in one sentence; empty if it does.

    The best backend comes first: TensorRT, cuSPARSELt in PyTorch, TensorRT-RTX (which ignores
    sparsity), and ONNX Runtime on the CPU, which runs anywhere.
    """
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def network_files(backend: str | None = None) -> dict[str, str]:
    """Return the artifacts that a backend of runner takes, of the dense and the sparse network.

    Args:
        backend: as `find_runners` takes it.

    Raises:
        RunnerError: there is no such backend.
    """
    return dict(zip(NETWORKS, _backend(backend).files, strict=True))


def find_runners(artifacts: Artifacts, backend: str | None = None) -> dict[str, Runner]:
    """Return the dense and the sparse network on the best runner of this machine.

    Both always run on the same backend of runner, in the same precision.

    Args:
        artifacts: where the networks are.
        backend: `TensorRT`, `cuSPARSELt`, `TensorRT-RTX` or `ONNX Runtime` instead of the best.

    Raises:
        ArtifactError: a network is missing; names its notebook.
        RunnerError: there is no such backend, or it does not run here; or an engine was built
            for another GPU or version.
    """
    chosen = _backend(backend)
    if backend is not None and (reason := chosen.why_not()):
        raise RunnerError(reason)
    return {
        name: make(artifacts.require(file))
        for name, make, file in zip(NETWORKS, chosen.make, chosen.files, strict=True)
    }


def _backend(name: str | None) -> Backend:
    """Return a backend of runner by its name, or the best one that runs here."""
    if name is None:
        return next(backend for backend in BACKENDS.values() if not backend.why_not())
    if name not in BACKENDS:
        raise RunnerError(
            f"There is no backend of runner {name!r}; there are {', '.join(BACKENDS)}."
        )
    return BACKENDS[name]
