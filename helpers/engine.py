"""Build a TensorRT engine from an ONNX file. Explained in `05_build_engine.ipynb`.

The same code drives TensorRT and TensorRT-RTX, whose Python interfaces agree on all
that is used here. TensorRT builds for the GPU of this machine; TensorRT-RTX also
builds without a GPU, for a compute capability that is named.
"""

import importlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from helpers.artifacts import atomic_write
from helpers.checks import TutorialError
from helpers.onnx_export import INPUT
from helpers.settings import relative

# What TensorRT-RTX 1.7 can compile for; a GPU outside the list needs TensorRT.
RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
DEFAULT_TARGET = "8.6"  # GeForce RTX 30 and A10: the oldest with Sparse Tensor Cores


class EngineError(TutorialError):
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
            return Builder("TensorRT", trt, trt.__version__, "a GPU is here and TensorRT loads")
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


@dataclass(frozen=True, repr=False)
class EngineReport:
    """What the builder made, and what it said about sparsity."""

    builder: str
    version: str
    target: str  # the GPU's name, or "compute capability 8.6"
    sparse_flag: bool
    megabytes: float
    seconds: float
    eligible: tuple[str, ...] | None  # layers; None where the builder says nothing
    chosen: tuple[str, ...] | None
    log: tuple[str, ...]

    def __repr__(self) -> str:
        sparse = "no sparsity report"
        if self.eligible is not None:
            sparse = f"{len(self.chosen or ())} of {len(self.eligible)} eligible layers sparse"
        return (
            f"{self.builder} {self.version} for {self.target}: {self.megabytes:.2f} MB "
            f"in {self.seconds:.1f} s, {sparse}"
        )

    def facts(self) -> dict[str, Any]:
        """Return what the engine's sidecar records."""
        return {key: value for key, value in vars(self).items() if key != "log"}

    def layers(self) -> pd.DataFrame:
        """Return one row for each eligible layer: did the builder choose a sparse kernel?

        Raises:
            EngineError: the builder printed nothing about sparsity.
        """
        if self.eligible is None:
            raise EngineError(f"{self.builder} {self.version} prints no sparsity report.")
        chosen = set(self.chosen or ())
        return pd.DataFrame(
            {"layer": self.eligible, "sparse kernel": [name in chosen for name in self.eligible]}
        )


# TensorRT 10 and 11, then TensorRT 8; the last report in a log is the final one.
ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found \d+ layer\(s\) eligible to use sparse tactics"
    r"|Layers eligible for sparse math)(?:: (?P<names>.*))?"
)
CHOSEN = re.compile(
    r"\(Sparsity\) (?:Chose \d+ layer\(s\) using sparse tactics"
    r"|TRT inference plan picked sparse implementation for layers)(?:: (?P<names>.*))?"
)


def sparse_layers(log: list[str] | tuple[str, ...], pattern: re.Pattern) -> tuple[str, ...] | None:
    """Return the layers that a builder's log lists for a pattern; None if it lists none."""
    matches = [match for line in log if (match := pattern.search(line))]
    if not matches:
        return None
    names = matches[-1]["names"] or ""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    image_shape: tuple[int, int, int],
    batches: tuple[int, int, int],
    sparse: bool = True,
    target: str | None = None,
    builder: Builder | None = None,
) -> EngineReport:
    """Compile an ONNX file into an engine, and report on it.

    The types of the file are kept (TensorRT 11 knows strongly typed networks only),
    so an FP16 file gives an FP16 engine.

    Args:
        onnx_path: the network; its input is `images`.
        plan_path: the engine file to write.
        image_shape: channels, height and width of an image.
        batches: smallest, best and largest batch of the optimisation profile. The
            builder times its kernels at the best one: make it the one you measure.
        sparse: set SPARSE_WEIGHTS, which allows sparse kernels for 2:4 weights.
        target: compute capability to build for, without a GPU; TensorRT-RTX only.
        builder: as `find_builder` returns it, which is the default.

    Raises:
        EngineError: the ONNX file cannot be parsed, the target is unknown, or the
            build fails; what the builder said is in the message.

    Source: TensorRT's Python documentation, "Building an Engine".
    """
    builder = builder or find_builder()
    trt = builder.module
    logger = _make_logger(trt)
    build = trt.Builder(logger)
    network = build.create_network()
    parser = trt.OnnxParser(network, logger)
    if not Path(onnx_path).exists():
        raise EngineError(f"{relative(onnx_path)} is missing. Run 04_export_onnx.ipynb first.")
    # An empty file parses, as a network of nothing.
    if not parser.parse_from_file(str(onnx_path)) or network.num_outputs == 0:
        reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise EngineError(
            f"{relative(onnx_path)} is not an ONNX file that {builder.name} can read: {reason}"
        )

    config = build.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _make_progress_bar(trt)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    target = _set_target(builder, config, target)
    profile = build.create_optimization_profile()
    profile.set_shape(INPUT, *((batch, *image_shape) for batch in batches))
    config.add_optimization_profile(profile)

    start = time.perf_counter()
    plan = build.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise EngineError(
            f"{builder.name} could not build {relative(onnx_path)}: " + logger.last_error()
        )
    with atomic_write(plan_path) as part:
        part.write_bytes(plan)
    return EngineReport(
        builder=builder.name,
        version=builder.version,
        target=target,
        sparse_flag=sparse,
        megabytes=plan.nbytes / 1e6,
        seconds=seconds,
        eligible=sparse_layers(logger.lines, ELIGIBLE),
        chosen=sparse_layers(logger.lines, CHOSEN),
        log=tuple(logger.lines),
    )


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
