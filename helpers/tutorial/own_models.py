"""Commands for your own models: what `python -m helpers` does with a file.

Which weights can be 2:4, which are, a pruned copy, one in INT8, an engine, latencies, and how much
faster 2:4 would make it. docs/cli.md has every command with its options.

torchvision takes longer to import than most of the work on a file, so only the functions that make
networks import it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from helpers import machine
from helpers.errors import InputError
from helpers.files import json_text, shown
from helpers.inference.engine import BuildOptions, build_engine_for_shapes, find_builder
from helpers.inference.errors import RunnerError
from helpers.inference.file_runners import (
    EngineFileRunner,
    FileRunner,
    OnnxFileRunner,
    load_inputs,
    random_inputs,
    why_no_engine_runs,
)
from helpers.measurement.advice import advise as advise_one
from helpers.measurement.advice import batch_table
from helpers.measurement.file_benchmark import AGAIN, compare_files, describe_comparison
from helpers.measurement.onnx_advice import advise_onnx
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATASHEETS, MORE_DATASHEETS
from helpers.sparsity import prune_2to4_, sparsity_report
from helpers.sparsity.compressed import read_checkpoint
from helpers.sparsity.onnx_file import OnnxFile
from helpers.sparsity.onnx_inputs import (
    OnnxInput,
    Shape,
    complete_shapes,
    onnx_inputs,
    parse_shapes,
)
from helpers.sparsity.onnx_prune import OnnxPruning, prune_onnx
from helpers.sparsity.onnx_report import onnx_report
from helpers.sparsity.verify import verify_file
from helpers.tutorial.checks import TutorialError

RETRAIN = (
    "This shows what 2:4 would do to the speed. The accuracy has suffered until the model is "
    "retrained with these zeros held."
)
MULTIPLIES_ZEROS = (
    "ONNX Runtime on a CPU multiplies by the zeros as by any other number, so 2:4 cannot make it "
    "faster; an engine on a GPU with Sparse Tensor Cores can."
)


@dataclass(frozen=True)
class Result:
    """What a command found: as text, as facts for JSON, and whether its answer is yes."""

    text: str
    facts: Mapping[str, Any]
    passed: bool = True

    def json(self) -> str:
        """Return the facts as JSON."""
        return json_text(self.facts)


def _require_onnx(path: Path) -> None:
    if path.suffix != ".onnx":
        raise InputError(f"{shown(path)} does not end in .onnx; this command takes ONNX files.")


def _require_new(target: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse to write over a file that is read, or over any other one unless told to."""
    if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
        raise InputError(f"{shown(target)} is the file to read; write to another one.")
    if target.exists() and not overwrite:
        raise InputError(f"{shown(target)} exists. Name another file, or add --overwrite.")


# --- verify ---


def verify(
    path: Path, name: str | None, exclude: Sequence[str] = (), allow_unjudged: bool = False
) -> Result:
    """Return whether each weight is 2:4; passed if all eligible ones are, for certain.

    Args:
        path: an ONNX file or a safetensors checkpoint.
        name: the network of a checkpoint that does not name it.
        exclude: name patterns of nodes, layers and weights that are meant to stay dense.
        allow_unjudged: accept products of which it is not known whether they could be sparse.

    Raises:
        TutorialError: no weight of the file is eligible, or a network is named for a file that
            is not a checkpoint.
    """
    model = None
    if path.suffix == ".safetensors":
        from helpers.training import networks

        model = networks.checkpoint_model(path, name)
    elif name is not None:
        raise TutorialError(
            f"{shown(path)} is not a .safetensors checkpoint, and only those need --model: "
            "leave it out."
        )
    table = verify_file(path, model, exclude)
    eligible = table[table.eligible]
    unjudged = int((~table.judged).sum())
    passed = bool(eligible.is_2to4.all()) and (unjudged == 0 or allow_unjudged)
    if eligible.empty and (unjudged == 0 or allow_unjudged):
        raise TutorialError(f"{shown(path)} has no weight that could be 2:4.")
    lines = [table.to_string(index=False)]
    if unjudged:
        products = "product was" if unjudged == 1 else "products were"
        lines.append(
            f"{unjudged} {products} not judged, for the reason given: accept with "
            "--allow-unjudged, or leave out by name with --exclude"
        )
    lines.append(f"{eligible.is_2to4.sum()} of {len(eligible)} eligible weights are 2:4")
    facts = {
        "file": str(path),
        "passed": passed,
        "eligible": len(eligible),
        "eligible_2to4": int(eligible.is_2to4.sum()),
        "not_judged": unjudged,
        "rows": table.to_dict("records"),
    }
    return Result("\n".join(lines), facts, passed)


# --- report and prune ---


def report(
    name: str,
    rules: str,
    include: Sequence[str],
    exclude: Sequence[str],
    texts: Sequence[str],
    image_size: int | None,
) -> Result:
    """Return the verdict on every weight of an ONNX file, a checkpoint or a network.

    Args:
        name: of an ONNX file, a safetensors checkpoint or a network.
        rules: as `helpers.sparsity.eligibility.why_not_sparse` takes them.
        include: only weights whose name matches one of these patterns.
        exclude: no weights whose name matches one of these patterns.
        texts: shapes of inputs that an ONNX file leaves open; the batch is 1 unless given.
        image_size: height and width, for a checkpoint or a network.

    Raises:
        InputError: the file cannot be read, or the arguments do not fit it.
    """
    if Path(name).suffix == ".onnx":
        if image_size is not None:
            raise InputError("An ONNX file has the shapes of its inputs: use --shape.")
        found = onnx_report(Path(name), rules, include, exclude, parse_shapes(texts))
        return Result(repr(found), {"file": name, **found.facts(), "rows": found.rows()})
    if texts:
        raise InputError(f"{name} takes images: give --image-size instead of --shape.")
    model, channels, size = _load(name)
    shape = (channels, image_size or size, image_size or size)
    table = sparsity_report(model, shape, rules=rules, include=include, exclude=exclude)
    facts = {"file": name, "image_shape": shape, **table.facts()}
    return Result(repr(table), {**facts, "rows": table.layers.to_dict("records")})


def prune(
    source: Path,
    target: Path,
    rules: str,
    include: Sequence[str],
    exclude: Sequence[str],
    network: str | None,
    overwrite: bool,
) -> Result:
    """Write a copy of an ONNX file or a checkpoint whose weights are pruned 2:4 by magnitude.

    Args:
        source: an ONNX file or a safetensors checkpoint.
        target: the copy to write, of the same kind.
        rules: as `helpers.sparsity.eligibility.why_not_sparse` takes them.
        include: only weights whose name matches one of these patterns.
        exclude: no weights whose name matches one of these patterns.
        network: of a checkpoint that does not name it.
        overwrite: replace the target if it exists.

    Raises:
        InputError: the file cannot be read, nothing in it can be pruned, or the target exists
            or is the source.
        WriteError: the target cannot be written.
    """
    if source.suffix not in (".onnx", ".safetensors") or target.suffix != source.suffix:
        raise InputError(
            f"{shown(source)} cannot be pruned to {shown(target)}: both must be ONNX files, or "
            "both safetensors checkpoints."
        )
    _require_new(target, [source], overwrite)
    facts: dict[str, Any] = {"file": str(source), "pruned": str(target)}
    if source.suffix == ".onnx":
        if network is not None:
            raise InputError("Only checkpoints need --model: leave it out.")
        pruned = prune_onnx(source, target, rules, include, exclude)
        facts |= {**pruned.facts(), "rows": pruned.rows()}
        return Result(f"{shown(target)}: {pruned}\n{RETRAIN}", facts)
    from helpers.training import networks

    model = networks.load_checkpoint(source, network)  # refused if nobody names its network
    masks = prune_2to4_(model, rules, include, exclude)
    networks.save_checkpoint(model, target, network or read_checkpoint(source).network or "")
    facts |= {"rules": rules, "pruned_weights": list(masks)}
    return Result(f"{shown(target)}: {len(masks)} weights pruned 2:4 ({rules})\n{RETRAIN}", facts)


# --- quantize ---


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with, as `load_calibration_images` takes it."""

    data: Path
    count: int = 512
    percentile: float | None = None
    image_size: int | None = None
    mean: str = ""
    std: str = ""


@dataclass(frozen=True)
class QuantizeOptions:
    """What runs in INT8 and where; the names are those of `quantize_for_cpu`."""

    runs_on: str = "tensorrt"
    exclude: Sequence[str] = ()
    first: bool = True
    last: bool = True
    expect_sparse: bool = False
    reduce_range: bool = False


def quantize(
    source: Path, target: Path, calibration: Calibration, options: QuantizeOptions, overwrite: bool
) -> Result:
    """Write a copy of an ONNX file in INT8.

    Args:
        source: an ONNX file in FP16 or FP32.
        target: the copy to write.
        calibration: images, and how ranges are measured.
        options: what is quantised, and for what.
        overwrite: replace the target if it exists.

    Raises:
        InputError: a file or the images cannot be read or do not fit, or the target exists or is
            the source.
        WriteError: the target cannot be written.
    """
    from helpers.inference.calibration_images import load_calibration_images
    from helpers.inference.quantization import quantize_for_cpu, quantize_for_tensorrt
    from helpers.training.data import IMAGENET_MEAN, IMAGENET_STD

    _require_onnx(source)
    _require_onnx(target)
    _require_new(target, [source], overwrite)
    if options.runs_on not in ("tensorrt", "cpu"):
        raise InputError(f"There is no --for {options.runs_on!r}, only tensorrt and cpu.")
    if options.reduce_range and options.runs_on != "cpu":
        raise InputError("--reduce-range is for processors: add --for cpu.")
    images = load_calibration_images(
        calibration.data,
        onnx_inputs(OnnxFile(source).model, source),
        calibration.count,
        calibration.image_size,
        _numbers(calibration.mean, "--mean") or IMAGENET_MEAN,
        _numbers(calibration.std, "--std") or IMAGENET_STD,
    )
    common: dict[str, Any] = {
        "percentile": calibration.percentile,
        "exclude": options.exclude,
        "first": options.first,
        "last": options.last,
        "expect_sparse": options.expect_sparse,
    }
    if options.runs_on == "cpu":
        written = quantize_for_cpu(
            source, target, images, reduce_range=options.reduce_range, **common
        )
    else:
        written = quantize_for_tensorrt(source, target, images, **common)
    facts = {"file": str(source), "quantised": str(target), **written.facts()}
    return Result(f"{shown(target)}: {written}", facts)


def _numbers(text: str, option: str) -> list[float]:
    """Return the numbers of an option such as 0.485,0.456,0.406."""
    try:
        return [float(each) for each in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not numbers separated by commas.") from error


# --- advise ---


def find_rates(gpu: str | None, record: Path | None, by_datasheet: bool = False) -> Rates:
    """Return the rates of a GPU, the A100 by default, or those of a record.

    Args:
        gpu: its name: rates fitted to published products of it, or scaled from a similar card.
        record: what `benchmarks/gpu.py` measured, instead.
        by_datasheet: take the published peaks of the GPU, which no kernel reaches.

    Raises:
        TutorialError: a record is given with one of the others, or there is no such datasheet.
        AdviceError: as `Rates.from_record` and `Rates.calibrated`.
    """
    if record is not None:
        if gpu is not None or by_datasheet:
            raise TutorialError("Give either --rates, a measurement, or --gpu and --datasheet.")
        return Rates.from_record(record)
    name = "a100" if gpu is None else gpu.lower()
    if not by_datasheet:
        return Rates.calibrated(name)
    sheets = DATASHEETS | MORE_DATASHEETS
    if name not in sheets:
        raise TutorialError(f"There is no datasheet {gpu!r}; there are {', '.join(sheets)}.")
    return Rates.from_datasheet(sheets[name])


def advise(
    name: str,
    rates: Rates,
    batch_sizes: Sequence[int],
    datatype: str,
    image_size: int | None,
    texts: Sequence[str],
) -> Result:
    """Return how much faster 2:4 is predicted to make a model, by batch size and by layer.

    Args:
        name: of a network, or of a safetensors checkpoint or an ONNX file.
        rates: as `find_rates` returns them.
        batch_sizes: images at a time, 1, 32 and 256 unless given; the layers are shown for the
            largest.
        datatype: of weights and activations.
        image_size: height and width in pixels, unless the network's own.
        texts: shapes of inputs that an ONNX file leaves open.

    Raises:
        InputError: the model cannot be read, or does not take such inputs.
    """
    if Path(name).suffix == ".onnx":
        if image_size is not None:
            raise InputError("An ONNX file has the shapes of its inputs: use --shape.")
        advices = [
            advise_onnx(Path(name), rates, parse_shapes(texts), batch, datatype)
            for batch in sorted(set(batch_sizes or (1, 32, 256)))
        ]
        title = f"{name} in {datatype}, from {rates.source}"
    elif texts:
        raise InputError(f"{name} takes images: give --image-size instead of --shape.")
    else:
        model, channels, size = _load(name)
        if image_size is not None:
            size = image_size
        advices = [
            advise_one(model, rates, (channels, size, size), batch=batch, datatype=datatype)
            for batch in sorted(set(batch_sizes or (1, 32, 256)))
        ]
        title = f"{name} at {size}x{size} in {datatype}, from {rates.source}"
    table = batch_table(advices)
    rows = table.to_dict("records")
    lines = [title]
    if not rates.measured:
        lines.append(
            "Floors, not measurements: at the published peaks, all operands from GPU memory."
        )
    lines += [table.to_string(index=False, float_format="{:.3g}".format), "", repr(advices[-1])]
    facts = {
        "model": name,
        "source": rates.source,
        "measured": rates.measured,
        "datatype": datatype,
        "rows": rows,
        "layers": advices[-1].layers.to_dict("records"),
    }
    return Result("\n".join(lines), facts)


# --- build ---


@dataclass(frozen=True)
class ProfileTexts:
    """The shapes of the command line, as `parse_shapes` takes them."""

    shape: Sequence[str] = ()
    smallest: Sequence[str] = ()
    best: Sequence[str] = ()
    largest: Sequence[str] = ()


@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine; the names are those of `build_engine_for_shapes`."""

    sparse: bool = True
    compute_capability: str | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None


def build(
    source: Path,
    target: Path | None,
    texts: ProfileTexts,
    options: EngineOptions,
    overwrite: bool,
) -> Result:
    """Build an engine from an ONNX file.

    Args:
        source: the ONNX file.
        target: the engine to write; else beside the file, ending in .engine.
        texts: shapes of inputs that the file leaves open.
        options: of the build.
        overwrite: replace the target if it exists.

    Raises:
        InputError: the file cannot be read, the shapes do not fit it, or the target exists.
        EngineError: there is no builder here, or it could not build.
    """
    _require_onnx(source)
    target = target or source.with_suffix(".engine")
    _require_new(target, [source], overwrite)
    inputs = onnx_inputs(OnnxFile(source).model, source)
    report = build_engine_for_shapes(
        source,
        target,
        _profile(inputs, texts, source),
        options.sparse,
        compute_capability=options.compute_capability,
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
    )
    lines = [f"{shown(target)}: {report}"]
    if report.eligible is not None and report.chosen is not None and report.eligible:
        lines += ["", report.layers().to_string(index=False)]
    if report.builder == "TensorRT-RTX" and options.sparse:
        lines.append(
            "TensorRT-RTX accepts the flag for sparse weights and, as far as is known, makes no "
            "use of it; TensorRT does."
        )
    facts = {"file": str(source), "engine": str(target), **report.facts()}
    return Result("\n".join(lines), facts)


def _profile(
    inputs: Sequence[OnnxInput], texts: ProfileTexts, path: Path
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Return the smallest, best and largest shape of each input that the file leaves open."""
    fixed = parse_shapes(texts.shape)
    ends = [parse_shapes(each) for each in (texts.smallest, texts.best, texts.largest)]
    if fixed and any(ends):
        raise InputError("Give either --shape, or --min-shape, --opt-shape and --max-shape.")
    if any(ends) and not all(ends):
        raise InputError("Give all three: --min-shape, --opt-shape and --max-shape.")
    smallest, best, largest = (
        complete_shapes(inputs, each, path) for each in (ends if any(ends) else [fixed] * 3)
    )
    return {
        item.name: (smallest[item.name], best[item.name], largest[item.name])
        for item in inputs
        if item.is_open
    }


# --- benchmark ---


@dataclass(frozen=True)
class Timing:
    """How to measure: `backend` is engine, cpu, or None for the engine where one can run."""

    backend: str | None = None
    seconds: float = 3.0
    warmup: float = 0.2
    cuda_graph: bool = True
    optimization_level: int = 3


def benchmark(
    dense: Path,
    sparse: Path | None,
    texts: Sequence[str],
    inputs_path: Path | None,
    timing: Timing,
) -> Result:
    """Measure a dense and a sparse ONNX file in turns.

    Args:
        dense: an ONNX file.
        sparse: its sparse version. Without one, a pruned copy is made and measured; if that
            changes nothing, since the file is 2:4 already, it is compared with itself.
        texts: shapes of inputs that the file leaves open.
        inputs_path: .npz with the inputs; else random numbers.
        timing: how to measure.

    Raises:
        InputError: a file cannot be read, the inputs do not fit, or the two files differ in
            their inputs.
        RunnerError: an engine was asked for and cannot run here.
        BenchmarkError: as `compare_files`.
    """
    arrays = _inputs(dense, sparse, texts, inputs_path)
    why_cpu = _why_cpu(timing.backend)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pruned = None
        if sparse is None:
            pruned = prune_onnx(dense, folder / "sparse.onnx")
            sparse = dense if pruned.is_unchanged else folder / "sparse.onnx"
        if why_cpu:
            runners = _cpu_runners(dense, sparse, arrays)
        else:
            runners = _engine_runners(dense, sparse, arrays, folder, timing)
        table = compare_files(runners, timing.seconds, timing.warmup)
    runner = runners["dense"].name
    lines = [_title(dense, sparse, pruned), f"{runner}. {why_cpu}".strip()]
    lines += ["", table.round(3).to_string(index=False), ""]
    lines += [describe_comparison(table, name) for name in runners if name.startswith("sparse")]
    if why_cpu:
        lines.append(MULTIPLIES_ZEROS)
    facts = {
        "dense": str(dense),
        "sparse": None if pruned else str(sparse),
        "shapes": {name: array.shape for name, array in arrays.items()},
        "runner": runner,
        "rows": table.to_dict("records"),
        **machine.provenance(),
    }
    return Result("\n".join(lines), facts)


def _title(dense: Path, sparse: Path, pruned: OnnxPruning | None) -> str:
    if pruned is None:
        return f"dense: {shown(dense)}, sparse: {shown(sparse)}"
    if pruned.is_unchanged:
        return f"{shown(dense)} is 2:4 already, so no pruned copy was made."
    return f"dense: {shown(dense)}, sparse: a pruned copy ({pruned.summary})"


def _inputs(
    dense: Path, sparse: Path | None, texts: Sequence[str], inputs_path: Path | None
) -> dict[str, np.ndarray]:
    """Return numbers for the inputs that two files have in common."""
    _require_onnx(dense)
    inputs = onnx_inputs(OnnxFile(dense).model, dense)
    if sparse is not None:
        _require_onnx(sparse)
        others = onnx_inputs(OnnxFile(sparse).model, sparse)
        if {(item.name, item.dtype) for item in inputs} != {(i.name, i.dtype) for i in others}:
            raise InputError(
                f"{shown(dense)} and {shown(sparse)} have different inputs: "
                f"{', '.join(map(str, inputs))} and {', '.join(map(str, others))}. Give two "
                "versions of one model."
            )
    if inputs_path is None:
        shapes = complete_shapes(inputs, parse_shapes(texts), dense)
        arrays = random_inputs(inputs, shapes)
    elif texts:
        raise InputError("Give either --shape or --load-inputs, which has the shapes.")
    else:
        arrays = load_inputs(inputs_path, inputs)
    given = {name: array.shape for name, array in arrays.items()}
    complete_shapes(inputs, given, dense)
    if sparse is not None:
        complete_shapes(others, given, sparse)
    return arrays


def _why_cpu(backend: str | None) -> str:
    """Return why to measure on the CPU; empty to measure engines."""
    if backend not in (None, "cpu", "engine"):
        raise InputError(f"There is no backend {backend!r}; choose engine or cpu.")
    if backend == "cpu":
        return "The CPU was asked for."
    reason = why_no_engine_runs()
    if reason and backend == "engine":
        raise RunnerError(reason)
    return reason


def _cpu_runners(
    dense: Path, sparse: Path, arrays: Mapping[str, np.ndarray]
) -> dict[str, FileRunner]:
    runners: dict[str, FileRunner] = {
        "dense": OnnxFileRunner(dense, arrays),
        AGAIN: OnnxFileRunner(dense, arrays),
    }
    if sparse != dense:
        runners["sparse"] = OnnxFileRunner(sparse, arrays)
    return runners


def _engine_runners(
    dense: Path,
    sparse: Path,
    arrays: Mapping[str, np.ndarray],
    folder: Path,
    timing: Timing,
) -> dict[str, FileRunner]:
    """Build engines for inputs of these shapes, and load them.

    Beside the two files, the sparse one is built without the flag for sparse weights: the
    difference is what sparse kernels buy. If both files are one, it is the dense engine.
    """
    builder = find_builder()
    common: BuildOptions = {"builder": builder, "optimization_level": timing.optimization_level}
    if builder.name == "TensorRT":
        common["timing_cache"] = folder / "timing.cache"
    builds = {"sparse": (sparse, True), "sparse without flag": (sparse, False)}
    if dense == sparse:
        builds = {"dense": (dense, False), "sparse": (sparse, True)}
    else:
        builds = {"dense": (dense, True)} | builds
    runners: dict[str, FileRunner] = {}
    for name, (path, flag) in builds.items():
        inputs = onnx_inputs(OnnxFile(path).model, path)
        profile = {item.name: (arrays[item.name].shape,) * 3 for item in inputs if item.is_open}
        plan = folder / f"{name}.engine"
        build_engine_for_shapes(path, plan, profile, flag, **common)
        runners[name] = EngineFileRunner(plan, arrays, timing.cuda_graph)
        if name == "dense":
            runners[AGAIN] = EngineFileRunner(plan, arrays, timing.cuda_graph)
    return runners


# --- networks and checkpoints ---


def _load(name: str) -> tuple[nn.Module, int, int]:
    """Return a model by its network or its checkpoint, and the channels and size of its images."""
    from helpers.training import networks

    if suffix := Path(name).suffix:
        if suffix != ".safetensors":
            raise TutorialError(
                f"{name} is not a checkpoint: those end in .safetensors. Write one with "
                "helpers.training.networks.save_checkpoint, or name a network."
            )
        stored = read_checkpoint(Path(name)).network
        if stored is None:
            raise TutorialError(
                f"{name} does not name its network in the header. Write it with "
                "helpers.training.networks.save_checkpoint, or name a network."
            )
        model, name = networks.load_checkpoint(Path(name)), stored
    else:
        classes = 10 if name == "resnext14_8x1d" else 1000
        model = networks.create_on_meta(name, classes)  # only its shapes matter
    if isinstance(model, networks.SmallResNeXt):
        return model, 1, 28
    return model, 3, _image_size(name)


def _image_size(name: str) -> int:
    """Return the size of images that torchvision's network is made for.

    It is the smallest among those of its weights: some of them were trained on larger images.
    """
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)
    return min(each.transforms().crop_size[0] for each in weights)
