"""Measure what 2:4 sparsity gains on a CPU, against the fastest dense libraries.

Whole networks and single layers, with random weights pruned 2:4 wherever the kernel can use
it (`rules="any"`: input channels in fours, grouped convolutions too). All contenders compute
the same model in FP32, which is checked first, and take turns within one process:

- `onnxruntime`: ONNX Runtime, which multiplies by the zeros.
- `torch`: PyTorch at its best, the faster of compiled with frozen weights (where there is a
  C++ compiler) and `CpuRunner` with dense kernels, among them oneDNN's with weights in oneDNN's
  order. PyTorch's plain calls are up to three times slower on some processors and are not a
  baseline. For single layers it is `onednn`.
- `twin`: the 2:4 kernel with all zeros multiplied; `sparse` against it is what skipping saves.
- `sparse`: each layer in the fastest of oneDNN and the 2:4 kernel; where the whole model then
  loses, the faster dense runner, as `helpers.inference.sparse_cpu` chooses.

A time is the median of the runs; `low_ms` and `high_ms` are its 95 % bootstrap interval over the
rounds, and so are the ends of the ratios. With one thread it is the processor's time for this
thread, of which other programs take nothing; with more it is wall time, which means little on a
machine that has other work. Each network, batch size and number of threads is written when it is
done. Later runs into the same file replace what they measure again and keep the rest.

    python benchmarks/cpu.py --out results.json --networks resnet50 --batches 1 --threads 2
"""

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor, nn

from gpu_run import random_model
from helpers import machine
from helpers.errors import InputError
from helpers.files import write_json
from helpers.inference.cpu_runner import CpuRunner, SparseCpu
from helpers.inference.dense_cpu import DenseCpuRunner
from helpers.inference.export import export_onnx
from helpers.inference.kernels import CpuKernel, ProductLayer
from helpers.inference.onednn import OneDnn
from helpers.inference.runners import OnnxRunner, Runner
from helpers.inference.sparse_cpu import SparseCpuRunner
from helpers.measurement.benchmark import (
    BenchmarkError,
    Latency,
    Ratio,
    bootstrap_ratio,
    time_in_turns,
)
from helpers.metrics import max_relative_error
from helpers.sparsity import prune_2to4_
from helpers.tutorial.plots import PRUNED, SPARSE, save
from records import earlier_lists

NETWORKS = ["resnet50", "resnext101_32x8d", "vit_b_16", "resnext14_8x1d"]
QUICK = "resnext14_8x1d"  # the network of the quick preset: 28x28 grey images, ten classes
BATCHES = [1, 8]
THREADS = [1]
DENSE = ("onnxruntime", "torch", "onednn")
TOLERANCE = 1e-4  # FP32: the contenders add in another order
MOST_ROUNDS = 12
TURNS = 4  # runs of a contender in a round: two turns, each with a run that is not counted
FEWEST_TOKENS = 197  # of an image in ViT-B/16
LAYER_SECONDS = 0.1  # for each contender of a layer

# The kind of layers of a network that are measured alone, too.
LAYER_KINDS = {"resnext101_32x8d": "1x1", "resnet50": "3x3", "vit_b_16": "linear"}


@dataclass(frozen=True)
class Options:
    """What is measured, and for how long."""

    out: Path
    networks: Sequence[str] = tuple(NETWORKS)
    batches: Sequence[int] = tuple(BATCHES)
    threads: Sequence[int] = tuple(THREADS)
    seconds: float = 3.0  # for each contender
    layers: bool = True
    compile: bool = True
    image_size: int = 224


@dataclass
class Record:
    """The results, in the file and here."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)  # one for each contender
    ratios: list[dict[str, Any]] = field(default_factory=list)  # best dense over sparse and twin
    cases: list[dict[str, Any]] = field(default_factory=list)  # how each was measured
    layers: list[dict[str, Any]] = field(default_factory=list)

    LISTS = ("rows", "ratios", "cases", "layers")

    @classmethod
    def open(cls, path: Path) -> "Record":
        """Return what earlier runs on this machine, with these versions, left in a file."""
        return cls(path, *earlier_lists(path, cls.LISTS))

    def replace(self, case: "Case", **new: list[dict[str, Any]]) -> None:
        """Put new entries of one case in place of its earlier ones, and write the file."""
        for name, entries in new.items():
            kept = [entry for entry in getattr(self, name) if not case.holds(entry)]
            setattr(self, name, kept + [case.labels() | entry for entry in entries])
        lists = {name: getattr(self, name) for name in self.LISTS}
        write_json(self.path, {"what": _summary_line(), **machine.provenance(), **lists})


@dataclass(frozen=True)
class Case:
    """One network at one batch size, with a number of threads."""

    network: str
    batch: int
    threads: int

    def labels(self) -> dict[str, Any]:
        """Return the columns that say which case a row belongs to."""
        return {"network": self.network, "batch": self.batch, "threads": self.threads}

    def holds(self, entry: Mapping[str, Any]) -> bool:
        """Return whether an entry of a record belongs to this case."""
        return self.labels().items() <= entry.items()

    @property
    def clock(self) -> Callable[[], float]:
        """The clock that suits the number of threads."""
        return time.thread_time if self.threads == 1 else time.perf_counter

    @property
    def clock_name(self) -> str:
        """What the clock counts."""
        return "thread CPU time" if self.threads == 1 else "wall time"


class LayerRunner(Runner):
    """One kernel of one layer, with its weight in the kernel's order."""

    def __init__(self, kernel: CpuKernel, channels_last: bool) -> None:
        self.kernel, self.name = kernel, kernel.name
        self.channels_last = channels_last  # how it reads images

    def load(self, images: Tensor) -> None:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.images = images.contiguous(memory_format=layout)
        out = torch.empty_like(self.kernel.layer(images)) if self.kernel.by_channels else None
        self.call = self.kernel.for_shape(images.shape, out)

    @torch.inference_mode()
    def run(self) -> None:
        self.output = self.call(self.images)

    def fetch(self) -> Tensor:
        return self.output.contiguous().clone()

    @torch.inference_mode()
    def invalidate_output(self) -> None:
        self.output.fill_(float("nan"))


class Contenders:
    """The contenders of one network and number of threads, made once for all batch sizes."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, int, int], folder: Path, compile: bool
    ) -> None:
        onnx = OnnxRunner(export_onnx(model, folder / "model.onnx", shape))
        self.pytorch = DenseCpuRunner(model, compile=compile)
        del self.pytorch.makers["ONNX Runtime"]
        # What the sparse runner has to beat: the same two runners, not others like them.
        dense = DenseCpuRunner(model)
        dense.makers = {"ONNX Runtime": lambda shape: onnx, "PyTorch": lambda shape: self.pytorch}
        cache = folder / "kernels.json"  # so that twin and sparse have the same layers
        self.sparse = SparseCpuRunner(model, "sparse", cache, dense)
        self.runners: dict[str, Runner] = {
            "onnxruntime": onnx,
            "torch": self.pytorch,
            "sparse": self.sparse,
            "twin": CpuRunner(model, "twin", cache),
        }

    def facts(self) -> dict[str, Any]:
        """Return what runs for the loaded images."""
        times = self.sparse.network_times().iloc[-1]
        return {
            "torch_runs": self.pytorch.current.name,
            "sparse_runs": times.runs,
            "models_ms": times.drop(["input", "threads", "runs"]).to_dict(),
            "profile": profile(self.sparse, len(self.sparse.images)),
        }


def profile(sparse: CpuRunner, batch: int) -> list[dict[str, Any]]:
    """Return where the time of the 2:4 model goes, by kind of layer and chosen kernel.

    The milliseconds are those of layers timed alone; `gflops` counts the zeros as well, so that
    dense and sparse kernels compare.
    """
    rows = []
    for tuned in sparse.layers:
        layer = next(iter(tuned.kernels.values())).layer
        for shape, choice in tuned.choices.items():
            if shape[0] == batch and choice.milliseconds:
                outputs = copy.deepcopy(layer).to("meta")(torch.empty(shape, device="meta"))
                rows.append(
                    {
                        "kind": layer_name(layer),
                        "kernel": choice.kernel,
                        "layers": 1,
                        "ms": choice.milliseconds[choice.kernel],
                        "flops": 2 * outputs.numel() * layer.weight[0].numel(),
                    }
                )
    if not rows:
        return []
    table = pd.DataFrame(rows).groupby(["kind", "kernel"], as_index=False).sum()
    table["gflops"] = table.pop("flops") / table.ms / 1e6
    return table.sort_values("ms", ascending=False).to_dict("records")


def layer_name(layer: ProductLayer) -> str:
    """Return the kind of a layer, such as `3x3 grouped`."""
    if isinstance(layer, nn.Linear):
        return "linear"
    size = "x".join(map(str, layer.kernel_size))
    return size if layer.groups == 1 else f"{size} grouped"


# --- measuring ---


def check(
    runners: Mapping[str, Runner], images: Tensor, expected: Tensor
) -> dict[str, dict[str, float]]:
    """Return each runner's maximum relative error against the model's own outputs.

    And the seconds until its first outputs: kernels are compiled and chosen in them.

    Raises:
        BenchmarkError: one computes something else.
    """
    found = {}
    for name, runner in runners.items():
        start = time.perf_counter()
        error = max_relative_error(runner(images), expected)
        if not error <= TOLERANCE:  # also refuses NaN
            raise BenchmarkError(
                f"{name} ({runner.name}): its outputs differ from the model's by {error:.1e} of "
                f"the largest, where {TOLERANCE:g} is allowed. Its time would mean nothing."
            )
        seconds = time.perf_counter() - start
        found[name] = {"max_relative_error": error, "seconds_to_first_output": seconds}
    return found


def rounds_within(runners: Mapping[str, Runner], seconds: float) -> int:
    """Return in how many rounds the slowest of the loaded runners takes some seconds.

    It is a multiple of the number of runners, so that each has every place equally often.
    """
    slowest = 0.0
    for runner in runners.values():
        start = time.perf_counter()
        runner.run()
        slowest = max(slowest, time.perf_counter() - start)
    times = int(min(MOST_ROUNDS, seconds / (TURNS * slowest)) // len(runners))
    return len(runners) * max(1, times)


def measure(
    case: Case, runners: Mapping[str, Runner], images: Tensor, seconds: float, warmup: float
) -> dict[str, Latency]:
    """Return the times of loaded runners, in turns."""
    rounds = rounds_within(runners, seconds)
    found = time_in_turns(
        list(runners.values()), images, seconds / 2, warmup, rounds, clock=case.clock
    )
    return dict(zip(runners, found, strict=True))


def time_row(contender: str, latency: Latency) -> dict[str, Any]:
    """Return the median of a contender with its 95 % bootstrap interval over the rounds."""
    # The ratio to one millisecond.
    unit = [np.ones_like(own) for own in latency.rounds]
    median = bootstrap_ratio(latency.rounds, unit)
    return {
        "contender": contender,
        "p50_ms": median.value,
        "low_ms": median.low,
        "high_ms": median.high,
        "runs": len(latency.times),
    }


def ratio_to_best_dense(found: Mapping[str, Latency], contender: str) -> tuple[str, Ratio]:
    """Return the fastest dense library, and its time over a contender's."""
    dense = [name for name in found if name in DENSE]
    best = min(dense, key=lambda name: found[name].p50)
    return best, bootstrap_ratio(found[best].rounds, found[contender].rounds)


def ratio_row(found: Mapping[str, Latency], contender: str) -> dict[str, Any]:
    """Return how many times as fast as the best dense library a contender is."""
    best, ratio = ratio_to_best_dense(found, contender)
    return {
        "contender": contender,
        "best_dense": best,
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
    }


def measure_case(
    record: Record, case: Case, contenders: Contenders, model: nn.Module, images: Tensor,
    options: Options,
) -> None:  # fmt: skip
    """Check and time the contenders of a network, and add them to the record."""
    load = os.getloadavg()[0]
    with torch.inference_mode():
        expected = model(images)
    first = check(contenders.runners, images, expected)
    found = measure(case, contenders.runners, images, options.seconds, 0.2)
    facts = {
        "clock": case.clock_name,
        "rounds": len(found["sparse"].rounds),
        "load_average": [load, os.getloadavg()[0]],
        "first_outputs": first,
        **contenders.facts(),
    }
    record.replace(
        case,
        rows=[time_row(name, latency) for name, latency in found.items()],
        ratios=[ratio_row(found, name) for name in ("sparse", "twin")],
        cases=[facts],
    )


def layers_of(
    name: str, sparse: CpuRunner, batch: int
) -> dict[str, tuple[str, ProductLayer, torch.Size]]:
    """Return name, kind, layer and input shape of the layers that are measured alone.

    Of layers with the same geometry and input the first stands for all. Linear layers over
    few tokens, as the head, are left out.
    """
    found: dict[str, tuple[str, ProductLayer, torch.Size]] = {}
    seen = set()
    for tuned in sparse.layers:
        if SparseCpu.name not in tuned.kernels:
            continue
        layer = tuned.kernels[SparseCpu.name].layer
        kind = layer_name(layer)
        for shape in tuned.choices:
            too_few = kind == "linear" and shape[:-1].numel() < FEWEST_TOKENS
            key = str(layer), shape
            wanted = kind == LAYER_KINDS[name] and shape[0] == batch and not too_few
            if wanted and key not in seen:
                seen.add(key)
                found[tuned.name] = kind, layer, shape
    return found


def measure_layers(record: Record, case: Case, sparse: CpuRunner, folder: Path) -> None:
    """Time the contenders on each layer alone, without what is fused into it in the network."""
    rows: list[dict[str, Any]] = []
    for name, (kind, layer, shape) in layers_of(case.network, sparse, case.batch).items():
        # Linear layers as images with the tokens as their width, which all contenders take.
        images = torch.randn(shape if len(shape) == 4 else (1, 1, shape[:-1].numel(), shape[-1]))
        found = measure_layer(case, layer, images, folder)
        best, ratio = ratio_to_best_dense(found, "sparse")
        facts = {
            "layer": name, "kind": kind, "shape": "x".join(map(str, layer.weight.shape)),
            "stride": layer.stride[0] if isinstance(layer, nn.Conv2d) else 1,
            "input": "x".join(map(str, shape)), "clock": case.clock_name,
        }  # fmt: skip
        for contender, latency in found.items():
            rows.append(facts | time_row(contender, latency))
        print(f"  {kind} {facts['shape']} on {facts['input']}: {ratio} against {best}", flush=True)
        record.replace(case, layers=rows)


def measure_layer(
    case: Case, layer: ProductLayer, images: Tensor, folder: Path
) -> dict[str, Latency]:
    """Check and time the contenders on one layer."""
    alone = nn.Sequential(copy.deepcopy(layer)).eval()
    image_shape = (images.shape[1], images.shape[2], images.shape[3])
    kernel = SparseCpu(layer)
    runners: dict[str, Runner] = {
        "onnxruntime": OnnxRunner(export_onnx(alone, folder / "layer.onnx", image_shape)),
        "onednn": LayerRunner(OneDnn(layer), channels_last=isinstance(layer, nn.Conv2d)),
        "sparse": LayerRunner(kernel, channels_last=False),
        "twin": LayerRunner(kernel.twin(), channels_last=False),
    }
    with torch.inference_mode():
        expected = alone(images)
    check(runners, images, expected)
    return measure(case, runners, images, LAYER_SECONDS, 0)


# --- the run ---


def measure_network(record: Record, name: str, threads: int, options: Options) -> None:
    """Measure a network at all batch sizes with a number of threads."""
    torch.set_num_threads(threads)
    shape = (1, 28, 28) if name == QUICK else (3, options.image_size, options.image_size)
    model = random_model(name, shape, 10 if name == QUICK else 1000).cpu()
    prune_2to4_(model, rules="any")
    generator = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        contenders = Contenders(model, shape, folder, options.compile)
        for batch in options.batches:
            case = Case(name, batch, threads)
            images = torch.randn(batch, *shape, generator=generator)
            measure_case(record, case, contenders, model, images, options)
            print_case(record, case)
            if options.layers and name in LAYER_KINDS:
                measure_layers(record, case, contenders.sparse, folder)


def print_case(record: Record, case: Case) -> None:
    """Print the times and ratios of a case."""
    times = {row["contender"]: row["p50_ms"] for row in record.rows if case.holds(row)}
    shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    print(f"{case.network}, batch {case.batch}, threads {case.threads}: {shown}")
    for row in record.ratios:
        if case.holds(row):
            ratio = Ratio(row["ratio"], row["low"], row["high"])
            print(f"  {row['contender']} against {row['best_dense']}: {ratio}", flush=True)


def layer_medians(record: Record) -> pd.DataFrame:
    """Return the median over a network's layers of best dense over sparse, and over twin."""
    columns = ["network", "kind", "batch", "threads"]
    if not record.layers:
        return pd.DataFrame(columns=[*columns, "sparse", "twin", "layers"])
    table = pd.DataFrame(record.layers).pivot_table(
        index=[*columns, "layer"], columns="contender", values="p50_ms"
    )
    best = table[["onnxruntime", "onednn"]].min(axis=1)
    ratios = pd.DataFrame({"sparse": best / table["sparse"], "twin": best / table["twin"]})
    medians = ratios.groupby(columns).median()
    medians["layers"] = ratios.groupby(columns).size()
    return medians.reset_index()


def draw(record: Record) -> plt.Figure:
    """Draw how many times as fast as the best dense library the 2:4 kernels are."""
    cases = [Case(each["network"], each["batch"], each["threads"]) for each in record.cases]
    cases.sort(key=lambda case: (case.threads, case.network, case.batch))
    figure, axis = plt.subplots(figsize=(8, 1.3 + 0.38 * len(cases)))
    for contender, label, colour, offset in (
        ("sparse", "2:4 kernels", SPARSE, -0.1),
        ("twin", "the same kernels, zeros multiplied", PRUNED, 0.1),
    ):
        rows = [
            row
            for case in cases
            for row in record.ratios
            if case.holds(row) and row["contender"] == contender
        ]
        ratios = np.array([row["ratio"] for row in rows])
        ends = np.array([[row["ratio"] - row["low"], row["high"] - row["ratio"]] for row in rows])
        axis.errorbar(
            ratios, np.arange(len(rows)) + offset, xerr=ends.clip(0).T, fmt="o", color=colour,
            label=label, capsize=2, markersize=5,
        )  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8)
    names = [f"{case.network}, batch {case.batch}, {_threads(case.threads)}" for case in cases]
    axis.set_yticks(range(len(cases)), names, fontsize=9)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.set_xlabel(
        "times as fast as the faster of ONNX Runtime and PyTorch; 95 % interval over the rounds"
    )
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    plt.close(figure)  # the caller saves it; pyplot need not keep it
    return figure


def main(
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file for the results")],
    networks: Annotated[list[str], typer.Option(help="names of torchvision's")] = NETWORKS,
    batches: Annotated[list[int], typer.Option(min=1, help="batch sizes")] = BATCHES,
    threads: Annotated[list[int], typer.Option(min=1, help="numbers of threads")] = THREADS,
    seconds: Annotated[float, typer.Option(min=0, help="for each contender of a case")] = 3.0,
    layers: Annotated[bool, typer.Option(help="measure single layers too")] = True,
    compile: Annotated[bool, typer.Option(help="consider torch.compile")] = True,
    image_size: Annotated[int, typer.Option(min=1, help="height and width of images")] = 224,
) -> None:
    """Measure what 2:4 sparsity gains on a CPU, whole networks and single layers."""
    machine.describe()  # before the number of threads is changed, which it tells
    options = Options(out, networks, batches, threads, seconds, layers, compile, image_size)
    try:
        record = Record.open(out)
        for count in threads:
            for name in networks:
                measure_network(record, name, count, options)
                save(draw(record), out.with_suffix(".png"))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    if record.layers:
        print("Median over the layers, best dense library over 2:4 kernel and over twin:")
        print(layer_medians(record).round(2).to_string(index=False))


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _summary_line() -> str:
    return (
        "Models with random weights pruned 2:4 (rules 'any') in FP32 on a CPU, all contenders "
        "in turns; medians in ms with 95 % bootstrap intervals over the rounds; with one thread "
        "the thread's CPU time, else wall time (clock)"
    )


if __name__ == "__main__":
    typer.run(main)
