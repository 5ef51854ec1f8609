"""Measure everything that the tutorial reports for a GPU, in a single run.

Each part writes its own JSON file into a folder as it goes, with GPU, driver, versions and
date. A part that fails, or has no time left, does not stop the others; its file says so,
unless it holds an earlier run's measurements, which stay until there are new ones. Only an
error that leaves the GPU unusable for this process ends the run.

    python benchmarks/gpu.py --out results           # starts nothing new after 7.5 minutes
    python benchmarks/gpu.py --out results --parts compiled --minutes 9

Without a GPU the same code runs on the CPU as far as it can: dense products take the place
of sparse ones, and each file names the runner that made it.
"""

import copy
import gc
import json
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import torchvision
import typer
from torch import nn
from torchvision.models import list_models
from torchvision.models.resnet import Bottleneck

from helpers import machine
from helpers.errors import HelpersError, InputError, UnavailableError
from helpers.files import write_json
from helpers.inference import channels_last, cuda_graphs, engine, export
from helpers.inference.cusparselt import SparseGemm, why_no_sparse_gemms
from helpers.inference.runners import Runner, TensorRTRunner
from helpers.inference.sparse_torch import SparseTorchRunner
from helpers.measurement import gemm, roofline
from helpers.measurement.advice import advise
from helpers.measurement.benchmark import check_outputs, sweep, time_in_turns
from helpers.measurement.rates import Rates
from helpers.sparsity import prune_2to4_
from helpers.sparsity.eligibility import eligible_weights
from helpers.training import networks
from helpers.tutorial import backends

NETWORKS = ["resnext101_32x8d", "resnet50", "vit_b_16"]
BATCH_SIZES = [256, 32, 1, 128, 8, 64]  # the most telling first, in case time runs out
ENERGY_BATCH_SIZES = [256]  # where energy is measured too, for half a minute each
BRANCH = 0.2  # the scale of a residual branch in a random model
CALIBRATION_IMAGES = 64  # random, as the weights are
FP16_TOLERANCE, INT8_TOLERANCE = 1e-2, 1e-1  # the largest maximum relative error
SQUARES = [1024, 2048, 4096, 8192, 16384]
DATATYPES = list(roofline.DATATYPES)


@dataclass
class Run:
    """What to measure, where to write it, and how much time is left."""

    out: Path
    networks: Sequence[str]
    batch_sizes: Sequence[int]
    image_size: int
    seconds: float  # for each network and batch size
    squares: Sequence[int]
    until: float
    datatypes: Sequence[str] = tuple(DATATYPES)
    made: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    written: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the run has to end."""
        return self.until - time.monotonic()

    def write(self, part: str, content: dict[str, Any]) -> None:
        """Write what a part has measured so far; until then, an earlier run's file stays."""
        path = self.path(part)
        if not has_figures(content) and has_figures(earlier(path)):
            print(f"{path.name} keeps the measurements of an earlier run")
        else:
            write_json(path, content | machine.provenance())
        self.written[part] = content

    def path(self, part: str) -> Path:
        """Return the file of a part."""
        return self.out / f"{part}.json"

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return the shape of a network's images."""
        return (1, 28, 28) if name == "resnext14_8x1d" else (3, self.image_size, self.image_size)

    def models(self, name: str) -> dict[str, nn.Module]:
        """Return a network's model with random weights, and the same model pruned 2:4."""
        if name not in self.made:
            dense = random_model(name, self.shape(name))
            sparse = copy.deepcopy(dense)
            prune_2to4_(sparse, "cusparselt")
            self.made[name] = {"dense": dense, "sparse": sparse}
        return self.made[name]


def earlier(path: Path) -> dict[str, Any]:
    """Return the record that an earlier run left in a file; empty if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def has_figures(record: dict[str, Any]) -> bool:
    """Return whether a record holds any measurement, not only reasons why there is none."""
    times = [row.get("p50", row.get("dense_ms")) for row in record.get("rows", [])]
    return bool(record.get("kernels")) or not pd.Series(times, dtype=float).isna().all()


def random_model(name: str, shape: tuple[int, int, int], num_classes: int = 1000) -> nn.Module:
    """Return a model with random weights whose outputs are usable numbers.

    Speed does not depend on the weights, but outputs can only be compared if they neither
    vanish nor overflow, and do not amplify rounding: batch norms get the statistics of random
    images, residual branches are scaled down, and a last layer that starts with zeros gets
    random weights.
    """
    torch.manual_seed(0)
    model = networks.create_model(name, num_classes).to(machine.device())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches, not a moving one
        if isinstance(layer, Bottleneck):
            nn.init.constant_(layer.bn3.weight, BRANCH)
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    with torch.no_grad():
        model.train()(torch.randn(8, *shape, device=machine.device()))
    return model.eval()


def torch_runners(run: Run, name: str, compile: bool = False) -> dict[str, SparseTorchRunner]:
    """Return the dense and the sparse model on PyTorch's runners.

    Both choose among the same dense kernels, so that they differ in sparsity alone.
    """
    models, cache = run.models(name), run.out / "kernels.json"
    kernels = "dense" if why_no_sparse_gemms() else "cusparselt"
    return {
        "dense": SparseTorchRunner(models["dense"], "dense", cache=cache, compile=compile),
        "sparse": SparseTorchRunner(models["sparse"], kernels, cache=cache, compile=compile),
    }


# --- the parts ---


def products(run: Run) -> None:
    """Measure the datatypes on square products, then the products of the networks in FP16."""
    record: dict[str, Any] = {
        "what": "dense and sparse matrix products in turns; ms, and 10^12 operations a second",
        "bandwidth_gbps": gemm.measure_bandwidth() if torch.cuda.is_available() else None,
        "rows": [],
    }
    for datatype in run.datatypes:
        squares = gemm.measure_gemms([(size, size, size) for size in run.squares], datatype)
        record["rows"] += squares.to_dict("records")
        run.write("products", record)  # the next datatype may crash
    if "FP16" not in run.datatypes:
        return
    if reason := gemm.why_not("FP16"):
        record["missing"] = reason
        run.write("products", record)
        return
    sizes = sorted({size for name in run.networks for size in product_sizes(run, name)})
    for first in range(0, len(sizes), 16):
        if run.left < 60:
            record["missing"] = f"no time was left for {len(sizes) - first} of the products"
            break
        rows = gemm.measure_gemms(sizes[first : first + 16], "FP16", rounds=5)
        record["rows"] += rows.to_dict("records")
    run.write("products", record)


def product_sizes(run: Run, name: str) -> set[tuple[int, int, int]]:
    """Return the sizes (m, n, k) of a network's products at its largest and smallest batch size.

    As when the network runs, m is padded to what cuSPARSELt takes.
    """
    rates = Rates.from_datasheet(roofline.DATASHEETS["a100"])  # any rates give the same sizes
    sizes: set[tuple[int, int, int]] = set()
    for batch in (max(run.batch_sizes), min(run.batch_sizes)):
        layers = advise(run.models(name)["dense"], rates, run.shape(name), batch=batch).layers
        eligible = layers[layers.sparse_ms.notna()]
        eligible = eligible.assign(m=eligible.m + -eligible.m % SparseGemm.STEP)
        sizes |= set(eligible[["m", "n", "k"]].itertuples(index=False, name=None))
    return sizes


def network(run: Run, name: str) -> None:
    """Measure a network over the batch sizes, dense and sparse in turns."""
    runners = torch_runners(run, name)
    record = {
        "what": f"{name}, random weights, dense and sparse in turns; see docs/helpers.md",
        "network": name,
        "eligible": len(eligible_weights(run.models(name)["sparse"], "cusparselt")),
    }
    measure(run, name, record, runners)


def compiled(run: Run) -> None:
    """Measure the first network with and without `torch.compile`, all in turns.

    The compiled dense model is the best dense one in PyTorch, and so the fair control.
    """
    name = run.networks[0]
    plain, runners = torch_runners(run, name), torch_runners(run, name, compile=True)
    runners["dense, not compiled"] = plain["dense"]
    runners["sparse, not compiled"] = plain["sparse"]
    record = {
        "what": f"{name}, random weights: with and without torch.compile, in turns",
        "network": name,
    }
    measure(run, "compiled", record, runners)


def int8(run: Run) -> None:
    """Measure the first network in INT8 and in FP16, dense and sparse, all in turns."""
    name = run.networks[0]
    models, cache = run.models(name), run.out / "kernels.json"
    images = torch.randn(CALIBRATION_IMAGES, *run.shape(name))
    kernels = "dense_int8" if why_no_sparse_gemms() else "cusparselt_int8"
    runners = torch_runners(run, name)
    runners["dense, INT8"] = SparseTorchRunner(
        models["dense"], "dense_int8", cache=cache, calibration=images
    )
    runners["sparse, INT8"] = SparseTorchRunner(
        models["sparse"], kernels, cache=cache, calibration=images
    )
    record = {
        "what": f"{name}, random weights: dense and sparse, with and without INT8 products, in "
        "turns",
        "network": name,
    }
    measure(run, "int8", record, runners, "sparse, INT8")


def measure(
    run: Run,
    part: str,
    record: dict[str, Any],
    runners: Mapping[str, SparseTorchRunner],
    explained: str = "sparse",
) -> None:
    """Check and time runners over the batch sizes while there is time, and write each at once.

    Of one of them, the kernels and the times of whole networks are written too.
    """
    sparse = runners[explained]
    record |= {"runner": sparse.name, "image_shape": run.shape(record["network"])}
    record |= {"max_relative_errors": [], "rows": [], "failed": []}
    run.write(part, record)  # compiling takes minutes for each batch size, and may be cut short
    took: list[float] = []  # seconds for each batch size so far
    for batch in run.batch_sizes:
        if run.left < max(30, min(took, default=0)):
            record["missing"] = f"no time was left from batch {batch} on"
            break
        began = time.monotonic()
        try:
            measure_batch(run, record, runners, batch)
        except Exception as error:  # such as too little memory, which a smaller batch may have
            cuda_graphs.raise_if_context_is_broken(error)
            record["failed"].append({"batch": batch, "reason": described(error)})
        record["network_times"] = sparse.network_times().to_dict("records")
        record["kernel_choices"] = sparse.kernel_choices().to_dict("records")
        run.write(part, record)
        took.append(time.monotonic() - began)
    run.write(part, record)


def measure_batch(
    run: Run, record: dict[str, Any], runners: Mapping[str, SparseTorchRunner], batch: int
) -> None:
    """Check and time runners at one batch size, and add the results to a record."""
    name = record["network"]
    for label, runner in runners.items():
        model = run.models(name)[label.partition(",")[0]]
        tolerance = INT8_TOLERANCE if "INT8" in label else FP16_TOLERANCE
        error = check_outputs(runner, model, run.shape(name), batch, tolerance)
        record["max_relative_errors"].append(
            {"network": label, "batch": batch, "max_relative_error": error}
        )
    with_energy = batch in ENERGY_BATCH_SIZES and run.left > 60 + 20 * len(runners)
    rounds = 2 if with_energy else 0
    table = sweep(runners, run.shape(name), [batch], run.seconds, energy_rounds=rounds)
    record["rows"] += table.to_dict("records")


def advice(run: Run) -> None:
    """Compare the times predicted from the measured products with those of the networks.

    A network whose part stopped has no measurements to compare.

    Raises:
        InputError: a network was measured on another GPU than the products.
    """
    rates = Rates.from_record(run.path("products"))
    record = json.loads(run.path("products").read_text())  # keeps its own date
    checked = []
    for name in run.networks:
        measured = earlier(run.path(name))
        rows = measured.get("rows", [])
        if rows and measured["machine"].get("gpu") != record["machine"]["gpu"]:
            raise InputError(
                f"{name}.json and products.json were not measured on the same GPU; measure both "
                "into one folder."
            )
        for row in rows:
            if row["network"] == "sparse":
                batch, model = row["batch"], run.models(name)["dense"]
                predicted = advise(model, rates, measured["image_shape"], batch=batch)
                checked.append(
                    {
                        "network": name,
                        "datatype": "FP16",
                        "batch": batch,
                        "predicted": predicted.speedup,
                        "measured": row["speedup"],
                        "predicted_sparse_ms": predicted.sparse_ms,
                        "measured_sparse_ms": row["gpu_p50"],
                    }
                )
    done = {row["network"] for row in checked}
    checked += [row for row in record.get("checked", []) if row["network"] not in done]
    write_json(run.path("products"), record | {"checked": checked})
    run.path("advice").unlink(missing_ok=True)  # it says why an earlier run stopped


def profile(run: Run) -> None:
    """Record the kernels that take the most time, and the floors of the slowest products."""
    name, batch = run.networks[0], max(run.batch_sizes)
    images = torch.randn(batch, *run.shape(name))
    runners = torch_runners(run, name)
    record: dict[str, Any] = {
        "what": f"{name} at batch {batch}: the time in each kernel, and the products' floors; "
        "overhead compares a run's median by the host's and the GPU's clock with the sum of its "
        "kernels, in ms; if that is far below the GPU's, the profiler missed some",
        "overhead": {},
        "kernels": {},
    }
    for label, runner in runners.items():
        latency, *_ = time_in_turns([runner], images, run.seconds)
        record["kernels"][label] = kernel_times(runner)
        total = sum(kernel["ms"] for kernel in record["kernels"][label])
        gpu = None if latency.gpu is None else float(np.median(latency.gpu))
        record["overhead"][label] = {"p50": latency.p50, "gpu_p50": gpu, "kernels": total}
        run.write("profile", record)
    record["products"] = slowest_products(run, name, batch, runners["sparse"].kernel_choices())
    run.write("profile", record)


def kernel_times(runner: Runner, runs: int = 5) -> list[dict[str, Any]]:
    """Return the time of each kernel (on a CPU: operator) in a run, the longest first.

    Raises:
        UnavailableError: the profiler saw nothing, as happens to the second profile of a process.
    """
    on_gpu = torch.cuda.is_available()
    activity = (
        torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    )
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(runs):
            runner.run()
    kernels = [
        (event, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    total = sum(microseconds for _, microseconds in kernels)
    if not total:
        raise UnavailableError("The profiler saw no kernel; run this part alone, in a new process.")
    return [
        {
            "kernel": event.key,
            "calls": event.count / runs,
            "ms": microseconds / runs / 1000,
            "share": 100 * microseconds / total,
        }
        for event, microseconds in sorted(kernels, key=lambda kernel: -kernel[1])
    ]


def slowest_products(
    run: Run, name: str, batch: int, choices: pd.DataFrame
) -> list[dict[str, Any]]:
    """Return the products that take the most time, with their floors by this GPU's best rates.

    They are of the layers that have kernels to choose from, without projections of attention,
    which have other names in the runner.
    """
    rates = Rates.from_record(run.path("products"))
    if "FP16" not in rates.best:
        raise UnavailableError("No FP16 product ran, so there are no rates to compute floors from.")
    dense, sparse = rates.best["FP16"]
    advised = advise(run.models(name)["dense"], rates, run.shape(name), batch=batch)
    layers = choices.merge(advised.layers[["layer", "m", "n", "k"]], on="layer")
    layers["ms"] = [row[row["kernel"]] for row in layers.to_dict("records")]
    rows = layers.nlargest(15, "ms").to_dict("records")
    for row in rows:
        m, n, k = row["m"], row["n"], row["k"]
        row["dense_floor_ms"] = roofline.floor_ms(m, n, k, "FP16", dense, rates.bandwidth, False)
        row["sparse_floor_ms"] = roofline.floor_ms(m, n, k, "FP16", sparse, rates.bandwidth, True)
        row["operations_per_byte"] = roofline.intensity(m, n, k, "FP16", sparse=True)
    return rows


def engines(run: Run) -> None:
    """Build the first network's engines with their controls, and run them if they run here."""
    name, batch = run.networks[0], max(run.batch_sizes)
    shape, profile_batch_sizes = run.shape(name), (1, batch, batch)
    record: dict[str, Any] = {
        "what": f"{name} in FP16: engines of dense and sparse weights, with and without the flag",
        "reasons": backends.backend_status(),
    }
    run.write("engines", record)
    builder = engine.find_builder()  # fails before the exports, which take a minute
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = None
        if builder.name == "TensorRT":  # so that all builds choose from the same kernel times
            cache = folder / "timing.cache"
        for label, model in run.models(name).items():
            file = folder / f"{label}.onnx"
            export.export_onnx(model, file, shape, half=True)
            channels_last.rewrite_1x1_as_matmul(file, folder / f"{label}_products.onnx", shape)
        builds = engine.build_with_controls(
            folder / "dense.onnx", folder / "sparse.onnx", folder, shape, profile_batch_sizes,
            builder=builder, timing_cache=cache,
        )  # fmt: skip
        write_builds(run, record, builds)
        for label in ("dense_products", "sparse_products"):
            file, plan = folder / f"{label}.onnx", folder / f"{label}.engine"
            builds[label] = engine.build_engine(
                file, plan, shape, profile_batch_sizes, builder=builder, timing_cache=cache
            )
            write_builds(run, record, builds)
        names = ["dense", *(label for label in builds if label != "dense")]
        runners = {label: TensorRTRunner(folder / f"{label}.engine") for label in names}
        record["runner"] = runners["sparse"].name
        record["max_relative_errors"] = []
        for label, runner in runners.items():
            weights, *_ = label.split("_")  # such as sparse_without_flag, dense_products
            error = check_outputs(runner, run.models(name)[weights], shape, batch)
            record["max_relative_errors"].append({"network": label, "max_relative_error": error})
        table = sweep(runners, shape, [batch], run.seconds, energy_rounds=0)
        run.write("engines", record | {"rows": table.to_dict("records")})


def write_builds(
    run: Run, record: dict[str, Any], builds: Mapping[str, engine.EngineReport]
) -> None:
    """Write the builds so far: each takes minutes, and the run may be cut short."""
    record["builds"] = {label: report.facts() for label, report in builds.items()}
    # The layers on which the log and the finished engine disagree.
    record["disagreements"] = {
        label: report.disagreements()
        for label, report in builds.items()
        if report.eligible and report.chosen is not None
    }
    run.write("engines", record)


# --- the run ---

PARTS: dict[str, Callable[..., None]] = {
    "products": products,
    "networks": network,  # each network is a part of its own
    "advice": advice,
    "profile": profile,
    "compiled": compiled,
    "int8": int8,
    "engines": engines,
}
PART_NAMES = list(PARTS)
NEEDED = {"compiled": 240, "int8": 60, "engines": 300}  # seconds; any other part is started with 20


def described(error: Exception) -> str:
    """Return an error in one line, after printing the traceback of an unexpected one."""
    if not isinstance(error, HelpersError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def attempt(run: Run, part: str, work: Callable[[Run], None]) -> None:
    """Do one part; if it stops, its file says why, and the other parts go on.

    Raises:
        UnavailableError: the part left the GPU unusable for this process.
    """
    began = time.monotonic()
    try:
        if run.left < NEEDED.get(part, 20):
            raise UnavailableError(
                "no time was left for it; run it with --parts and more --minutes"
            )
        work(run)
    except Exception as error:  # a part must not take the others with it
        reason = described(error)
        print(f"{part} stopped: {reason}")
        run.write(part, run.written.get(part, {}) | {"stopped": reason})
        cuda_graphs.raise_if_context_is_broken(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{part}: {time.monotonic() - began:.0f} s, {run.left:.0f} s left", flush=True)


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the results")],
    parts: Annotated[list[str], typer.Option(help="only these parts")] = PART_NAMES,
    networks: Annotated[list[str], typer.Option(help="names of torchvision's")] = NETWORKS,
    batch_sizes: Annotated[
        list[int], typer.Option(min=1, help="the most telling first")
    ] = BATCH_SIZES,
    squares: Annotated[list[int], typer.Option(min=16, help="sizes of products")] = SQUARES,
    datatypes: Annotated[list[str], typer.Option(help="of the products")] = DATATYPES,
    image_size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 224,
    seconds: Annotated[float, typer.Option(min=0, help="for each network and batch size")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="after which nothing is started")] = 7.5,
) -> None:
    """Measure everything that the tutorial reports for a GPU."""
    _require_known("parts", parts, PARTS)
    _require_known("datatypes", datatypes, DATATYPES)
    _require_known(
        "networks", networks, ["resnext14_8x1d", *list_models(module=torchvision.models)]
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise typer.BadParameter(
            f"cannot be written to: {error.strerror}", param_hint="out"
        ) from error
    until = time.monotonic() + 60 * minutes
    run = Run(out, networks, batch_sizes, image_size, seconds, squares, until, datatypes)
    try:
        for part in parts:
            if part == "networks":
                for name in networks:
                    attempt(run, name, partial(network, name=name))
            else:
                attempt(run, part, PARTS[part])
    except UnavailableError as error:  # nothing more can run on the GPU in this process
        print(error)
        raise typer.Exit(1) from error


def _require_known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{name}; there are {', '.join(known)}", param_hint=option)


if __name__ == "__main__":
    typer.run(main)
