"""Build a TensorRT engine from an ONNX file. Explained in `05_build_engine.ipynb`.

The same code drives TensorRT and TensorRT-RTX, whose Python interfaces agree on all
that is used here. TensorRT builds for the GPU of this machine; TensorRT-RTX also
builds without a GPU, for a given compute capability.
"""

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict, Unpack

import torch

from helpers.errors import InputError
from helpers.files import atomic_write, shown
from helpers.inference.engine_log import kernel_times, read_sparsity, read_tactics, why_dense
from helpers.inference.engine_report import EngineReport
from helpers.inference.errors import EngineError
from helpers.inference.export import INPUT
from helpers.progress_bar import progress_bar

# What TensorRT-RTX 1.7 can compile for; a GPU outside the list needs TensorRT.
RTX_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
DEFAULT_COMPUTE_CAPABILITY = "8.6"  # GeForce RTX 30, A10: the oldest with Sparse Tensor Cores
OLDEST_TENSORRT = 10  # the first with the interface that 11 has too

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Builder:
    """The engine builder that this machine will use, and why."""

    name: str  # "TensorRT" or "TensorRT-RTX"
    module: ModuleType = field(repr=False)
    version: str
    why: str

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version.partition(".")[0])


def find_builder() -> Builder:
    """Return TensorRT where it loads and a GPU is there to build on, else TensorRT-RTX.

    Raises:
        EngineError: neither is installed.
    """
    missing = "no GPU was found, and TensorRT builds only on the GPU it builds for"
    if torch.cuda.is_available():
        found = _find_tensorrt()
        if isinstance(found, Builder):
            return found
        missing = found
    try:
        rtx = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise EngineError(
            f"No engine builder loads here: {missing}; TensorRT-RTX does not either ({error}). "
            "Install it with `pip install tensorrt-rtx-cu13` (Linux or Windows). Without it no "
            "engine can be built; ONNX Runtime and PyTorch can still run the model."
        ) from error
    return Builder("TensorRT-RTX", rtx, rtx.__version__, missing)


def why_no_builder() -> str:
    """Return in one sentence why no engine can be built here; empty if one can."""
    try:
        find_builder()
    except EngineError as error:
        return str(error)
    return ""


def _find_tensorrt() -> Builder | str:
    """Return TensorRT as a builder, or in words why it cannot be used."""
    too_old = "TensorRT {} is too old; version " + f"{OLDEST_TENSORRT} or newer is needed"
    try:
        # Before it is imported: TensorRT-RTX may not load beside an old one.
        installed = metadata.version("tensorrt")
        if int(installed.partition(".")[0]) < OLDEST_TENSORRT:
            return too_old.format(installed)
    except metadata.PackageNotFoundError:  # not installed by pip
        pass
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        return f"TensorRT does not load here ({error}); pip install '.[gpu]' brings it"
    builder = Builder("TensorRT", trt, trt.__version__, "a GPU is here and TensorRT loads")
    return builder if builder.major >= OLDEST_TENSORRT else too_old.format(builder.version)


class BuildOptions(TypedDict, total=False):
    """What builds that are compared have in common, as `build_engine` takes it."""

    compute_capability: str | None
    builder: Builder | None
    optimization_level: int
    timing_cache: Path | None


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    image_shape: tuple[int, int, int],
    profile_batch_sizes: tuple[int, int, int],
    sparse: bool = True,
    **options: Unpack[BuildOptions],
) -> EngineReport:
    """Compile an ONNX file of `export_onnx` into an engine, and report on it.

    Args:
        onnx_path: the model; its input is `images`.
        plan_path: the engine file to write.
        image_shape: channels, height and width of an image.
        profile_batch_sizes: smallest, best and largest batch size of the optimisation
            profile. The builder times its kernels at the best one: make it the one that you
            measure.
        sparse: as `build_engine_for_shapes` takes it.
        **options: as `build_engine_for_shapes` takes them.

    Raises:
        InputError: as `build_engine_for_shapes`.
        EngineError: as `build_engine_for_shapes`.
    """
    smallest, best, largest = profile_batch_sizes
    if not 1 <= smallest <= best <= largest:
        raise InputError(
            "profile_batch_sizes must be the smallest, best and largest batch size, in this "
            f"order, not {profile_batch_sizes}."
        )
    shapes = ((smallest, *image_shape), (best, *image_shape), (largest, *image_shape))
    return build_engine_for_shapes(onnx_path, plan_path, {INPUT: shapes}, sparse, **options)


def build_engine_for_shapes(
    onnx_path: Path,
    plan_path: Path,
    profile: Mapping[str, tuple[Shape, Shape, Shape]],
    sparse: bool = True,
    compute_capability: str | None = None,
    builder: Builder | None = None,
    optimization_level: int = 3,
    timing_cache: Path | None = None,
) -> EngineReport:
    """Compile any ONNX file into an engine, and report on it.

    The types of the file are kept (the network is strongly typed), so an FP16 file gives an
    FP16 engine.

    Args:
        onnx_path: the model, with any inputs and outputs.
        plan_path: the engine file to write.
        profile: for each input whose shape the file leaves open, its smallest, best and largest
            shape. The builder times its kernels at the best one: make it the one that you
            measure.
        sparse: set SPARSE_WEIGHTS, which allows sparse kernels for 2:4 weights.
        compute_capability: what to build for, such as 8.6, without a GPU; TensorRT-RTX only.
        builder: as `find_builder` returns it, which is the default.
        optimization_level: 0 (builds fast) to 5 (tries the most); 3 is TensorRT's default.
        timing_cache: file with the kernel times of earlier builds, rewritten after this
            one; TensorRT only. Engines that are compared should share one, so that chance in
            the trials makes no difference. A time from the cache is not logged again.

    Raises:
        InputError: an argument is out of range or is not for this builder, or the ONNX file
            cannot be parsed, or the timing cache is another GPU's.
        EngineError: there is no builder, or the build fails; the message says why.

    Source: TensorRT's Python documentation, "Building an Engine".
    """
    if optimization_level not in range(6):
        raise InputError(f"optimization_level must be 0 to 5, not {optimization_level}.")
    builder = builder or find_builder()
    trt = builder.module
    logger = _make_logger(trt)
    build = trt.Builder(logger)
    network = _create_network(builder, build)
    parser = trt.OnnxParser(network, logger)  # owns the weights, so it has to outlive the build
    _parse(builder, parser, network, onnx_path)

    config = _configure(builder, build, sparse, optimization_level)
    built_for = _choose_gpu(builder, config, compute_capability)
    _add_profile(build, config, network, profile, onnx_path)
    if timing_cache is not None:
        _load_timing_cache(builder, config, Path(timing_cache))

    start = time.perf_counter()
    plan = build.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise EngineError(
            f"{builder.name} could not build {shown(onnx_path)}: {logger.last_error()}"
        )
    tactics = _read_engine(builder, plan, logger)
    if timing_cache is not None:
        _save_timing_cache(config, Path(timing_cache))
    with atomic_write(plan_path) as part:
        part.write_bytes(plan)

    sparsity = read_sparsity(logger.lines)
    return EngineReport(
        builder=builder.name,
        version=builder.version,
        built_for=built_for,
        sparse_flag=sparse,
        optimization_level=optimization_level,
        megabytes=plan.nbytes / 1e6,
        seconds=seconds,
        eligible_count=sparsity.eligible_count,
        chosen_count=sparsity.chosen_count,
        eligible=sparsity.eligible,
        chosen=sparsity.chosen,
        reasons=why_dense(sparsity.dense, kernel_times(logger.lines), onnx_path),
        tactics=tactics,
        log=tuple(logger.lines),
    )


def build_with_controls(
    dense_onnx: Path,
    sparse_onnx: Path,
    folder: Path,
    image_shape: tuple[int, int, int],
    profile_batch_sizes: tuple[int, int, int],
    **options: Unpack[BuildOptions],
) -> dict[str, EngineReport]:
    """Build the sparse model's engine and the two controls to judge it by.

    `sparse` has 2:4 weights and the flag; `dense` has dense weights and the flag, which finds
    nothing eligible there; `sparse_without_flag` has 2:4 weights and may not gain from them.

    Args:
        dense_onnx: the model before pruning.
        sparse_onnx: the model with 2:4 weights.
        folder: where the engines go, as `sparse.engine` and so on.
        image_shape: as `build_engine` takes it.
        profile_batch_sizes: as `build_engine` takes it.
        **options: the same for all three, as `build_engine` takes them.

    Raises:
        InputError: as `build_engine`.
        EngineError: as `build_engine`.
    """
    builds = {
        "sparse": (sparse_onnx, True),
        "dense": (dense_onnx, True),
        "sparse_without_flag": (sparse_onnx, False),
    }
    return {
        name: build_engine(
            path,
            Path(folder) / f"{name}.engine",
            image_shape,
            profile_batch_sizes,
            sparse=flag,
            **options,
        )
        for name, (path, flag) in builds.items()
    }


def _create_network(builder: Builder, build: Any) -> Any:
    """Return an empty network that is strongly typed, which is optional before TensorRT 11."""
    trt = builder.module
    if builder.name == "TensorRT" and builder.major < 11:
        return build.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return build.create_network()


def _configure(builder: Builder, build: Any, sparse: bool, optimization_level: int) -> Any:
    """Return a build's configuration."""
    trt = builder.module
    config = build.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _make_progress_bar(trt)
    config.builder_optimization_level = optimization_level
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    return config


def _add_profile(
    build: Any,
    config: Any,
    network: Any,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    onnx_path: Path,
) -> None:
    """Let the engine take each input from its smallest shape to its largest."""
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    open_inputs = {item.name for item in inputs if -1 in tuple(item.shape)}
    unknown = [name for name in shapes if name not in {item.name for item in inputs}]
    if unknown or not open_inputs <= set(shapes):
        missing = ", ".join(sorted(open_inputs - set(shapes)))
        problem = f"has no input {unknown[0]}" if unknown else f"needs shapes for {missing}"
        raise InputError(
            f"{shown(onnx_path)} {problem}; its inputs are "
            f"{', '.join(item.name for item in inputs) or 'none'}. Give the smallest, best and "
            "largest shape of each whose shape the file leaves open."
        )
    values = [item.name for item in inputs if item.is_shape_tensor]
    if values:
        raise InputError(
            f"The input {values[0]} of {shown(onnx_path)} decides on the shape of other tensors, "
            "and an engine needs its values when it is built. Make it a constant of the file."
        )
    if not shapes:
        return
    profile = build.create_optimization_profile()
    for name, (smallest, best, largest) in shapes.items():
        same_rank = len(smallest) == len(best) == len(largest)
        if not (same_rank and all(a <= b <= c for a, b, c in zip(*shapes[name], strict=True))):
            raise InputError(
                f"The input {name} of {shown(onnx_path)} cannot go from {smallest} by {best} to "
                f"{largest}: no dimension of the smallest shape may exceed the best one's, and "
                "none of that the largest one's."
            )
        profile.set_shape(name, smallest, best, largest)
    config.add_optimization_profile(profile)


def _parse(builder: Builder, parser: Any, network: Any, onnx_path: Path) -> None:
    """Read an ONNX file into a network."""
    if not Path(onnx_path).exists():
        raise InputError(f"{shown(onnx_path)} is missing. Export the model with export_onnx.")
    # An empty file parses, as a network of nothing.
    if not parser.parse_from_file(str(onnx_path)) or network.num_outputs == 0:
        reason = "no reason given"
        if parser.num_errors:
            problem = parser.get_error(0)
            reason = problem.desc()
        raise InputError(
            f"{shown(onnx_path)} is not an ONNX file that {builder.name} can read: {reason}"
        )


def _load_timing_cache(builder: Builder, config: Any, path: Path) -> None:
    """Give the builder the kernel times in a file; without a file it starts with none."""
    if builder.name != "TensorRT":
        # TensorRT-RTX has one too, which needs a GPU and changes nothing in the engine.
        raise InputError("Only TensorRT has a timing cache; leave `timing_cache` out.")
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise InputError(
            f"{shown(path)} is not a timing cache of {builder.name} {builder.version} on this "
            "GPU. Delete the file, or give another name."
        )


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    with atomic_write(path) as part:
        part.write_bytes(cache.serialize())


def _read_engine(builder: Builder, plan: Any, logger: Any) -> dict[str, str] | None:
    """Return the kernel of each layer of an engine; TensorRT-RTX chooses them at run time."""
    if builder.name != "TensorRT":
        return None
    trt = builder.module
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{builder.name} {builder.version} does not load the engine that it has just built: "
            f"{logger.last_error()}"
        )
    inspector = engine.create_engine_inspector()
    return read_tactics(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _choose_gpu(builder: Builder, config: Any, compute_capability: str | None) -> str:
    """Set which GPUs to build for, and return what that is in words."""
    if builder.name == "TensorRT":
        if compute_capability is not None:
            raise InputError(
                "TensorRT builds for the GPU of this machine; leave `compute_capability` out."
            )
        return torch.cuda.get_device_name()
    chosen = compute_capability or _own_compute_capability()
    if chosen not in RTX_COMPUTE_CAPABILITIES:
        raise InputError(
            f"TensorRT-RTX cannot build for compute capability {chosen}. Choose one of "
            f"{', '.join(RTX_COMPUTE_CAPABILITIES)}."
        )
    config.num_compute_capabilities = 1
    capability = getattr(builder.module.ComputeCapability, "SM" + chosen.replace(".", ""))
    config.set_compute_capability(capability, 0)
    return f"compute capability {chosen}"


def _own_compute_capability() -> str:
    """Return this machine's compute capability if TensorRT-RTX knows it, else the default."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if f"{major}.{minor}" in RTX_COMPUTE_CAPABILITIES:
            return f"{major}.{minor}"
    return DEFAULT_COMPUTE_CAPABILITY


def _make_logger(trt: ModuleType) -> Any:
    """Return a logger that keeps every line; the sparsity report is among the verbose ones."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]  # a module that is a value
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

    class Progress(trt.IProgressMonitor):  # type: ignore[name-defined]  # see above
        def __init__(self) -> None:
            super().__init__()
            self.root: str | None = None
            self.bar: Any = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.root = phase
                self.bar = progress_bar(total=steps, desc=phase)

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
