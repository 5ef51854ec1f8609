"""Take networks that nobody here wrote through every step, and check each by an oracle.

Networks of timm, transformers, ultralytics, diffusers and segmentation_models_pytorch with
random weights, in the smallest sizes. Each is reported on, permuted, pruned, trained for two
steps with its masks held, saved compressed, verified, exported to ONNX, and its file verified.
`product_oracle.py` finds by its own means which numbers are multiplied, in PyTorch and in the
file; `network_steps.py` compares. Each network runs in a process of its own, with limits of
processor time and memory. The verdicts:

- `ok`: done, and the oracle agrees.
- `refused`: an error of ours, in one sentence that says why.
- `cannot`: the network or PyTorch cannot do this, with or without us.
- `skipped`: an earlier step left nothing to do.
- `limit`: out of time or memory.
- `raw error`, `false PASS`, `false FAIL`, `wrong`: faults of this project.

A network is written when it is done. A later run into the same file tries only those that are
not in it; `--again` tries them anew. The networks' packages are installed for this benchmark
only, into the project's environment:

    pip install -r benchmarks/networks.txt
    python benchmarks/networks.py --only "timm/*vit*" --jobs 2
"""

import json
import multiprocessing
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Any

import pandas as pd
import typer

import network_steps
from helpers import machine
from helpers.errors import InputError
from helpers.files import write_json
from network_catalogue import Network, catalogue
from network_steps import FAULTS, LIMIT, RAW_ERROR, SKIPPED, STEPS
from records import earlier_lists

RESULT = Path(__file__).parent / "results" / "networks.json"
# What the steps import; all that is slow to import.
SLOW = (
    "network_steps", "helpers.sparsity.compiled", "helpers.sparsity.onnx_weights",
    "helpers.sparsity.permute", "networkx", "onnxscript", "pandas", "torch._inductor.decomposition",
    "torch.export", "torch.onnx._internal.exporter._compat",
)  # fmt: skip
PACKAGES = ("timm", "transformers", "ultralytics", "diffusers", "segmentation_models_pytorch")


@dataclass
class Record:
    """The rows, in the file and here."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "Record":
        """Return what earlier runs on this machine, with these versions, left in a file."""
        return cls(path, *earlier_lists(path, ["rows"], *PACKAGES))

    def has(self, network: Network) -> bool:
        return any(_is_of(row, network) for row in self.rows)

    def replace(self, network: Network, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a network in place of its earlier ones."""
        self.rows = [row for row in self.rows if not _is_of(row, network)] + rows
        order = {(each.library, each.name): place for place, each in enumerate(catalogue())}
        self.rows.sort(key=lambda row: order.get((row["library"], row["network"]), len(order)))
        write_json(
            self.path,
            {
                "what": "networks with random weights through every step; each verdict is checked "
                "by an oracle that looks at the numbers that are multiplied",
                "command": "python benchmarks/networks.py",
                **machine.provenance(*PACKAGES),
                "networks": self._sizes(),
                "faults": sum(row["verdict"] in FAULTS for row in self.rows),
                "rows": self.rows,
            },
        )

    def _sizes(self) -> dict[str, int]:
        """Return how many networks of each library there are."""
        found = {(row["library"], row["network"]) for row in self.rows}
        return dict(pd.Series([library for library, _ in found]).value_counts().sort_index())


def _is_of(row: dict[str, Any], network: Network) -> bool:
    return (row["library"], row["network"]) == (network.library, network.name)


def try_apart(network: Network, seconds: int, gib: float) -> list[dict[str, Any]]:
    """Return the rows of a network, tried in a process of its own."""
    # The server has the slow imports done, and is forked for each network.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SLOW, *PACKAGES])
    with TemporaryDirectory() as folder:
        rows_file, log = Path(folder) / "rows", Path(folder) / "log"
        process = context.Process(
            target=network_steps.main, args=(str(network), rows_file, log, seconds, gib)
        )
        process.start()
        process.join()
        lines = rows_file.read_text().splitlines() if rows_file.exists() else []
        rows = [json.loads(line) for line in lines]
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    verdict, reason = _why_stopped(process.exitcode or 0, seconds, last)
    for step in [*STEPS][len(rows) :]:
        rows.append(
            {
                "library": network.library, "network": network.name, "step": step,
                "verdict": verdict, "reason": reason, "seconds": 0.0,
            }
        )  # fmt: skip
        verdict, reason = SKIPPED, "the process had ended"
    return rows


def _why_stopped(code: int, seconds: int, last: list[str]) -> tuple[str, str]:
    """Return the verdict on the step in which a process ended."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return LIMIT, f"stopped by {signal.Signals(-code).name} (limit: {seconds} s)"
    return RAW_ERROR, f"the process ended with {code}: {' '.join(last)[:300]}"


def verdicts(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return how many networks of each library got which verdict at which step."""
    table = pd.DataFrame(rows, columns=["library", "network", "step", "verdict"])
    return table.pivot_table(
        index=["library", "step"], columns="verdict", values="network", aggfunc="count",
        fill_value=0, sort=False,
    )  # fmt: skip


def main(
    only: Annotated[list[str], typer.Option(help="pattern of LIBRARY/NETWORK")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file for the results")] = RESULT,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    seconds: Annotated[int, typer.Option(min=1, help="of processor time for a network")] = 300,
    gib: Annotated[float, typer.Option(min=0.5, help="memory for a network")] = 3.0,
    again: Annotated[bool, typer.Option(help="try what the file has already, too")] = False,
) -> None:
    """Try networks of other projects in every step, and print the table of verdicts."""
    patterns = only or ["*"]
    chosen = [
        network
        for network in catalogue()
        if any(fnmatchcase(str(network), pattern) for pattern in patterns)
        and (network.library != "torchvision" or only)
    ]
    if not chosen:
        raise typer.BadParameter(f"No network fits {', '.join(patterns)}.")
    try:
        record = Record.open(out)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    lock = Lock()

    def run(network: Network) -> None:
        rows = try_apart(network, seconds, gib)
        with lock:
            record.replace(network, rows)
            shown = " ".join(f"{row['step']}: {row['verdict']}," for row in rows)
            print(f"{network}  {shown}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [each for each in chosen if again or not record.has(each)]))
    print_summary(record.rows)


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print the counts of verdicts, and every fault."""
    print(verdicts(rows).to_string())
    faults = [row for row in rows if row["verdict"] in FAULTS]
    for row in faults:
        print(f"{row['library']}/{row['network']} {row['step']}: {row['verdict']}: {row['reason']}")
    networks = {(row["library"], row["network"]) for row in rows}
    print(f"{len(networks)} networks, {len(faults)} faults")


if __name__ == "__main__":
    typer.run(main)
