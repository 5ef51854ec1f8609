"""The steps of the case study as functions: what `python -m helpers` does without Jupyter.

The step of retraining is in `retrain`.

Each takes the artifacts of the step before it and leaves those that its notebook leaves.
"""

import json
import time
from collections.abc import Callable

import torch

from helpers import machine, metrics
from helpers.files import atomic_write, sha256, write_json
from helpers.inference.activation_ranges import activation_ranges
from helpers.inference.engine import build_engine
from helpers.inference.export import export_onnx
from helpers.inference.quantization import (
    QuantizedFile,
    quantize_for_cpu,
    quantize_for_tensorrt,
)
from helpers.inference.runners import OnnxRunner
from helpers.measurement.benchmark import sweep
from helpers.sparsity import prune_2to4_, sparsity_report
from helpers.sparsity.verify import verify_onnx
from helpers.training import loop, networks
from helpers.training.data import first_images
from helpers.tutorial import inputs
from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.backends import find_controls, find_runners
from helpers.tutorial.checks import check
from helpers.tutorial.settings import Settings, relative
from helpers.tutorial.summary import describe_gain, save_benchmark

CALIBRATION_IMAGES = 512


def evaluate(settings: Settings, known: metrics.Accuracy | None = None) -> None:
    """Measure the accuracy of the pretrained dense network, and keep both (notebook 01).

    An accuracy that is known is not measured again.
    """
    dense = inputs.load_pretrained(settings)
    accuracy = known or loop.evaluate(dense, inputs.load_splits(settings).test)
    with Artifacts(settings).writing("01_dense.safetensors", facts={"test": accuracy}) as path:
        networks.save_checkpoint(dense, path, settings.model)
    print(f"dense: {accuracy}")


def prune(settings: Settings, rules: str, known: metrics.Accuracy | None = None) -> None:
    """Prune the dense network 2:4 by magnitude (notebook 02).

    An accuracy that is known is not measured again.
    """
    artifacts = Artifacts(settings)
    model = networks.load_checkpoint(artifacts.require("01_dense.safetensors"))
    masks = prune_2to4_(model, rules)
    accuracy = known or loop.evaluate(model, inputs.load_splits(settings).test)
    report = sparsity_report(model, settings.image_shape, rules=rules)
    facts = {"test": accuracy, **report.facts()}
    with artifacts.writing("02_pruned.safetensors", ["01_dense.safetensors"], facts) as path:
        networks.save_checkpoint(model, path, settings.model)
    print(f"pruned, {len(masks)} layers: {accuracy}")


def export(settings: Settings) -> None:
    """Export dense and sparse networks to ONNX, FP32 and FP16 (notebook 04)."""
    artifacts = Artifacts(settings)
    images, _ = first_images(inputs.load_splits(settings).test, 500)
    for name, parent in NETWORKS.items():
        model = networks.load_checkpoint(artifacts.require(parent))
        with torch.inference_mode():
            reference = model(images)
        for precision in ("fp32", "fp16"):
            facts: dict[str, float] = {}
            file = f"04_{name}_{precision}.onnx"
            with artifacts.writing(file, [parent], facts) as path:
                export_onnx(model, path, settings.image_shape, precision == "fp16")
                error = metrics.max_relative_error(OnnxRunner(path)(images), reference)
                facts["max_relative_error"] = error
            print(f"{file}: maximum relative error against PyTorch {error:.1e}")
    table = verify_onnx(artifacts.path("04_sparse_fp16.onnx"))
    eligible = table[table.eligible]
    check(table.judged.all(), "every product of the ONNX file was judged")
    check(eligible.is_2to4.all(), f"all {len(eligible)} eligible weights of the ONNX file are 2:4")


def quantize(settings: Settings) -> None:
    """Write the exported networks in INT8, for TensorRT and for the CPU (notebook 08)."""
    artifacts = Artifacts(settings)
    images, _ = first_images(inputs.load_splits(settings).validation, CALIBRATION_IMAGES)
    for name in NETWORKS:
        full, half = (f"04_{name}_{precision}.onnx" for precision in ("fp32", "fp16"))
        ranges = activation_ranges(artifacts.require(full), images)
        works: tuple[tuple[str, str, Callable[..., QuantizedFile]], ...] = (
            (f"08_{name}_int8.onnx", half, quantize_for_tensorrt),
            (f"08_{name}_int8_cpu.onnx", full, quantize_for_cpu),
        )
        for file, parent, work in works:
            facts: dict[str, object] = {}
            source = artifacts.require(parent)
            with artifacts.writing(file, [parent], facts) as path:
                written = work(source, path, ranges, expect_sparse=name == "sparse")
                facts.update(written.facts())
            print(f"{file}: {written}")


def build(settings: Settings, compute_capability: str | None) -> None:
    """Build an engine from the dense and from the sparse ONNX file (notebook 05)."""
    artifacts = Artifacts(settings)
    sizes = settings.batch_sizes
    profile = (min(sizes), settings.best_batch_size, max(sizes))
    for name in NETWORKS:
        facts: dict[str, object] = {}
        parent = f"04_{name}_fp16.onnx"
        with artifacts.writing(f"05_{name}.engine", [parent], facts) as path:
            report = build_engine(
                artifacts.path(parent),
                path,
                settings.image_shape,
                profile,
                compute_capability=compute_capability,
            )
            facts.update(report.facts())
        print(f"{name}: {report}")


def benchmark(settings: Settings) -> None:
    """Measure dense, sparse and the controls side by side over batch sizes (notebook 06)."""
    from helpers.tutorial import plots  # here, since no other step draws

    artifacts = Artifacts(settings)
    runners = find_runners(artifacts) | find_controls(artifacts)
    table = sweep(
        runners, settings.image_shape, settings.batch_sizes, settings.seconds_per_batch_size
    )
    path = save_benchmark(artifacts, runners, table)
    figure = plots.plot_sweep(table, runners["sparse"].name)
    plots.save(figure, artifacts.figures / "06_benchmark.png")
    figure = plots.plot_case_study(json.loads(path.read_text()))
    plots.save(figure, artifacts.figures / "06_case_study.png")
    print(table.round(2).to_string(index=False))
    print(describe_gain(table))


def pretrain(settings: Settings) -> None:
    """Train the dense checkpoint that notebook 01 loads, and write its card."""
    splits = inputs.load_splits(settings)
    torch.manual_seed(settings.seed)
    model = networks.create_model(settings.model, settings.num_classes)
    start = time.perf_counter()
    history = loop.train(model, splits, settings.recipe, settings.seed)
    minutes = (time.perf_counter() - start) / 60
    accuracy = loop.evaluate(model, splits.test)
    path = inputs.pretrained_path(settings)
    with atomic_write(path) as part:
        networks.save_checkpoint(model, part, settings.model)
    card = {
        "command": "python -m helpers pretrain",
        "sha256": sha256(path),
        "seed": settings.seed,
        "minutes": round(minutes, 1),
        "test": accuracy,
        "recipe": settings.recipe,
        "history": history,
        **machine.provenance(),
    }
    write_json(path.with_suffix(".json"), card)
    print(f"{relative(path)}: {accuracy}, trained in {minutes:.1f} minutes")


def dense_control(settings: Settings) -> None:
    """Train the dense network a second time, compare the retrained one with it, record both."""
    retrained = networks.load_checkpoint(Artifacts(settings).require("03_retrained.safetensors"))
    splits = inputs.load_splits(settings)
    model = inputs.load_pretrained(settings)
    history = loop.train(model, splits, settings.recipe, settings.seed)
    accuracy = loop.evaluate(model, splits.test)
    comparison = loop.compare(model, retrained, splits.test)
    record = {
        "command": "python -m helpers dense-control",
        "test": accuracy,
        "retrained_against_it": comparison,
        "history": history,
        **machine.provenance(),
    }
    write_json(settings.data_dir / "reference" / "quick_dense_control.json", record)
    print(f"dense, trained twice: {accuracy}")
    print(f"the sparse network against it: {comparison}")
