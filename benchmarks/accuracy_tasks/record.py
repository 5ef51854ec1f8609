"""The rows of a study in a file, and the running of what is not in it yet."""

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accuracy_tasks import TASKS
from accuracy_tasks.images import all_images
from accuracy_tasks.task import Task
from helpers import machine
from helpers.errors import InputError
from helpers.files import write_json

Row = dict[str, Any]
Job = tuple[Task, int]  # a network and a seed


@dataclass
class Record:
    """Rows of networks and seeds, in the file and here.

    `about` are the entries of the file that say what it is; `settings` those of each network.
    """

    path: Path
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=machine.versions)

    @classmethod
    def open(cls, path: Path, about: dict[str, Any]) -> "Record":
        """Return what earlier runs left in a file; an empty record if there is none.

        Raises:
            InputError: the file holds something else.
        """
        if not path.exists():
            return cls(path, about)
        try:
            earlier = json.loads(path.read_text())
            rows, settings = list(earlier["rows"]), dict(earlier["settings"])
            return cls(path, about, rows, settings, dict(earlier["versions"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path.name} does not hold a record of this script ({error}). Delete it, or "
                "pass another file as --out."
            ) from error

    def require_same_versions(self) -> None:
        """Raise an error if the rows were made with other versions than there are now."""
        if self.versions != machine.versions():
            raise InputError(
                f"{self.path.name} was made with other versions of Python or its packages, and its "
                "rows cannot be compared with new ones. Pass another file as --out."
            )

    def missing(self, tasks: list[Task], seeds: int) -> list[Job]:
        """Return the networks and seeds that have no rows yet, seed by seed.

        Raises:
            InputError: a network has rows of another recipe, model or number of examples.
        """
        for task in tasks:
            if self.settings.get(task.network, task.settings()) != task.settings():
                raise InputError(
                    f"{self.path.name} has rows of {task.network} with other settings. Pass "
                    "another file as --out."
                )
        done = {(row["network"], row["seed"]) for row in self.rows}
        # Seed by seed: a run that is stopped early leaves whole seeds.
        jobs = [(task, seed) for seed in range(seeds) for task in tasks]
        return [(task, seed) for task, seed in jobs if (task.network, seed) not in done]

    def add(self, task: Task, rows: list[Row]) -> None:
        """Write the rows of a network and seed."""
        order = {each.network: place for place, each in enumerate(TASKS)}
        self.rows = sorted(
            [*self.rows, *rows],
            key=lambda row: (order.get(row["network"], len(order)), row["seed"]),
        )
        self.settings[task.network] = task.settings()
        write_json(
            self.path,
            {
                **self.about,
                **machine.provenance(),
                "settings": self.settings,
                "rows": self.rows,
            },
        )


def run_missing(
    record: Record, work: Callable[[Task, int], list[Row]], jobs: list[Job], processes: int
) -> None:
    """Run networks with seeds, record each when it is done, and print its rows.

    Each process computes in one thread: more are slower when several processes run.

    Args:
        record: where the rows go.
        work: returns the rows of a network and seed; a function of a module.
        jobs: what to run.
        processes: how many to run at a time, if more than one each in a process of its own.
    """

    def finish(task: Task, rows: list[Row]) -> None:
        record.add(task, rows)
        for row in rows:
            print(json.dumps(row), flush=True)

    if processes == 1:
        one_thread()
        for task, seed in jobs:
            finish(task, work(task, seed))
        return
    all_images()  # unpacks the files, before several processes want them
    # A new process for each job: one that outlives a killed parent ends with its job.
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), one_thread, max_tasks_per_child=1
    ) as pool:
        running = {pool.submit(work, task, seed): task for task, seed in jobs}
        try:
            for future in as_completed(running):
                finish(running[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, start nothing more


def one_thread() -> None:
    """Let this process compute in one thread."""
    torch.set_num_threads(1)
