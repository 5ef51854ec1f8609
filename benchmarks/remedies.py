"""Try what helps where a 2:4 network stays behind its control in the study of `accuracy.py`.

It takes the networks that are worse there, the whole interval of retrained minus control, and
retrains each of them, from the same dense models:

- `longer`: for twice as many steps; `control, longer` trains the dense network on for as long;
- `distilled`: half from the labels and half from the outputs of the dense network;
- `permuted`: after a channel permutation that keeps more of the magnitude.

Scores are compared with those of the control in the record of `accuracy.py`, paired by seed. A row
is written when its network and seed are done, and a run continues where an earlier one stopped:

    python benchmarks/remedies.py --processes 2
    python benchmarks/remedies.py --table
"""

import copy
import time
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import nn

import accuracy
from accuracy_tasks import TASKS, images
from accuracy_tasks.record import Record, Row, run_missing
from accuracy_tasks.task import Data, Task, score, train
from helpers.errors import InputError
from helpers.metrics import paired_difference
from retraining import Variant, distilled, magnitude, permuted, retrained

RESULT = Path(__file__).parent / "results" / "remedies.json"
ABOUT = {
    "what": "accuracy of the networks that 2:4 makes worse in accuracy.json, retrained in other "
    "ways; a row for each network, metric, seed and variant; seconds of processor time",
    "command": "python benchmarks/remedies.py",
}
LONGER, CONTROL_LONGER = "longer", "control, longer"
# Where the logits do not have their classes in dimension 1; None: the network returns no logits.
CLASSES = {"small Transformer": -1, "small SSD": None}


def control_longer(task: Task, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float]:
    """Train the dense model on for twice as many steps, without masks."""
    return train(task, model, data, seed, 1, share=2.0), 100.0


def variants(task: Task) -> dict[str, Variant]:
    """Return what can be tried with a network, by name."""
    chosen: dict[str, Variant] = {
        LONGER: retrained(share=2.0),
        CONTROL_LONGER: control_longer,
    }
    classes = CLASSES.get(task.network, 1)
    if classes is not None:
        chosen["distilled"] = partial(distilled, classes=classes)
    if task.load_data is images.first_images:  # a permutation follows one image through the model
        chosen["permuted"] = retrained(permuted(magnitude))
    return chosen


def run(task: Task, seed: int) -> list[Row]:
    """Train a dense model as `accuracy.py` does, and retrain it in each variant."""
    data = task.data()
    torch.manual_seed(seed)
    dense = train(task, task.make_model(), data, seed, phase=0)
    rows = []
    for name, variant in variants(task).items():
        started = time.process_time()
        model, kept = variant(task, copy.deepcopy(dense), data, seed)
        rows += [
            {
                "network": task.network, "metric": metric, "seed": seed, "variant": name,
                "score": round(value, 4), "kept": round(kept, 2),
                "seconds": round(time.process_time() - started),
            }
            for metric, value in score(task, model, data).items()
        ]  # fmt: skip
    return rows


def worse(study: Record) -> set[str]:
    """Return the networks that 2:4 makes worse, by any of their metrics."""
    if not study.rows:
        raise InputError(f"{study.path.name} has no rows. Run benchmarks/accuracy.py first.")
    table = accuracy.summary(study.rows)
    return set(table[table.verdict == "2:4 is worse"].network)


def summary(rows: list[Row], study: list[Row]) -> pd.DataFrame:
    """Return a line for each network, metric and variant, with its difference to the control.

    Args:
        rows: of this script.
        study: of `accuracy.py`, with all seeds of `rows`.
    """
    controls = {(row["network"], row["metric"], row["seed"]): row["control"] for row in study}
    lines = []
    for key, group in pd.DataFrame(rows).groupby(["network", "metric"], sort=False):
        scores = group.pivot_table("score", "seed", "variant", sort=False)
        control = [controls[*key, seed] for seed in scores.index]
        for variant, found in scores.items():
            lines.append(
                {
                    "network": key[0], "metric": key[1], "variant": variant,
                    "seeds": len(found), "score": found.mean(),
                    "variant - control": paired_difference(control, found.tolist()),
                    "variant - control, longer": paired_difference(
                        scores[CONTROL_LONGER].tolist(), found.tolist()
                    ),
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def main(
    only: Annotated[list[str], typer.Option(help="pattern of a network's name")] = [],  # noqa: B006
    study: Annotated[Path, typer.Option(help="the record of accuracy.py")] = accuracy.RESULT,
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file for the results")] = RESULT,
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="at a time, one thread each")] = 1,
    table: Annotated[bool, typer.Option("--table", help="only print what the file has")] = False,
) -> None:
    """Retrain the networks that 2:4 makes worse in other ways, and print the table."""
    try:
        recorded = Record.open(study, accuracy.ABOUT)
        names = worse(recorded)
        record = Record.open(out, ABOUT)
        tasks = [
            task
            for task in TASKS
            if task.network in names
            and any(fnmatchcase(task.network, pattern) for pattern in only or ["*"])
        ]
        if not table:
            recorded.require_same_versions()
            recorded.missing(tasks, 0)  # refuses other settings
            record.require_same_versions()
            run_missing(record, run, record.missing(tasks, seeds), processes)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    if not record.rows:
        print(f"Nothing is measured. Worse by {study.name}: {', '.join(sorted(names)) or 'none'}.")
        return
    print(accuracy.shown(summary(record.rows, recorded.rows)))


if __name__ == "__main__":
    typer.run(main)
