"""The key figures of the last run, from what the notebooks left behind."""

import json
import os
from pathlib import Path

import pandas as pd

from helpers import machine
from helpers.files import write_json
from helpers.inference.engine import why_no_builder
from helpers.inference.runners import Runner
from helpers.measurement.benchmark import Ratio, perf_per_watt_by_batch, speedup_by_batch
from helpers.metrics import Accuracy
from helpers.tutorial import backends
from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.settings import Settings


def save_benchmark(
    artifacts: Artifacts,
    runners: dict[str, Runner],
    table: pd.DataFrame,
    backend: str | None = None,
) -> Path:
    """Write the measured table as JSON, with date, machine and versions.

    Args:
        artifacts: where it goes.
        runners: what was measured.
        table: as `helpers.measurement.benchmark.sweep` returns it.
        backend: of the runners, as `helpers.tutorial.backends.find_runners` took it.
    """
    content = {
        "runner": runners["sparse"].name,
        "dense_runner": runners["dense"].name,
        **machine.provenance(),
        "rows": table.to_dict("records"),
    }
    parents = list(backends.network_files(backend).values())
    with artifacts.writing("06_benchmark.json", parents) as path:
        write_json(path, content)
    return artifacts.path("06_benchmark.json")


def summary(settings: Settings) -> dict[str, str]:
    """Return the key figures of the last run, from the sidecars of its artifacts.

    Raises:
        ArtifactError: a step has not been run; the message names its notebook.
    """
    artifacts = Artifacts(settings)
    tests = {
        name: Accuracy(**artifacts.facts(file)["test"])
        for name, file in (
            ("dense", "01_dense.safetensors"),
            ("pruned", "02_pruned.safetensors"),
            ("retrained", "03_retrained.safetensors"),
        )
    }
    rows = {f"{name}, test top-1": str(result) for name, result in tests.items()}
    pruning = artifacts.facts("02_pruned.safetensors")
    rows["sparse layers"] = (
        f"{pruning['sparse_layers']} of {pruning['layers']}, with "
        f"{pruning['parameters_share']:.2f} % of the parameters and "
        f"{pruning['macs_share']:.2f} % of the MACs"
    )
    for precision in ("fp32", "fp16"):
        errors = [
            artifacts.facts(f"04_{name}_{precision}.onnx")["max_relative_error"]
            for name in NETWORKS
        ]
        rows[f"ONNX against PyTorch, {precision.upper()}"] = (
            f"{max(errors):.1e} of the largest logit"
        )
    for name in NETWORKS:
        file = f"05_{name}.engine"
        if not artifacts.path(file).exists() and why_no_builder():
            rows[f"engine, {name}"] = "none: no engine builder loads here"
            continue
        built = artifacts.facts(file)
        rows[f"engine, {name}"] = (
            f"{built['megabytes']:.2f} MB, {built['builder']} {built['version']}, "
            f"{built['built_for']}"
        )
    benchmark = json.loads(artifacts.require("06_benchmark.json").read_text())
    rows["measured with"] = benchmark["runner"]
    if benchmark["dense_runner"] != benchmark["runner"]:
        rows["measured with"] += f"; dense: {benchmark['dense_runner']}"
    return rows | _gain_rows(pd.DataFrame(benchmark["rows"]))


def _gain_rows(table: pd.DataFrame) -> dict[str, str]:
    """Return, for each batch size, what sparse gains, beside what the controls show."""
    measures = {"latency p50": ("p50", " ms", speedup_by_batch)}
    if "images_per_joule" in table:
        measures["images per joule"] = ("images_per_joule", "", perf_per_watt_by_batch)
    controls = {"dense against itself": backends.DENSE_AGAIN}
    if backends.TWIN in set(table.network):
        controls["dense twin"] = backends.TWIN
    rows = {}
    for label, (column, unit, compare) in measures.items():
        values = table.pivot(index="batch", columns="network", values=column)
        gains = compare(table)
        others = {name: compare(table, other=network) for name, network in controls.items()}
        for batch, own in values.dropna().iterrows():  # energy may be missing at a batch
            beside = [f"{name} {Ratio(**other.loc[batch])}" for name, other in others.items()]
            rows[f"{label}, batch {batch}"] = (
                f"dense {own['dense']:.2f}{unit}, sparse {own['sparse']:.2f}{unit}: "
                f"{Ratio(**gains.loc[batch])} ({', '.join(beside)})"
            )
    return rows


def describe_gain(table: pd.DataFrame) -> str:
    """Return in a few sentences at which batch sizes the sparse model is faster.

    A difference counts if its 95 % interval lies beyond 1 and beyond that of the dense model
    against itself. Where sparse is faster and the dense twin was measured, the last sentence
    compares the two.

    Args:
        table: as `helpers.measurement.benchmark.sweep` returns it, with `dense again`.
    """
    gains = speedup_by_batch(table)
    chances = speedup_by_batch(table, backends.DENSE_AGAIN)
    faster = gains[gains.low > chances.high.clip(lower=1)]
    slower = gains[gains.high < chances.low.clip(upper=1)]
    unclear = gains.drop([*faster.index, *slower.index])
    sentences = []
    if faster.empty:
        sentences.append("The speed-up does not show on this machine.")
    else:
        sentences.append(f"Sparse is faster than dense: {_listed(faster)}.")
    if not slower.empty:
        sentences.append(f"Sparse is slower than dense: {_listed(slower)}.")
    if not unclear.empty:
        sentences.append(f"No difference is clear of chance: {_listed(unclear)}.")
    if backends.TWIN in set(table.network) and not faster.empty:
        # Elsewhere the sparse runner may have run the dense model, which skips no zeros.
        twins = speedup_by_batch(table, backends.TWIN).loc[faster.index]
        skipped = faster[["value"]] / twins[["value"]]
        sentences.append(f"Skipping the zeros buys, over the dense twin: {_listed(skipped)}.")
    return " ".join(sentences)


def _listed(ratios: pd.DataFrame) -> str:
    return ", ".join(f"{value:.2f}x at batch {batch}" for batch, value in ratios.value.items())


def save_reference(settings: Settings) -> Path:
    """Write the figures of the last run to `data/reference/`, with their provenance.

    Notebook 06 shows them beside the reader's own, and the README's table quotes them.
    """
    benchmark = json.loads(Artifacts(settings).require("06_benchmark.json").read_text())
    device = "gpu" if machine.gpu() else "cpu"
    return write_json(
        settings.data_dir / "reference" / f"{settings.preset}_{device}.json",
        {"summary": summary(settings), "benchmark": benchmark, **machine.provenance()},
    )


def print_summary(settings: Settings) -> None:
    """Print the key figures of the last run and where its files are."""
    artifacts = Artifacts(settings)
    for name, value in summary(settings).items():
        print(f"{name:26} {value}")
    print(f"\nresults  {os.path.relpath(artifacts.folder)}")
    for figure in sorted(artifacts.figures.glob("*.png")):
        print(f"figure   {os.path.relpath(figure)}")
