"""The dense and the sparse network on the best backend of this machine, and their controls.

Explained in `06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from helpers.errors import HelpersError
from helpers.inference import engine
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.dense_cpu import DenseCpuRunner
from helpers.inference.errors import RunnerError
from helpers.inference.runners import OnnxRunner, Runner, TensorRTRunner, why_no_engine
from helpers.inference.sparse_cpu import SparseCpuRunner
from helpers.inference.sparse_torch import SparseTorchRunner
from helpers.training.networks import load_checkpoint
from helpers.tutorial.artifacts import NETWORKS, Artifacts, notebook_of


@dataclass(frozen=True)
class Backend:
    """A way to run networks: what it needs of this machine and of the steps before."""

    why_not: Callable[[], str]  # in one sentence; empty if it runs here
    files: Mapping[str, str]  # the artifact that it takes, by network
    make: Callable[[str, Path], Runner]  # of a network and the path of its artifact
    controls: Mapping[str, str] = field(default_factory=dict)  # other networks to compare with


def _why_not_built_with(builder: str) -> str:
    """Return why engines of this builder do not run here; empty if they do."""
    if reason := why_no_engine() or engine.why_no_builder():
        return reason
    found = engine.find_builder()
    return "" if found.name == builder else f"Engines are {found.name}'s here: {found.why}."


def _runs_anywhere() -> str:
    return ""


def _engine_runner(_: str, path: Path) -> Runner:
    return TensorRTRunner(path)


def _torch_runner(network: str, path: Path) -> Runner:
    # The dense network has the same choice of dense kernels, so only sparsity differs.
    return SparseTorchRunner(
        load_checkpoint(path), "cusparselt" if network == "sparse" else "dense"
    )


def _onnx_runner(_: str, path: Path) -> Runner:
    return OnnxRunner(path)


def _cpu_runner(network: str, path: Path) -> Runner:
    model, cache = load_checkpoint(path), path.parent / "06_kernels.json"
    if network == "dense":
        return DenseCpuRunner(model, cache)
    return SparseCpuRunner(model, "twin" if network == TWIN else "sparse", cache)


# The controls: the dense network once more, and the sparse network in the same kernels with its
# zeros multiplied, which tells what sparsity alone changes.
DENSE_AGAIN, TWIN = "dense again", "twin"

_ENGINES = {network: f"05_{network}.engine" for network in NETWORKS}
_ONNX = {network: f"04_{network}_fp32.onnx" for network in NETWORKS}

# The best one first. TensorRT-RTX ignores sparsity, so cuSPARSELt in PyTorch precedes it.
BACKENDS = {
    "TensorRT": Backend(partial(_why_not_built_with, "TensorRT"), _ENGINES, _engine_runner),
    "cuSPARSELt": Backend(why_no_sparse_gemms, NETWORKS, _torch_runner),
    "TensorRT-RTX": Backend(partial(_why_not_built_with, "TensorRT-RTX"), _ENGINES, _engine_runner),
    # The last two run anywhere; ONNX Runtime multiplies by the zeros.
    "2:4 CPU kernels": Backend(_runs_anywhere, NETWORKS, _cpu_runner, {TWIN: NETWORKS["sparse"]}),
    "ONNX Runtime": Backend(_runs_anywhere, _ONNX, _onnx_runner),
}


def backend_status() -> dict[str, str]:
    """Return why each backend does not run here, in one sentence; empty if it does.

    The best backend comes first: TensorRT, cuSPARSELt in PyTorch, TensorRT-RTX (which ignores
    sparsity), and on the CPU, anywhere, the 2:4 kernels beside the fastest dense runner, and
    ONNX Runtime.
    """
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def network_files(backend: str | None = None) -> dict[str, str]:
    """Return the artifacts that a backend takes, by network.

    Args:
        backend: as `find_runners` takes it.

    Raises:
        RunnerError: there is no such backend.
    """
    return dict(_find(backend).files)


def find_runners(artifacts: Artifacts, backend: str | None = None) -> dict[str, Runner]:
    """Return a runner of the dense and one of the sparse network, on the best backend.

    Both always run on the same backend, in the same precision. With `2:4 CPU kernels` the
    dense network runs in the fastest dense runner of this CPU.

    Args:
        artifacts: where the networks are.
        backend: `TensorRT`, `cuSPARSELt`, `TensorRT-RTX`, `2:4 CPU kernels` or `ONNX Runtime`
            instead of the best.

    Raises:
        ArtifactError: a network is missing; names its notebook.
        RunnerError: there is no such backend, or it does not run here; or an engine was built
            for another GPU or version.
    """
    return {network: find_runner(artifacts, network, backend) for network in NETWORKS}


def find_controls(artifacts: Artifacts, backend: str | None = None) -> dict[str, Runner]:
    """Return the runners to measure beside those of `find_runners`, for a fair comparison.

    `dense again` is a second copy of the dense network: what it differs by is chance. With
    `2:4 CPU kernels` there is also `twin`, which `find_runner` explains.

    Args:
        artifacts: where the networks are.
        backend: as `find_runners` takes it.

    Raises:
        ArtifactError: as `find_runners`.
        RunnerError: as `find_runners`.
    """
    controls = {name: find_runner(artifacts, name, backend) for name in _find(backend).controls}
    return {**controls, DENSE_AGAIN: find_runner(artifacts, "dense", backend)}


def find_runner(artifacts: Artifacts, network: str, backend: str | None = None) -> Runner:
    """Return a new runner of one network, `dense` or `sparse`; see `find_runners`.

    With `2:4 CPU kernels` there is also `twin`, the sparse network in the same kernels with its
    zeros multiplied.
    """
    chosen = _find(backend)
    if reason := chosen.why_not():
        raise RunnerError(reason)
    files = {**chosen.files, **chosen.controls}
    if network not in files:
        raise RunnerError(
            f"There is no network {network!r} on this backend; there are {', '.join(files)}."
        )
    file = files[network]
    path = artifacts.require(file)
    try:
        return chosen.make(network, path)
    except HelpersError as error:  # the file is damaged, or of another GPU or version
        raise RunnerError(f"{error} Run {notebook_of(file)} again.") from error


def _find(name: str | None) -> Backend:
    """Return the backend of this name, or the best one that runs here."""
    if name is None:
        return next(backend for backend in BACKENDS.values() if not backend.why_not())
    if name not in BACKENDS:
        raise RunnerError(f"There is no backend {name!r}; there are {', '.join(BACKENDS)}.")
    return BACKENDS[name]
