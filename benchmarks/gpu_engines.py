"""TensorRT engines on a GPU: dense and sparse with their controls, built and compared.

A build takes minutes, so its engine, its report and the times of its kernels are kept.
"""

from pathlib import Path

import torch

from gpu_run import Run
from helpers.inference import channels_last, engine, export
from helpers.inference.runners import TensorRTRunner
from helpers.measurement.benchmark import check_outputs, sweep
from helpers.tutorial import backends

# By label: the ONNX file, and whether the flag for sparse weights is set.
BUILDS = {
    "sparse": ("sparse", True),
    "dense": ("dense", True),
    "sparse_without_flag": ("sparse", False),
    "dense_products": ("dense_products", True),  # 1x1 convolutions as matrix products
    "sparse_products": ("sparse_products", True),
}
LEVEL = 3  # TensorRT's default


def engines(run: Run) -> None:
    """Build a network's engines with their controls, and run them if they run here."""
    (name,), batch = run.job.networks, max(run.job.batch_sizes)
    shape = run.shape(name)
    run.record |= {
        "what": f"{name} in FP16: engines of dense and sparse weights, with and without the flag",
        "reasons": backends.backend_status(),
        "batch": batch,
    }
    run.begin("the engine builder")
    builder = engine.find_builder()  # fails before the exports, which take a minute
    folder = run.cache / "engines" / f"{name}_{batch}_{builder.version}_{gpu_name()}"
    folder.mkdir(parents=True, exist_ok=True)
    export_all(run, name, folder)
    cache = folder / "timing.cache" if builder.name == "TensorRT" else None  # for all builds
    builds = run.record.setdefault("builds", {})
    disagreements = run.record.setdefault("disagreements", {})
    for label, (file, flag) in BUILDS.items():
        plan = folder / f"{label}.engine"
        if plan.exists() and label in builds:
            continue
        if run.left < max((each["seconds"] for each in builds.values()), default=0) / 2:
            run.record["missing"] = f"no time was left from the engine {label} on"
            return
        run.begin(f"the engine {label}")
        report = engine.build_engine(
            folder / f"{file}.onnx", plan, shape, (1, batch, batch), sparse=flag, builder=builder,
            timing_cache=cache, optimization_level=LEVEL,
        )  # fmt: skip
        builds[label] = report.facts()
        if report.eligible and report.chosen is not None:
            # The layers on which the log and the finished engine disagree.
            disagreements[label] = report.disagreements()
        run.write()
    run.record.pop("missing", None)
    run.begin("the engines' outputs")
    names = ["dense", *(label for label in BUILDS if label != "dense")]
    runners = {label: TensorRTRunner(folder / f"{label}.engine") for label in names}
    run.record["runner"] = runners["sparse"].name
    errors = run.record["max_relative_errors"] = []
    for label, runner in runners.items():
        weights, *_ = label.split("_")
        run.begin(f"the outputs of the engine {label}")
        error = check_outputs(runner, run.models(name)[weights], shape, batch)
        errors.append({"network": label, "max_relative_error": error})
    run.begin("the engines' times")
    table = sweep(runners, shape, [batch], run.job.seconds, energy_rounds=0)
    run.record["rows"] = table.to_dict("records")


def gpu_name() -> str:
    """Return the GPU that engines and times of kernels are for, as part of a path."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return name.replace(" ", "_").replace("/", "_")


def export_all(run: Run, name: str, folder: Path) -> None:
    """Export both models, as they are and with their 1x1 convolutions as products."""
    for label in ("dense", "sparse"):
        file, products = folder / f"{label}.onnx", folder / f"{label}_products.onnx"
        if products.exists():  # written last
            continue
        run.begin(f"the ONNX file of the {label} model")
        export.export_onnx(run.models(name)[label], file, run.shape(name), half=True)
        channels_last.rewrite_1x1_as_matmul(file, products, run.shape(name))
