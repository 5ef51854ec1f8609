"""Run the notebooks in order, and sum up what they left behind.

What `make tutorial` and `make notebooks` call.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from hashlib import sha256 as digest
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from helpers import contenders, engine, machine
from helpers.artifacts import NETWORKS, NOTEBOOKS, Artifacts, atomic_write, write_json
from helpers.benchmark import Ratio, perf_per_watt, speedup
from helpers.checks import TutorialError
from helpers.runners import Runner
from helpers.settings import Settings, project_root
from helpers.training import Accuracy


def check_setup(settings: Settings) -> None:
    """Print what the tutorial finds on this machine, and record it for the next steps."""
    for fine, line in machine.setup_report(settings):
        print(f"[{'OK' if fine else 'FAIL'}] {line}")
    builder = engine.find_builder()
    print(f"[OK] engines: {builder.name} {builder.version} ({builder.why})")
    for kind, reason in contenders.reasons_against().items():
        print(f"[{'--' if reason else 'OK'}] inference with {kind}" + f": {reason}" * bool(reason))
    with Artifacts(settings).writing("00_setup.json") as path:
        write_json(path, {"machine": machine.describe(), "builder": builder.name})


def source_digest(cells: Sequence[Any]) -> str:
    """Return a checksum over the code of a notebook, to tell outputs of another source."""
    code = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return digest(code.encode()).hexdigest()


def run_notebooks(settings: Settings, save: bool = False) -> None:
    """Run every notebook from top to bottom, one after the other.

    Args:
        settings: the preset; its artifacts folder receives executed copies.
        save: write the outputs into `notebooks/` as well, without progress bars.

    Raises:
        TutorialError: Jupyter is not installed, or a cell failed.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, DeadKernelError
        from traitlets.config import Config
    except ImportError as error:
        raise TutorialError(
            f"Notebooks cannot be run here ({error}). Install the project with its notebooks: "
            "pip install -e '.[notebooks]'. `python -m helpers` runs the same steps without them."
        ) from error
    folder = project_root() / "notebooks"
    os.environ["TUTORIAL_PRESET"] = settings.preset
    for name in tqdm(NOTEBOOKS.values(), desc="notebooks"):
        notebook = nbformat.read(folder / name, as_version=4)
        with tempfile.TemporaryDirectory() as sockets:
            # Sockets in a private folder: over TCP anybody on the machine could listen.
            ipc = Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")})
            client = NotebookClient(
                notebook, config=ipc, timeout=None, resources={"metadata": {"path": folder}}
            )
            try:
                client.execute()
            except CellExecutionError as error:
                raise TutorialError(f"{name} stopped: {error.ename}: {error.evalue}") from error
            except DeadKernelError as error:
                raise TutorialError(
                    f"{name} stopped: its kernel died, as it does when the memory runs out."
                ) from error
        tidy(notebook)
        targets = [settings.artifacts_dir / "notebooks" / name]
        for target in targets + [folder / name] * save:
            with atomic_write(target) as part:
                nbformat.write(notebook, part)


def tidy(notebook: Any) -> None:
    """Drop from an executed notebook what only made sense while it ran, in place.

    That is: progress bars, timings of the cells, the kernel's version. The checksum of
    the code is recorded, so that a test can tell outputs of an older source.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "tutorial": {"source_sha256": source_digest(notebook.cells)},
    }


def save_benchmark(
    artifacts: Artifacts, runners: dict[str, Runner], table: pd.DataFrame, kind: str | None = None
) -> Path:
    """Write the measured table as JSON, with date, machine and versions.

    Args:
        artifacts: where it goes.
        runners: what was measured.
        table: as `helpers.benchmark.sweep` returns it.
        kind: of the runners, as `helpers.contenders.find_runners` took it.
    """
    content = {
        "runner": runners["sparse"].name,
        **machine.provenance(),
        "rows": table.to_dict("records"),
    }
    parents = list(contenders.network_files(kind).values())
    with artifacts.writing("06_benchmark.json", parents) as path:
        write_json(path, content)
    return artifacts.path("06_benchmark.json")


def summary(settings: Settings) -> dict[str, str]:
    """Return the key figures of the last run, from the sidecars of its artifacts.

    Raises:
        ArtifactError: a step has not been run; names its notebook.
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
        gaps = [artifacts.facts(f"04_{name}_{precision}.onnx")["gap"] for name in NETWORKS]
        rows[f"ONNX gap to PyTorch, {precision.upper()}"] = f"{max(gaps):.1e} of the largest logit"
    for name in NETWORKS:
        built = artifacts.facts(f"05_{name}.engine")
        rows[f"engine, {name}"] = (
            f"{built['megabytes']:.2f} MB, {built['builder']} {built['version']}, {built['target']}"
        )
    benchmark = json.loads(artifacts.require("06_benchmark.json").read_text())
    rows["measured with"] = benchmark["runner"]
    return rows | _gains(pd.DataFrame(benchmark["rows"]))


def _gains(table: pd.DataFrame) -> dict[str, str]:
    """Return, for each batch size, what sparse gains, beside what chance alone gives."""
    measures = {"latency p50": ("p50", " ms", speedup)}
    if "images_per_joule" in table:
        measures["images per joule"] = ("images_per_joule", "", perf_per_watt)
    rows = {}
    for label, (column, unit, compare) in measures.items():
        values = table.pivot(index="batch", columns="network", values=column)
        gains, chances = compare(table), compare(table, other="dense again")
        for batch, own in values.dropna().iterrows():  # energy may be missing at a batch
            gain, chance = (Ratio(*ratios.loc[batch]) for ratios in (gains, chances))
            rows[f"{label}, batch {batch}"] = (
                f"dense {own['dense']:.2f}{unit}, sparse {own['sparse']:.2f}{unit}: "
                f"{gain} (dense against itself {chance})"
            )
    return rows


def record(settings: Settings) -> Path:
    """Write the figures of the last run to `data/reference/`, with their provenance.

    Notebook 06 shows them beside the reader's own, and the README's table is made of them.
    """
    benchmark = json.loads(Artifacts(settings).require("06_benchmark.json").read_text())
    where = "gpu" if machine.gpu() else "cpu"
    return write_json(
        settings.data_dir / "reference" / f"{settings.preset}_{where}.json",
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
