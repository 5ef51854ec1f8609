"""Build a TensorRT engine from an ONNX file. Explained in `05_build_engine.ipynb`.

The same code drives TensorRT and TensorRT-RTX, whose Python interfaces agree on all
that is used here. TensorRT builds for the GPU of this machine; TensorRT-RTX also
builds without a GPU, for a compute capability that is named.
"""

import importlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from helpers.errors import UnavailableError
from helpers.files import atomic_write, shown
from helpers.inference.engine_log import (
    CHOSEN,
    ELIGIBLE,
    _is_sparse,
    _nodes,
    kernel_times,
    last_report,
    read_tactics,
    sparse_count,
    sparse_layers,
    why_dense,
)
from helpers.inference.export import INPUT

# What TensorRT-RTX 1.7 can compile for; a GPU outside the list needs TensorRT.
RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
OLDEST = 10  # of TensorRT: the first with the interface that 11 has too
DEFAULT_TARGET = "8.6"  # GeForce RTX 30 and A10: the oldest with Sparse Tensor Cores


class EngineError(UnavailableError):
    """No builder is installed, or it could not build."""


@dataclass(frozen=True)
class Builder:
    """The engine builder that this machine will use, and why."""

    name: str  # "TensorRT" or "TensorRT-RTX"
    module: ModuleType = field(repr=False)
    version: str
    why: str


def find_builder() -> Builder:
    """Return TensorRT where it loads and a GPU is there to build on, else TensorRT-RTX.

    Raises:
        EngineError: neither is installed.
    """
    missing = "no GPU was found, and TensorRT builds only on the GPU it builds for"
    if torch.cuda.is_available():
        try:
            trt = importlib.import_module("tensorrt")
            if _major(trt.__version__) >= OLDEST:
                return Builder("TensorRT", trt, trt.__version__, "a GPU is here and TensorRT loads")
            missing = f"TensorRT {trt.__version__} is too old; from {OLDEST} on it will do"
        except (ImportError, OSError) as error:
            missing = f"TensorRT does not load here ({error}); pip install '.[gpu]' brings it"
    try:
        rtx = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise EngineError(
            f"No engine builder loads here: {missing}; TensorRT-RTX does not either ({error}). "
            "Install it with `pip install tensorrt-rtx-cu13` (Linux or Windows). Without it "
            "notebook 05 cannot run; notebook 06 compares ONNX Runtime and PyTorch all the same."
        ) from error
    return Builder("TensorRT-RTX", rtx, rtx.__version__, missing)


def _major(version: str) -> int:
    return int(version.partition(".")[0])


@dataclass(frozen=True, repr=False)
class EngineReport:
    """What the builder made, and what it said about sparsity.

    Explained in `05_build_engine.ipynb`.
    """

    builder: str
    version: str
    target: str  # the GPU's name, or "compute capability 8.6"
    sparse_flag: bool
    optimization_level: int
    megabytes: float
    seconds: float
    # By the builder's log; None where it does not say. Some versions count and name nothing.
    eligible_count: int | None
    chosen_count: int | None
    eligible: tuple[str, ...] | None
    chosen: tuple[str, ...] | None
    # Why an eligible layer was not chosen, as far as log and shape tell.
    reasons: dict[str, str]
    # The kernel of each layer in the finished engine; None where it is chosen at run time.
    tactics: dict[str, str] | None
    log: tuple[str, ...]

    def __repr__(self) -> str:
        sparse = "no sparsity report"
        if self.eligible_count is not None:
            sparse = f"{self.chosen_count or 0} of {self.eligible_count} eligible layers sparse"
        if self.tactics is not None:
            sparse += f", {len(self.sparse_tactics)} sparse by the engine's tactic names"
        return (
            f"{self.builder} {self.version} for {self.target}: {self.megabytes:.2f} MB "
            f"in {self.seconds:.1f} s, {sparse}"
        )

    def facts(self) -> dict[str, Any]:
        """Return what the engine's sidecar records."""
        return {key: value for key, value in vars(self).items() if key != "log"}

    @property
    def sparse_tactics(self) -> dict[str, str]:
        """The layers of the finished engine whose kernel is sparse by its name."""
        return {layer: name for layer, name in (self.tactics or {}).items() if _is_sparse(name)}

    def layers(self) -> pd.DataFrame:
        """Return one row for each eligible layer: is its kernel sparse, and if not, why?

        The columns are `layer`, `sparse kernel` (by the builder's log), `tactic` (the kernel's
        name in the finished engine; empty where it is not known) and `reason`.

        Raises:
            EngineError: the builder printed nothing about sparsity, or no names.
        """
        if self.eligible_count is None:
            raise EngineError(f"{self.builder} {self.version} prints no sparsity report.")
        if self.eligible is None or self.chosen is None:
            raise EngineError(
                f"{self.builder} {self.version} counts eligible layers ({self.eligible_count}) "
                f"and chosen ones ({self.chosen_count}), but does not name each. "
                "See `sparse_tactics` for the layers that run sparse."
            )
        return pd.DataFrame(
            {
                "layer": self.eligible,
                "sparse kernel": [name in self.chosen for name in self.eligible],
                "tactic": [self._tactic(name) for name in self.eligible],
                "reason": [self.reasons.get(name, "") for name in self.eligible],
            }
        )

    def disagreements(self) -> tuple[str, ...]:
        """Return the eligible layers of which the log and the finished engine differ.

        The log tells which layers were given a sparse kernel; the names of the engine's
        tactics must bear it out. A layer whose tactic is not known differs in nothing.

        Raises:
            EngineError: as `layers`.
        """
        table = self.layers()
        differs = (table.tactic != "") & (table.tactic.map(_is_sparse) != table["sparse kernel"])
        return tuple(table.layer[differs])

    def _tactic(self, layer: str) -> str:
        """Return a layer's kernel; log and engine may differ in what they see fused into it."""
        tactics = {name: tactic for name, tactic in (self.tactics or {}).items() if tactic}
        if layer in tactics:
            return tactics[layer]
        nodes = _nodes(layer)
        return next((tactics[name] for name in tactics if nodes & _nodes(name)), "")


# --- building ---


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    image_shape: tuple[int, int, int],
    batches: tuple[int, int, int],
    sparse: bool = True,
    target: str | None = None,
    builder: Builder | None = None,
    optimization_level: int = 3,
    timing_cache: Path | None = None,
) -> EngineReport:
    """Compile an ONNX file into an engine, and report on it.

    The types of the file are kept (the network is strongly typed), so an FP16 file gives an
    FP16 engine.

    Args:
        onnx_path: the network; its input is `images`.
        plan_path: the engine file to write.
        image_shape: channels, height and width of an image.
        batches: smallest, best and largest batch of the optimisation profile. The
            builder times its kernels at the best one: make it the one you measure.
        sparse: set SPARSE_WEIGHTS, which allows sparse kernels for 2:4 weights.
        target: compute capability to build for, without a GPU; TensorRT-RTX only.
        builder: as `find_builder` returns it, which is the default.
        optimization_level: 0 (builds fast) to 5 (tries the most); 3 is TensorRT's default.
        timing_cache: file with the kernel times of earlier builds, written anew after this
            one; TensorRT only. Engines that are compared should share one, so that they
            differ by no chance of the trials. A time from the cache is not logged again.

    Raises:
        EngineError: an argument is out of range, the ONNX file cannot be parsed, the timing
            cache is another GPU's, or the build fails; what the builder said is in the message.

    Source: TensorRT's Python documentation, "Building an Engine". Explained in
    `05_build_engine.ipynb`.
    """
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise EngineError(f"batches must be smallest, best and largest, in this order: {batches}")
    if optimization_level not in range(6):
        raise EngineError(f"optimization_level is 0 to 5, not {optimization_level}.")
    builder = builder or find_builder()
    trt = builder.module
    logger = _make_logger(trt)
    build = trt.Builder(logger)
    network = _create_network(builder, build)
    parser = trt.OnnxParser(network, logger)  # owns the weights, so it has to outlive the build
    _parse(builder, parser, network, onnx_path)

    config = build.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _make_progress_bar(trt)
    config.builder_optimization_level = optimization_level
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    target = _set_target(builder, config, target)
    profile = build.create_optimization_profile()
    profile.set_shape(INPUT, *((batch, *image_shape) for batch in batches))
    config.add_optimization_profile(profile)
    if timing_cache is not None:
        _load_timing_cache(builder, config, Path(timing_cache))

    start = time.perf_counter()
    plan = build.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise EngineError(
            f"{builder.name} could not build {shown(onnx_path)}: " + logger.last_error()
        )
    tactics = _inspect(builder, plan, logger)
    if timing_cache is not None:
        _save_timing_cache(config, Path(timing_cache))
    with atomic_write(plan_path) as part:
        part.write_bytes(plan)

    return EngineReport(
        builder=builder.name,
        version=builder.version,
        target=target,
        sparse_flag=sparse,
        optimization_level=optimization_level,
        megabytes=plan.nbytes / 1e6,
        seconds=seconds,
        tactics=tactics,
        log=tuple(logger.lines),
        **_read_log(logger.lines, onnx_path),
    )


def build_with_controls(
    dense_onnx: Path,
    sparse_onnx: Path,
    folder: Path,
    image_shape: tuple[int, int, int],
    batches: tuple[int, int, int],
    **options: Any,
) -> dict[str, EngineReport]:
    """Build the sparse network's engine and the two controls that it is to be judged by.

    `sparse` has 2:4 weights and the flag; `dense` has dense weights and the flag, which finds
    nothing eligible there; `sparse_without_flag` has 2:4 weights and may not gain from them.

    Args:
        dense_onnx: the network before pruning.
        sparse_onnx: the network with 2:4 weights.
        folder: where the engines go, as `sparse.engine` and so on.
        image_shape: as `build_engine` takes it.
        batches: as `build_engine` takes it.
        **options: the same for all three, as `build_engine` takes them.

    Raises:
        EngineError: as `build_engine`.

    Explained in `05_build_engine.ipynb`.
    """
    builds = {
        "sparse": (sparse_onnx, True),
        "dense": (dense_onnx, True),
        "sparse_without_flag": (sparse_onnx, False),
    }
    return {
        name: build_engine(
            path, Path(folder) / f"{name}.engine", image_shape, batches, sparse=flag, **options
        )
        for name, (path, flag) in builds.items()
    }


def _read_log(log: list[str], onnx_path: Path) -> dict[str, Any]:
    """Return what a build's log tells about sparsity, as the fields of an `EngineReport`."""
    report = last_report(log)
    eligible, chosen = (sparse_layers(report, pattern) for pattern in (ELIGIBLE, CHOSEN))
    named = eligible is not None and chosen is not None
    dense = tuple(name for name in eligible if name not in chosen) if named else ()
    return {
        "eligible_count": sparse_count(report, ELIGIBLE),
        "chosen_count": sparse_count(report, CHOSEN),
        "eligible": eligible,
        "chosen": chosen,
        "reasons": why_dense(dense, kernel_times(log), onnx_path),
    }


def _create_network(builder: Builder, build: Any) -> Any:
    """Return an empty network that is strongly typed: before TensorRT 11 it had to be asked for."""
    trt = builder.module
    if builder.name == "TensorRT" and _major(builder.version) < 11:
        return build.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return build.create_network()


def _parse(builder: Builder, parser: Any, network: Any, onnx_path: Path) -> None:
    """Read an ONNX file into a network."""
    if not Path(onnx_path).exists():
        raise EngineError(f"{shown(onnx_path)} is missing. Run 04_export_onnx.ipynb first.")
    # An empty file parses, as a network of nothing.
    if not parser.parse_from_file(str(onnx_path)) or network.num_outputs == 0:
        reason = "no reason given"
        if parser.num_errors:
            problem = parser.get_error(0)
            reason = problem.desc()
        raise EngineError(
            f"{shown(onnx_path)} is not an ONNX file that {builder.name} can read: {reason}"
        )


def _load_timing_cache(builder: Builder, config: Any, path: Path) -> None:
    """Give the builder the kernel times in a file; without a file it starts with none."""
    if builder.name != "TensorRT":
        # There it would change nothing in the engine, but ask for a GPU.
        raise EngineError("Only TensorRT has a timing cache; leave `timing_cache` out.")
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"{shown(path)} is no timing cache of {builder.name} {builder.version} on this "
            "GPU. Delete the file, or give another name."
        )


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    with atomic_write(path) as part:
        part.write_bytes(cache.serialize())


def _inspect(builder: Builder, plan: Any, logger: Any) -> dict[str, str] | None:
    """Return the kernel of each layer of an engine; TensorRT-RTX chooses them at run time."""
    if builder.name != "TensorRT":
        return None
    trt = builder.module
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{builder.name} {builder.version} does not load the engine that it has just built: "
            + logger.last_error()
        )
    inspector = engine.create_engine_inspector()
    return read_tactics(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _set_target(builder: Builder, config: Any, target: str | None) -> str:
    """Choose the GPU to build for, and return its name."""
    if builder.name == "TensorRT":
        if target is not None:
            raise EngineError("TensorRT builds for the GPU of this machine; leave `target` out.")
        return torch.cuda.get_device_name()
    target = target or _rtx_target()
    if target not in RTX_TARGETS:
        raise EngineError(
            f"TensorRT-RTX cannot build for compute capability {target}. Choose one of "
            + ", ".join(RTX_TARGETS)
        )
    config.num_compute_capabilities = 1
    capability = getattr(builder.module.ComputeCapability, "SM" + target.replace(".", ""))
    config.set_compute_capability(capability, 0)
    return f"compute capability {target}"


def _rtx_target() -> str:
    """Return this machine's compute capability where TensorRT-RTX knows it."""
    if torch.cuda.is_available():
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        if here in RTX_TARGETS:
            return here
    return DEFAULT_TARGET


def _make_logger(trt: ModuleType) -> Any:
    """Return a logger that keeps every line; the sparsity report is among the verbose ones."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return Logger()


def _make_progress_bar(trt: ModuleType) -> Any:
    """Return a progress monitor that draws one bar for the outermost phase of a build."""

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.root: str | None = None
            self.bar: tqdm | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.root = phase
                self.bar = tqdm(total=steps, desc=phase, leave=False)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.root and self.bar is not None:
                self.bar.update(step + 1 - self.bar.n)
            return True  # False would cancel the build

        def phase_finish(self, phase: str) -> None:
            if phase == self.root and self.bar is not None:
                self.bar.update(self.bar.total - self.bar.n)
                self.bar.close()
                self.root = self.bar = None

    return Progress()
