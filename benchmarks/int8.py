"""Quantise, verify, compress, build and time INT8 files on a CPU.

Each network is 2:4 wherever TensorRT has a sparse kernel. That of the quick preset has its own
weights, from the artifacts of the tutorial, and is measured on the full test set; the others have
random weights, pruned. All times are of ONNX Runtime, in turns within one process; FP32 takes part
as exported and with the wider groups of the INT8 file, and the faster of the two is what INT8 is
compared with. ONNX Runtime multiplies by zeros: what is measured here is INT8, not 2:4.

`--parts accuracy`, `sizes`, `latency` and `steps` select what to measure; the rest of the file is
kept. Let nothing else run while latencies are measured: `--parts files --work FOLDER` makes the
files before, and later runs with the same folder take them from there.

    python benchmarks/int8.py --out results.json --parts latency --networks resnet50
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from onnx import numpy_helper

from gpu_run import random_model
from helpers import machine
from helpers.files import write_json
from helpers.inference.activation_ranges import activation_ranges
from helpers.inference.engine import build_engine
from helpers.inference.export import export_onnx
from helpers.inference.file_runners import OnnxFileRunner
from helpers.inference.quantization import quantize_for_cpu, quantize_for_tensorrt
from helpers.inference.runners import OnnxRunner
from helpers.inference.wide_groups import widen_groups_
from helpers.measurement.file_benchmark import AGAIN, compare_files
from helpers.metrics import accuracy, compare_logits
from helpers.sparsity import prune_2to4_, save_compressed
from helpers.sparsity.verify import verify_onnx
from helpers.training.data import first_images
from helpers.tutorial import inputs
from helpers.tutorial.artifacts import Artifacts
from helpers.tutorial.settings import Settings

QUICK = "resnext14_8x1d"
BATCHES = {QUICK: [1, 8, 32, 128], "resnet50": [1], "resnext101_32x8d": [1]}
PARTS = ["files", "accuracy", "sizes", "latency", "steps"]
RESULT = Path(__file__).parent / "results" / "int8_cpu.json"
CALIBRATION = {QUICK: 512}  # images; for the others 32


def shape_of(network: str) -> tuple[int, int, int]:
    """Return channels, height and width of a network's images."""
    return (1, 28, 28) if network == QUICK else (3, 224, 224)


def export(network: str, folder: Path) -> None:
    """Write `fp32.onnx` and `fp16.onnx` of a pruned network into a folder."""
    if network == QUICK:
        artifacts = Artifacts(Settings.load("quick"))
        for precision in ("fp32", "fp16"):
            source = artifacts.require(f"04_sparse_{precision}.onnx")
            (folder / f"{precision}.onnx").write_bytes(source.read_bytes())
        return
    model = random_model(network, shape_of(network))
    prune_2to4_(model)
    for precision in ("fp32", "fp16"):
        path = folder / f"{precision}.onnx"
        export_onnx(model, path, shape_of(network), precision == "fp16")


def calibration(network: str) -> torch.Tensor:
    """Return validation images, or random ones for a network with random weights."""
    count = CALIBRATION.get(network, 32)
    if network == QUICK:
        return first_images(inputs.load_splits(Settings.load("quick")).validation, count)[0]
    return torch.randn(count, *shape_of(network), generator=torch.Generator().manual_seed(0))


def quantise(network: str, folder: Path) -> None:
    """Write `tensorrt.onnx`, `cpu.onnx` and `wide.onnx` (FP32 with the groups of the former)."""
    ranges = activation_ranges(folder / "fp32.onnx", calibration(network), batch_size=4)
    quantize_for_tensorrt(
        folder / "fp16.onnx", folder / "tensorrt.onnx", ranges, expect_sparse=True
    )
    quantize_for_cpu(folder / "fp32.onnx", folder / "cpu.onnx", ranges)
    wide = onnx.load(folder / "fp32.onnx")
    widen_groups_(wide)
    onnx.save(wide, folder / "wide.onnx")


def measure_accuracy(folder: Path) -> dict[str, Any]:
    """Return the accuracies of the quick network's files, paired with sparse FP32."""
    splits = inputs.load_splits(Settings.load("quick"))
    labels = torch.cat([labels for _, labels in splits.test])
    ranges = activation_ranges(folder / "fp32.onnx", calibration(QUICK), percentile=99.99)
    quantize_for_tensorrt(folder / "fp16.onnx", folder / "tensorrt_99.99.onnx", ranges)
    quantize_for_cpu(folder / "fp32.onnx", folder / "cpu_99.99.onnx", ranges)
    logits = {}
    for name in ("fp32", "tensorrt", "cpu", "tensorrt_99.99", "cpu_99.99"):
        runner = OnnxRunner(folder / f"{name}.onnx")
        logits[name] = torch.cat([runner(images) for images, _ in splits.test])
    return {
        name: {
            "accuracy": accuracy(own, labels),
            "against_fp32": (paired := compare_logits(logits["fp32"], own, labels)),
            "points": round(paired.difference, 3),
            "standard_error": round(paired.standard_error, 3),
        }
        for name, own in logits.items()
    }


def measure_sizes(folder: Path) -> dict[str, Any]:
    """Return the bytes of the file for TensorRT, compressed, over those of dense FP16."""
    path = folder / "tensorrt.onnx"
    state = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(path).graph.initializer
    }
    names = save_compressed(state, folder / "compressed.safetensors")
    half = (folder / "fp16.onnx").stat().st_size
    compressed = (folder / "compressed.safetensors").stat().st_size
    return {
        "fp16_bytes": half,
        "int8_bytes": path.stat().st_size,
        "compressed_bytes": compressed,
        "int8_share": round(path.stat().st_size / half, 3),
        "compressed_share": round(compressed / half, 3),
        "compressed_weights": len(names),
    }


def measure_latency(network: str, batch: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Return the latencies of FP32, FP32 with wider groups, and INT8, at one batch size."""
    images = np.random.default_rng(0).standard_normal((batch, *shape_of(network)), dtype=np.float32)
    files = {"fp32": "fp32", AGAIN: "fp32", "fp32, wider groups": "wide", "int8": "cpu"}
    runners = {
        name: OnnxFileRunner(folder / f"{file}.onnx", {"images": images})
        for name, file in files.items()
    }
    table = compare_files(runners, seconds).set_index("network")
    # The best FP32 form, against which INT8 is measured a second time in turns.
    best = min(("fp32", "fp32, wider groups"), key=lambda name: table.p50[name])
    pair = compare_files({best: runners[best], "int8": runners["int8"]}, seconds)
    row = pair.set_index("network").loc["int8"]
    return {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "best_fp32": best,
        "int8_over_best_fp32": round(row.speedup, 3),
        "low": round(row.speedup_low, 3),
        "high": round(row.speedup_high, 3),
        "rows": table.round(4).reset_index().to_dict("records"),
    }


def measure_steps(network: str, folder: Path) -> dict[str, Any]:
    """Return the seconds of quantising, verifying and building, and this process's memory."""
    start = time.perf_counter()
    quantize_for_tensorrt(
        folder / "fp16.onnx", folder / "steps.onnx", calibration(network), batch_size=4,
        expect_sparse=True,
    )  # fmt: skip
    quantised = time.perf_counter()
    table = verify_onnx(folder / "steps.onnx")
    verified = time.perf_counter()
    report = build_engine(
        folder / "steps.onnx", folder / "steps.engine", shape_of(network), (1, 8, 8)
    )
    built = time.perf_counter()
    eligible = table[table.eligible]
    return {
        "quantise_seconds": round(quantised - start, 1),
        "verify_seconds": round(verified - quantised, 1),
        "build_seconds": round(built - verified, 1),
        "total_seconds": round(built - start, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "eligible": len(eligible),
        "eligible_2to4": int(eligible.is_2to4.sum()),
        "all_judged": bool(table.judged.all()),
        "builder": str(report),
    }


def make_files(network: str, folder: Path) -> None:
    """Write the files of a network into a folder, unless they are there."""
    if not (folder / "wide.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        export(network, folder)
        quantise(network, folder)


def measure(network: str, parts: list[str], seconds: float, folder: Path) -> dict[str, Any]:
    """Return what was asked of one network."""
    make_files(network, folder)
    found: dict[str, Any] = {}
    if "accuracy" in parts and network == QUICK:
        found["accuracy"] = measure_accuracy(folder)
    if "sizes" in parts:
        found["sizes"] = measure_sizes(folder)
    if "latency" in parts:
        found["latency"] = [
            measure_latency(network, batch, folder, seconds) for batch in BATCHES[network]
        ]
    if "steps" in parts:
        # In a process of its own: the peak of memory is that of these steps alone.
        code = f"import int8, pathlib; int8.print_steps({network!r}, pathlib.Path({str(folder)!r}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            text=True,
            check=True,
            stdout=subprocess.PIPE,
        )
        found["steps"] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_steps(network: str, folder: Path) -> None:
    """Print the result of `measure_steps` as JSON."""
    print(json.dumps(measure_steps(network, folder)))


def main(
    out: Annotated[Path, typer.Option(help="the file to write")] = RESULT,
    networks: Annotated[list[str], typer.Option(help="which")] = list(BATCHES),  # noqa: B006
    parts: Annotated[list[str], typer.Option(help="what")] = PARTS,
    seconds: Annotated[float, typer.Option(help="to measure each file, at least")] = 3.0,
    work: Annotated[Path | None, typer.Option(help="a folder to keep the ONNX files in")] = None,
) -> None:
    """Measure and add the results to a file."""
    record = json.loads(out.read_text()) if out.exists() else {}
    results = record.get("networks", {})
    with tempfile.TemporaryDirectory() as temporary:
        for network in networks:
            folder = (work or Path(temporary)).resolve() / network
            found = measure(network, parts, seconds, folder)
            results[network] = results.get(network, {}) | found
            what = "INT8 files of 2:4 networks on a CPU; see benchmarks/int8.py"
            write_json(out, {"what": what, **machine.provenance(), "networks": results})
            print(f"{network}: {', '.join(found) or 'files'}")


if __name__ == "__main__":
    typer.run(main)
