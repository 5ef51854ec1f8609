"""Measure what 2:4 costs in accuracy, on nine networks of different kinds and several seeds.

Each network is small enough for a processor, and trained from the start:

- `dense`: trained.
- `pruned`: the dense model pruned 2:4 by magnitude, without retraining.
- `retrained`: the same training once more from there, with the masks held.
- `control`: the same training once more from the dense model, without masks. What retraining
  gains by its time alone, the control gains too: retrained is compared with it.
- `half_inputs`: the same training once more with the same two of every four inputs removed for
  all outputs, which are as many weights. This must hurt. Where it does not, the task is too easy
  to tell anything about 2:4, and the row says so.

Differences are paired by seed, and their 95 % intervals are over the seeds. A seed sets the
initial weights, the order of the examples and every random number of the training. Results are
the same again on the same machine with the same versions and one thread for each process.

A row is written when its network and seed are done, and a run continues where an earlier one
stopped, whatever stopped it:

    python benchmarks/accuracy.py --processes 2
    python benchmarks/accuracy.py --table
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from accuracy_tasks import TASKS
from accuracy_tasks.record import Record, Row, run_missing
from accuracy_tasks.task import ARMS, run
from helpers.errors import InputError
from helpers.metrics import PairedDifference, paired_difference

RESULT = Path(__file__).parent / "results" / "accuracy.json"
PUBLISHED = Path(__file__).parents[1] / "data" / "reference" / "case_study.json"
LOWER_IS_BETTER = {"loss"}

ABOUT = {
    "what": "accuracy of small networks: dense, pruned 2:4, retrained, and two controls; a row for "
    "each network, metric and seed; seconds of processor time for all of it",
    "command": "python benchmarks/accuracy.py",
}


def summary(rows: list[Row]) -> pd.DataFrame:
    """Return a line for each network and metric: means over the seeds, differences, verdict.

    The differences are to the control, paired by seed, each with its interval.
    """
    lines = []
    for (network, metric), group in pd.DataFrame(rows).groupby(["network", "metric"], sort=False):
        control = group["control"].tolist()
        cost = paired_difference(control, group["retrained"].tolist())
        failing = paired_difference(control, group["half_inputs"].tolist())
        lines.append(
            {
                "network": network,
                "metric": metric,
                "seeds": len(group),
                **{arm: group[arm].mean() for arm in ARMS},
                "retrained - control": cost,
                "half_inputs - control": failing,
                "verdict": verdict(cost, failing, metric in LOWER_IS_BETTER),
            }
        )
    return pd.DataFrame(lines)


def verdict(cost: PairedDifference, failing: PairedDifference, lower_is_better: bool) -> str:
    """Return what a row shows.

    Args:
        cost: retrained minus control.
        failing: half_inputs minus control.
        lower_is_better: whether a larger value is a worse one.
    """
    if not _is_worse(failing, lower_is_better):
        return "cannot tell"
    if _is_worse(cost, lower_is_better):
        return "2:4 is worse"
    return "2:4 is better" if _is_worse(cost, not lower_is_better) else "no difference found"


def _is_worse(difference: PairedDifference, lower_is_better: bool) -> bool:
    """Return whether the whole interval is on the worse side of zero."""
    return difference.low > 0 if lower_is_better else difference.high < 0


def shown(table: pd.DataFrame) -> str:
    """Return a summary as text, with two decimals and each difference in one column."""

    def interval(difference: PairedDifference) -> str:
        return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"

    differences = {name: interval for name in table.columns if " - " in name}
    return table.to_string(index=False, float_format="%.2f", formatters=differences)


def published() -> pd.DataFrame:
    """Return the published accuracies of dense and sparse networks."""
    return pd.DataFrame(json.loads(PUBLISHED.read_text())["accuracy"])


def print_table(rows: list[Row]) -> None:
    """Print what was measured here and, clearly apart, what was published."""
    if rows:
        print("Measured here; differences with 95 % intervals over seeds\n")
        print(shown(summary(rows)))
    else:
        print("Nothing is measured yet.")
    print("\nPublished, not measured here\n")
    print(published().to_string(index=False))


def main(
    only: Annotated[list[str], typer.Option(help="pattern of a network's name")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file for the results")] = RESULT,
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="at a time, one thread each")] = 1,
    table: Annotated[bool, typer.Option("--table", help="only print what the file has")] = False,
) -> None:
    """Train the networks of the study, and print the table of their accuracies."""
    tasks = [
        task for task in TASKS if any(fnmatchcase(task.network, each) for each in only or ["*"])
    ]
    if not tasks:
        names = ", ".join(task.network for task in TASKS)
        raise typer.BadParameter(f"No network fits {', '.join(only)}. There are {names}.")
    try:
        record = Record.open(out, ABOUT)
        if table:
            print_table(record.rows)
            return
        record.require_same_versions()
        jobs = record.missing(tasks, seeds)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    run_missing(record, run, jobs, processes)
    print_table(record.rows)


if __name__ == "__main__":
    typer.run(main)
