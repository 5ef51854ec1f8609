"""Measure on a GPU all that the tutorial says of one, in a single run.

Every part writes its own JSON into a folder as it ends, with GPU, driver, versions and
date. A part that fails or finds no time left stops no other; it says so in its file, unless
that holds an earlier run's measurements: these stay until there are new ones.

    python benchmarks/gpu.py --out results           # begins nothing new after 7.5 minutes
    python benchmarks/gpu.py --out results --parts compiled --minutes 9

Without a GPU the same code runs on the CPU as far as it goes: dense products stand in
the place of the sparse ones, and every file says which runner made it.
"""

import copy
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
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
from helpers.errors import HelpersError
from helpers.files import write_json
from helpers.inference import channels_last, engine, export
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

NETWORKS = ("resnext101_32x8d", "resnet50", "vit_b_16")
BATCHES = (256, 32, 1, 128, 8, 64)  # the most telling first, should the time run out
ENERGY = (256,)  # the batches whose energy is measured, half a minute each
BRANCH = 0.2  # the scale of a residual branch of a random network
SQUARES = (1024, 2048, 4096, 8192, 16384)


@dataclass
class Run:
    """What is to be measured, where it goes, and how much time is left."""

    out: Path
    networks: Sequence[str]
    batches: Sequence[int]
    image_size: int
    seconds: float  # for each network and batch
    squares: Sequence[int]
    until: float
    made: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    written: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the run has to end."""
        return self.until - time.monotonic()

    def write(self, part: str, content: dict[str, Any]) -> None:
        """Write what a part has measured so far; until it has, an earlier run's file stays."""
        path = self.path(part)
        if not has_figures(content) and has_figures(earlier(path)):
            print(f"what {path.name} holds of an earlier run stays")
        else:
            write_json(path, content | machine.provenance())
        self.written[part] = content

    def path(self, part: str) -> Path:
        """Return the file of a part."""
        return self.out / f"{part}.json"

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return the shape of a network's images."""
        return (1, 28, 28) if name == "resnext14_8x4d" else (3, self.image_size, self.image_size)

    def networks_of(self, name: str) -> dict[str, nn.Module]:
        """Return a network with random weights, and the same one pruned 2:4."""
        if name not in self.made:
            dense = random_network(name, self.shape(name))
            sparse = copy.deepcopy(dense)
            prune_2to4_(sparse, "cusparselt")
            self.made[name] = {"dense": dense, "sparse": sparse}
        return self.made[name]


def earlier(path: Path) -> dict[str, Any]:
    """Return what an earlier run left in a file; nothing if there is no such record."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def has_figures(record: dict[str, Any]) -> bool:
    """Return whether a record holds anything that was measured, not only reasons why not."""
    times = [row.get("p50", row.get("dense_ms")) for row in record.get("rows", [])]
    return bool(record.get("kernels")) or not pd.Series(times, dtype=float).isna().all()


def random_network(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """Return a network with random weights that gives sensible numbers.

    Speed does not depend on the weights, but outputs can only be compared where they neither
    vanish nor overflow, nor blow every rounding up: batch norms get the statistics of random
    images, the branches of residual blocks are small beside what they are added to, and a last
    layer that starts with zeros gets weights.
    """
    torch.manual_seed(0)
    model = networks.create_model(name, num_classes=1000).to(machine.device())
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


def torch_runners(run: Run, name: str, compile: bool = False) -> dict[str, Runner]:
    """Return the dense and the sparse network on PyTorch's runners.

    Both choose among the same dense kernels, so that only sparsity tells them apart.
    """
    networks = run.networks_of(name)
    backend = "dense" if why_no_sparse_gemms() else "cusparselt"
    options = {"cache": run.out / "kernels.json", "compile": compile}
    return {
        "dense": SparseTorchRunner(networks["dense"], "dense", **options),
        "sparse": SparseTorchRunner(networks["sparse"], backend, **options),
    }


# --- the parts ---


def products(run: Run) -> None:
    """Measure the datatypes on square products, then the products of the networks in FP16."""
    squares = gemm.measure_gemms([(size,) * 3 for size in run.squares])
    record = {
        "what": "dense and sparse matrix products by turns; ms, and 10^12 operations a second",
        "bandwidth_gbps": gemm.measure_bandwidth() if torch.cuda.is_available() else None,
        "rows": squares.to_dict("records"),
    }
    run.write("products", record)
    if reason := gemm.why_not("FP16"):
        run.write("products", record | {"missing": reason})
        return
    sizes = sorted({size for name in run.networks for size in product_sizes(run, name)})
    for first in range(0, len(sizes), 16):
        if run.left < 60:
            record["missing"] = f"no time was left for {len(sizes) - first} of the products"
            break
        rows = gemm.measure_gemms(sizes[first : first + 16], ["FP16"], rounds=5)
        record["rows"] += rows.to_dict("records")
    run.write("products", record)


def product_sizes(run: Run, name: str) -> set[tuple[int, int, int]]:
    """Return the sizes (m, n, k) of a network's products at its largest and smallest batch.

    As in the network, m is padded to what cuSPARSELt takes.
    """
    rates = Rates.from_datasheet(roofline.DATASHEETS["a100"])  # the sizes do not depend on them
    sizes: set[tuple[int, int, int]] = set()
    for batch in (max(run.batches), min(run.batches)):
        layers = advise(run.networks_of(name)["dense"], rates, run.shape(name), batch=batch).layers
        able = layers[layers.sparse_ms.notna()]
        able = able.assign(m=able.m + -able.m % SparseGemm.STEP)
        sizes |= set(able[["m", "n", "k"]].itertuples(index=False, name=None))
    return sizes


def network(run: Run, name: str) -> None:
    """Measure a network over the batch sizes, dense and sparse by turns."""
    runners = torch_runners(run, name)
    record = {
        "what": f"{name}, random weights, dense and sparse by turns; see docs/helpers.md",
        "network": name,
        "eligible": len(eligible_weights(run.networks_of(name)["sparse"], "cusparselt")),
    }
    measure(run, name, record, runners, runners["sparse"])


def compiled(run: Run) -> None:
    """Measure the first network beside the best dense engine, compiled, all by turns."""
    name = run.networks[0]
    plain, own = torch_runners(run, name), torch_runners(run, name, compile=True)
    runners = {
        **own,
        "dense, not compiled": plain["dense"],
        "sparse, not compiled": plain["sparse"],
    }
    record = {
        "what": f"{name}, random weights: compiled by torch.compile and not, by turns",
        "network": name,
    }
    measure(run, "compiled", record, runners, own["sparse"])


def measure(
    run: Run,
    part: str,
    record: dict[str, Any],
    runners: dict[str, Runner],
    sparse: SparseTorchRunner,
) -> None:
    """Check and time runners over the batch sizes while there is time, and write each at once."""
    record |= {"runner": sparse.name, "image_shape": run.shape(record["network"])}
    record |= {"gaps": [], "rows": [], "failed": []}
    run.write(part, record)  # compiling takes minutes for each batch, and may be cut short
    took: list[float] = []  # seconds for each batch so far
    for batch in run.batches:
        if run.left < max(30, min(took, default=0)):
            record["missing"] = f"no time was left from batch {batch} on"
            break
        began = time.monotonic()
        try:
            measure_batch(run, record, runners, batch)
        except Exception as error:  # such as too little memory, which a smaller batch may have
            record["failed"].append({"batch": batch, "reason": told(error)})
        record["contest"] = sparse.network_times().to_dict("records")
        record["choices"] = sparse.kernel_choices().to_dict("records")
        run.write(part, record)
        took.append(time.monotonic() - began)
    run.write(part, record)


def measure_batch(run: Run, record: dict[str, Any], runners: dict[str, Runner], batch: int) -> None:
    """Check and time runners at one batch size, and add what was found to a record."""
    name = record["network"]
    for label, runner in runners.items():
        model = run.networks_of(name)[label.partition(",")[0]]
        gap = check_outputs(runner, model, run.shape(name), batch)
        record["gaps"].append({"network": label, "batch": batch, "gap": gap})
    rounds = 2 if batch in ENERGY and run.left > 60 + 20 * len(runners) else 0
    table = sweep(runners, run.shape(name), [batch], run.seconds, energy_rounds=rounds)
    record["rows"] += table.to_dict("records")


def advice(run: Run) -> None:
    """Compare what the products let expect of the networks with what these then took.

    A network without measurements, since its part stopped, has nothing to compare.

    Raises:
        HelpersError: a network was measured on another GPU than the products.
    """
    rates = Rates.from_record(run.path("products"))
    record = json.loads(run.path("products").read_text())  # with its own date, which stays
    checked = []
    for name in run.networks:
        measured = earlier(run.path(name))
        rows = measured.get("rows", [])
        if rows and measured["machine"].get("gpu") != record["machine"]["gpu"]:
            raise HelpersError(
                f"{name}.json and products.json were not measured on the same GPU; measure both "
                "into one folder."
            )
        for row in rows:
            if row["network"] == "sparse":
                batch, model = row["batch"], run.networks_of(name)["dense"]
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
    run.path("advice").unlink(missing_ok=True)  # in which an earlier run told why it stopped


def profile(run: Run) -> None:
    """Name the kernels that take the most time, and what bounds the slowest products."""
    name, batch = run.networks[0], max(run.batches)
    images = torch.randn(batch, *run.shape(name))
    runners = torch_runners(run, name)
    record: dict[str, Any] = {
        "what": f"{name} at batch {batch}: the time in each kernel, and the products' floors; "
        "overhead is a run's median on the host's clock and the GPU's beside the sum of its "
        "kernels, in ms; where that is far below the GPU's, the profiler has missed some",
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
    """Return the time of each kernel in a run, on a CPU of each operator, the longest first."""
    kinds = torch.profiler.ProfilerActivity
    kind, of = (kinds.CPU, "self_cpu_time_total")
    if torch.cuda.is_available():
        kind, of = (kinds.CUDA, "self_device_time_total")
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(runs):
            runner.run()
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, of))
    total = sum(getattr(event, of) for event in events)
    return [
        {
            "kernel": event.key,
            "calls": event.count / runs,
            "ms": getattr(event, of) / runs / 1000,
            "share": 100 * getattr(event, of) / (total or math.nan),  # the profiler may see none
        }
        for event in events
    ]


def slowest_products(
    run: Run, name: str, batch: int, choices: pd.DataFrame
) -> list[dict[str, Any]]:
    """Return the products that take the most time, with their floors by this GPU's own ceilings.

    They are of the layers that have kernels to choose from; projections of attention, which
    the runner has under names of its own, are not among them.
    """
    rates = Rates.from_record(run.path("products"))
    if "FP16" not in rates.best:
        raise HelpersError("No FP16 product ran, so there is no ceiling to count floors by.")
    dense, sparse = rates.best["FP16"]
    advised = advise(run.networks_of(name)["dense"], rates, run.shape(name), batch=batch)
    layers = choices.merge(advised.layers[["layer", "m", "n", "k"]], on="layer")
    layers["ms"] = [row[row["kernel"]] for row in layers.to_dict("records")]
    rows = layers.nlargest(15, "ms").to_dict("records")
    for row in rows:
        size = (row["m"], row["n"], row["k"], "FP16")
        row["dense_floor_ms"] = roofline.floor_ms(*size, dense, rates.bandwidth, sparse=False)
        row["sparse_floor_ms"] = roofline.floor_ms(*size, sparse, rates.bandwidth, sparse=True)
        row["operations_per_byte"] = roofline.intensity(*size, sparse=True)
    return rows


def engines(run: Run) -> None:
    """Build the first network's engines with their controls, and run them where that works."""
    name, batch = run.networks[0], max(run.batches)
    shape, batches = run.shape(name), (1, batch, batch)
    record: dict[str, Any] = {
        "what": f"{name} in FP16: engines of dense and sparse weights, with and without the flag",
        "reasons": backends.backend_status(),
    }
    run.write("engines", record)
    builder = engine.find_builder()  # before the minute that the exports take
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options: dict[str, Any] = {"builder": builder}
        if builder.name == "TensorRT":  # the engines then differ by no chance of the trials
            options["timing_cache"] = folder / "timing.cache"
        for label, model in run.networks_of(name).items():
            file = folder / f"{label}.onnx"
            export.export_onnx(model, file, shape, half=True)
            channels_last.rewrite_1x1_as_matmul(file, folder / f"{label}_products.onnx", shape)
        builds = engine.build_with_controls(
            folder / "dense.onnx", folder / "sparse.onnx", folder, shape, batches, **options
        )
        for label in ("dense_products", "sparse_products"):
            file, plan = folder / f"{label}.onnx", folder / f"{label}.engine"
            builds[label] = engine.build_engine(file, plan, shape, batches, **options)
        record["builds"] = {label: report.facts() for label, report in builds.items()}
        # Layers of which the log and the finished engine do not say the same.
        record["disagreements"] = {
            label: report.disagreements()
            for label, report in builds.items()
            if report.eligible and report.chosen is not None
        }
        run.write("engines", record)
        names = ["dense", *(label for label in builds if label != "dense")]
        runners = {label: TensorRTRunner(folder / f"{label}.engine") for label in names}
        record["runner"] = runners["sparse"].name
        record["gaps"] = []
        for label, runner in runners.items():
            weights, *_ = label.split("_")  # such as sparse_without_flag, dense_products
            gap = check_outputs(runner, run.networks_of(name)[weights], shape, batch)
            record["gaps"].append({"network": label, "gap": gap})
        table = sweep(runners, shape, [batch], run.seconds, energy_rounds=0)
        run.write("engines", record | {"rows": table.to_dict("records")})


# --- the run ---

PARTS = {
    "products": products,
    "networks": network,  # each of them by itself
    "advice": advice,
    "profile": profile,
    "compiled": compiled,
    "engines": engines,
}
NEEDED = {"compiled": 240, "engines": 120}  # seconds; all other parts are begun with 20


def told(error: Exception) -> str:
    """Return an error in one line, after printing where it came from if it was not foreseen."""
    if not isinstance(error, HelpersError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def attempt(run: Run, part: str, work: Callable[[Run], None]) -> None:
    """Do one part; whatever stops it is told in its file, and stops no other part."""
    began = time.monotonic()
    try:
        if run.left < NEEDED.get(part, 20):
            raise HelpersError("no time was left for this part; run it alone with --parts")
        work(run)
    except Exception as error:  # a part must not take the others with it
        print(f"{part} stopped: {told(error)}")
        run.write(part, run.written.get(part, {}) | {"stopped": told(error)})
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # of a part that broke the GPU's context
            torch.cuda.empty_cache()
    print(f"{part}: {time.monotonic() - began:.0f} s, {run.left:.0f} s left", flush=True)


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the results")],
    parts: Annotated[list[str], typer.Option(help="only these parts")] = (*PARTS,),
    networks: Annotated[list[str], typer.Option(help="names of torchvision's")] = NETWORKS,
    batches: Annotated[list[int], typer.Option(min=1, help="the most telling first")] = BATCHES,
    squares: Annotated[list[int], typer.Option(min=16, help="sizes of products")] = SQUARES,
    image_size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 224,
    seconds: Annotated[float, typer.Option(min=0, help="for each network and batch")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="after which nothing is begun")] = 7.5,
) -> None:
    """Measure on a GPU all that the tutorial says of one."""
    _require_known("parts", parts, PARTS)
    _require_known(
        "networks", networks, ["resnext14_8x4d", *list_models(module=torchvision.models)]
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise typer.BadParameter(
            f"cannot be written to: {error.strerror}", param_hint="out"
        ) from error
    until = time.monotonic() + 60 * minutes
    run = Run(out, networks, batches, image_size, seconds, squares, until)
    for part in parts:
        if part == "networks":
            for name in networks:
                attempt(run, name, partial(network, name=name))
        else:
            attempt(run, part, PARTS[part])


def _require_known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{name}; there are {', '.join(known)}", param_hint=option)


if __name__ == "__main__":
    typer.run(main)
