"""Measure what serving costs: the models of this repository behind Triton on this machine.

The server of `helpers.serving.server`, its clients and the bare runner share the processor's cores,
and that is what is measured: a client on another machine takes nothing from the server. The bare
runner is ONNX Runtime on the same file, called in this process. Every answer of every part must
have the numbers of the bare runner, bit for bit.

- `overhead`: one client that waits for each answer, in turns with the bare runner, by batch size.
- `throughput`: several clients, in turns with the bare runner.
- `larger`: the same two for ResNet-50 with random weights, over gRPC: what serving adds to a model
  that takes tens of milliseconds.
- `curve`: latency against throughput, in closed loops and at arrival rates around the most that
  the closed loops reached.
- `locust`: the same load by locust, a load generator of other authors, over HTTP.
- `kill`: the server is killed under load (SIGKILL) and starts again.
- `soak`: arrivals at twice the rate that the server can answer, for `--minutes`: errors, waiting
  times, memory of the server's processes, and the latency afterwards.

Each part is written when it is done; later runs into the same file replace what they measure again.
Needs `pip install '.[serving]'` and the files of notebook 04. `locust` is not installed with the
project: give its program, from an environment of its own.

    python benchmarks/serving.py --parts overhead --parts throughput
    python benchmarks/serving.py --parts locust --locust /path/to/bin/locust
    python benchmarks/serving.py --parts soak --minutes 10
"""

import csv
import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
import typer

from helpers import machine
from helpers.errors import InputError
from helpers.files import write_json
from helpers.inference.export import INPUT, OUTPUT, export_onnx
from helpers.inference.runners import OnnxRunner
from helpers.measurement.benchmark import bootstrap_ratio
from helpers.serving.endpoint import Endpoint
from helpers.serving.load import (
    NOT_SENT,
    WRONG,
    ClosedLoop,
    Load,
    OpenLoop,
    compare_loads,
    load_server,
)
from helpers.serving.repository import Preprocessing, ServedModel, write_repository
from helpers.serving.server import TritonServer, free_ports, serve
from helpers.training.networks import create_model
from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.plots import PRUNED, plot_load, save
from helpers.tutorial.settings import Settings

RESULT = Path(__file__).parent / "results" / "serving.json"
LOCUSTFILE = Path(__file__).parent / "serving_locust.py"
PARTS = ("overhead", "throughput", "larger", "curve", "locust", "kill", "soak")
PROTOCOLS = ("grpc", "http")
DIFFERENT = 8  # batches of random images, which are sent in turn
# What the results are compared with.
ADDED_MS, ADDED_SHARE, KEPT_THROUGHPUT = 1.5, 1.1, 0.9
BACK_SECONDS, MEMORY_GROWTH, NORMAL_SECONDS = 15.0, 0.05, 5.0


class WrongAnswerError(RuntimeError):
    """A server answered something else than the bare runner."""


@dataclass(frozen=True)
class Served:
    """A running server, and the same models without it."""

    server: TritonServer
    runners: Mapping[str, OnnxRunner]
    image_shape: tuple[int, int, int]
    # The bare runner's answers by model and batch size, which are computed once.
    answers: dict[tuple[str, int], list[dict[str, np.ndarray]]] = field(default_factory=dict)

    def endpoint(self, model: str, protocol: str) -> Endpoint:
        """Return where a model is served."""
        grpc, http = self.server.grpc_address, self.server.http_address
        return Endpoint(model, protocol, grpc if protocol == "grpc" else http)

    def requests(self, batch: int) -> list[dict[str, np.ndarray]]:
        """Return random images as requests."""
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(DIFFERENT, batch, *self.image_shape, generator=generator).numpy()
        return [{INPUT: each} for each in images]

    def expected(self, model: str, batch: int) -> list[dict[str, np.ndarray]]:
        """Return the bare runner's answers to `requests`."""
        if (model, batch) not in self.answers:
            runner = self.runners[model]
            images = [torch.from_numpy(each[INPUT]) for each in self.requests(batch)]
            self.answers[model, batch] = [{OUTPUT: runner(each).numpy()} for each in images]
        return self.answers[model, batch]

    def load(
        self,
        model: str,
        protocol: str,
        batch: int,
        arrivals: ClosedLoop | OpenLoop,
        seconds: float,
        timeout: float = 10.0,
    ) -> Load:
        """Load a model, and check every answer.

        Raises:
            WrongAnswerError: one was wrong.
        """
        requests = self.requests(batch)
        endpoint, expected = self.endpoint(model, protocol), self.expected(model, batch)
        found = load_server(endpoint, requests, arrivals, seconds, expected, timeout=timeout)
        if WRONG in found.errors:
            raise WrongAnswerError(f"{model} over {protocol}: {found}")
        return found


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Write the repository of the current preset into a folder, and serve it."""
    settings = Settings.load()
    artifacts = Artifacts(settings)
    files = {name: artifacts.require(f"04_{name}_fp32.onnx") for name in NETWORKS}
    with served_files(files, settings.image_shape, settings.num_classes, folder) as found:
        yield found


@contextmanager
def served_files(
    files: Mapping[str, Path],
    image_shape: tuple[int, int, int],
    classes: int,
    folder: Path,
) -> Iterator[Served]:
    """Serve ONNX files, by the names of the models, from a repository in a folder."""
    channels, size, _ = image_shape
    repository = write_repository(
        folder / "repository",
        [ServedModel(name, path) for name, path in files.items()],
        image_shape,
        [str(number) for number in range(classes)],
        Preprocessing([0.5] * channels, [0.5] * channels, size, size),
    )
    runners = {name: OnnxRunner(path) for name, path in files.items()}
    with serve(repository, free_ports(), folder / "server.log") as server:
        yield Served(server, runners, image_shape)


def bare_times(work: Callable[[], object], seconds: float) -> np.ndarray:
    """Return how many milliseconds each of some seconds' calls took."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def processor_seconds(server: int | None) -> dict[str, float]:
    """Return the processor time so far of this process and of the server's, by what they do.

    Args:
        server: number of the server's process; its children run the models.
    """
    if server is None:
        raise RuntimeError("The server is not running.")

    def used(process: psutil.Process) -> float:
        times = process.cpu_times()
        return times.user + times.system

    own, parent = psutil.Process(), psutil.Process(server)
    return {
        "client": used(own),
        "server": used(parent),
        "model": sum(used(child) for child in parent.children(recursive=True)),
    }


@dataclass(frozen=True)
class Turns:
    """What `in_turns` measured."""

    bare: list[np.ndarray]  # the bare runner's times in milliseconds, round by round
    loads: list[Load]  # the server's, round by round
    processor: dict[str, float]  # milliseconds for each bare run and, by process, each request


def in_turns(
    found: Served,
    model: str,
    protocol: str,
    batch: int,
    arrivals: ClosedLoop,
    rounds: int,
    seconds: float,
) -> Turns:
    """Measure the bare runner and the server alternately."""
    images = torch.from_numpy(found.requests(batch)[0][INPUT])
    runner = found.runners[model]
    found.expected(model, batch)  # computed here, so that no load computes them
    bare, loads = [], []
    used = dict.fromkeys(("bare", "client", "server", "model"), 0.0)
    for number in range(rounds):
        turns = ("bare", "served") if number % 2 else ("served", "bare")
        for turn in turns:
            before = processor_seconds(found.server.pid)
            if turn == "bare":
                bare.append(bare_times(lambda: runner(images), seconds))
            else:
                loads.append(found.load(model, protocol, batch, arrivals, seconds))
            after = processor_seconds(found.server.pid)
            if turn == "bare":
                used["bare"] += after["client"] - before["client"]
            else:
                for process in before:
                    used[process] += after[process] - before[process]
    runs, requests = sum(map(len, bare)), sum(load.answered for load in loads)
    counts = {process: runs if process == "bare" else requests for process in used}
    processor = {process: 1000 * used[process] / counts[process] for process in used}
    return Turns(bare, loads, processor)


def measure_overhead(
    found: Served,
    batches: Sequence[int] = (1, 8, 32, 128),
    rounds: int = 6,
    seconds: float = 0.2,
    protocols: Sequence[str] = PROTOCOLS,
) -> list[dict[str, Any]]:
    """Return what one client waits longer than for the bare runner, by model and batch size."""
    rows = []
    for model in found.runners:
        for protocol in protocols:
            for batch in batches:
                turns = in_turns(found, model, protocol, batch, ClosedLoop(1), rounds, seconds)
                bare, loads = turns.bare, turns.loads
                times = [load.times for load in loads]
                ratio = bootstrap_ratio(times, bare)
                own, alone = np.median(np.concatenate(times)), np.median(np.concatenate(bare))
                rows.append(
                    {
                        "model": model,
                        "protocol": protocol,
                        "batch": batch,
                        "bare_ms": float(alone),
                        "served_ms": float(own),
                        "added_ms": float(own - alone),
                        "ratio": ratio,
                        "errors": _all_errors(loads),
                    }
                )
                print(_shown(rows[-1]), flush=True)
    return rows


def measure_throughput(
    found: Served,
    clients: Sequence[int] = (1, 4, 16),
    batch: int = 8,
    rounds: int = 6,
    seconds: float = 0.4,
    protocols: Sequence[str] = PROTOCOLS,
) -> list[dict[str, Any]]:
    """Return the throughput of several clients over that of the bare runner.

    `kept_at_most` is what would be left if the model's process used no more processor time than
    the bare runner, and all cores were always busy: client and server share them with the model.
    """
    rows = []
    for model in found.runners:
        for protocol in protocols:
            for count in clients:
                turns = in_turns(found, model, protocol, batch, ClosedLoop(count), rounds, seconds)
                bare, loads, processor = turns.bare, turns.loads, turns.processor
                alone = np.array([1000 * batch / each.mean() for each in bare])
                own = np.array([load.images_per_second for load in loads])
                ratio = bootstrap_ratio(
                    [own[[i]] for i in range(rounds)], [alone[[i]] for i in range(rounds)], np.mean
                )
                rows.append(
                    {
                        "model": model,
                        "protocol": protocol,
                        "clients": count,
                        "batch": batch,
                        "bare_images_per_second": float(alone.mean()),
                        "images_per_second": float(own.mean()),
                        "kept": ratio,
                        "processor_ms": processor,
                        "kept_at_most": processor["bare"]
                        / (processor["bare"] + processor["client"] + processor["server"]),
                        "p50": float(np.median(np.concatenate([load.times for load in loads]))),
                        "errors": _all_errors(loads),
                    }
                )
                print(_shown(rows[-1]), flush=True)
    return rows


def measure_larger(folder: Path) -> dict[str, Any]:
    """Return the overhead and the throughput of ResNet-50 over gRPC."""
    torch.manual_seed(0)
    model, shape = create_model("resnet50", num_classes=1000).eval(), (3, 224, 224)
    folder.mkdir()
    path = export_onnx(model, folder / "resnet50.onnx", shape)
    with served_files({"resnet50": path}, shape, 1000, folder) as found:
        return {
            "overhead": measure_overhead(found, (1, 8, 32), 4, 1.5, ["grpc"]),
            "throughput": measure_throughput(found, (4,), 8, 4, 3.0, ["grpc"]),
        }


def measure_curve(
    found: Served,
    batch: int = 8,
    clients: Sequence[int] = (1, 2, 4, 8, 16, 32),
    shares: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2),
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """Return latency and throughput of both models over gRPC, in closed and in open loops."""
    requests = found.requests(batch)
    endpoints = {model: found.endpoint(model, "grpc") for model in found.runners}
    expected = {model: found.expected(model, batch) for model in found.runners}
    each = dict.fromkeys(endpoints, requests)
    closed = compare_loads(
        endpoints, each, [ClosedLoop(count) for count in clients], seconds, expected
    )
    most = closed.groupby("model").images_per_second.max().min() / batch
    loads = [OpenLoop(share * most) for share in shares]
    opened = compare_loads(endpoints, each, loads, seconds, expected)
    table = pd.concat([closed, opened])
    if any(WRONG in row for row in table.errors):
        raise WrongAnswerError(table.to_string())
    print(table.drop(columns=["protocol"]).round(2).to_string(index=False))
    return table.to_dict("records")


def measure_locust(
    found: Served, locust: Path, folder: Path, batch: int = 8, users: int = 4, seconds: int = 10
) -> list[dict[str, Any]]:
    """Return what locust measures with some users, and what this project's own load does."""
    from tritonclient.http import InferenceServerClient, InferInput

    rows = []
    for model in found.runners:
        endpoint = found.endpoint(model, "http")
        images = found.requests(batch)[0][INPUT]
        tensor = InferInput(INPUT, list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        body, header = InferenceServerClient.generate_request_body([tensor])
        (folder / "body").write_bytes(body)
        options = ["--headless", "--only-summary", "--users", str(users), "--spawn-rate"]
        options += [str(users), "--run-time", f"{seconds}s", "--host", f"http://{endpoint.address}"]
        subprocess.run(
            [str(locust), "--locustfile", str(LOCUSTFILE), *options, "--csv", str(folder / "out")],
            env={**os.environ, "REQUEST_BODY": str(folder / "body"),
                 "REQUEST_HEADER_LENGTH": str(header or 0), "REQUEST_MODEL": model},
            check=True,
            capture_output=True,
        )  # fmt: skip
        with open(folder / "out_stats.csv") as file:
            total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
        own = found.load(model, "http", batch, ClosedLoop(users), seconds)
        rows.append(
            {
                "model": model,
                "users": users,
                "batch": batch,
                "locust": {
                    "images_per_second": batch * float(total["Requests/s"]),
                    "p50": float(total["50%"]),
                    "p99": float(total["99%"]),
                    "requests": int(total["Request Count"]),
                    "failures": int(total["Failure Count"]),
                },
                "own": own.row(),
            }
        )
        print(_shown(rows[-1]), flush=True)
    return rows


def measure_kill(
    found: Served, model: str = "sparse", batch: int = 8, clients: int = 4, seconds: float = 25.0
) -> dict[str, Any]:
    """Kill the server under load, and return how long no request was answered."""
    before = found.server.starts
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(found.load, model, "grpc", batch, ClosedLoop(clients), seconds)
        time.sleep(seconds / 5)
        pid = found.server.pid
        if pid is None:
            raise RuntimeError("The server was not running when it was to be killed.")
        os.kill(pid, signal.SIGKILL)
        load = future.result()
    done = sorted(each.done for each in load.outcomes if not each.error)
    # The ends of the load count too: a server that never came back is silent until then.
    silent = float(np.diff([0.0, *done, max(seconds, *done, 0.0)]).max())
    row = {
        **load.row(),
        "model": model,
        "silent_seconds": silent,
        "restarts": found.server.starts - before,
        "messages": load.messages,
        "within": silent <= BACK_SECONDS and found.server.starts > before,
    }
    print(_shown(row), flush=True)
    return row


class MemoryWatch:
    """Reads the memory of the server's processes every second, in a thread of its own."""

    def __init__(self, pid: int, every: float = 1.0) -> None:
        self.pid, self.every = pid, every
        self.samples: list[tuple[float, float]] = []  # seconds, MiB

    def __enter__(self) -> "MemoryWatch":
        self.stop, self.start = threading.Event(), time.monotonic()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(self.every):
            try:
                mib = memory_mib(self.pid)
            except psutil.NoSuchProcess:  # whoever looks at the server's process finds out why
                return
            self.samples.append((time.monotonic() - self.start, mib))

    def growth(self, after: float) -> float:
        """Return by what share the memory grew after some seconds.

        The last tenth of the remaining time is compared with the first tenth.
        """
        rest = np.array([mib for second, mib in self.samples if second >= after])
        tenth = max(1, len(rest) // 10)
        if not len(rest):
            return math.nan
        return float(np.median(rest[-tenth:]) / np.median(rest[:tenth]) - 1)


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process and of all that it started, in MiB."""
    process = psutil.Process(pid)
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def measure_soak(
    found: Served,
    model: str = "sparse",
    batch: int = 32,
    seconds: float = 600.0,
    probe_seconds: float = 10.0,
    rate: float | None = None,
) -> dict[str, Any]:
    """Send twice as many requests as the server can answer, and look at it during and after.

    Args:
        found: the server.
        model: the one to load.
        batch: images in each request.
        seconds: for how long.
        probe_seconds: of each measurement before and after.
        rate: requests per second; else twice what eight clients reach just before.
    """
    before = found.load(model, "grpc", batch, ClosedLoop(1), probe_seconds)
    most = found.load(model, "grpc", batch, ClosedLoop(8), probe_seconds).images_per_second / batch
    pid, starts = found.server.pid, found.server.starts
    if pid is None:
        raise RuntimeError("The server was not running when it was to be loaded.")
    with MemoryWatch(pid, every=min(1.0, seconds / 20)) as memory:
        load = found.load(
            model, "grpc", batch, OpenLoop(rate or 2 * most, in_flight=2048), seconds, timeout=30.0
        )
    after = found.load(model, "grpc", batch, ClosedLoop(1), probe_seconds)
    settled = seconds_until_normal(after, before.percentile(50))
    sent = [each for each in load.outcomes if each.error != NOT_SENT]
    growth = memory.growth(after=min(60.0, seconds / 10))
    same_process = found.server.pid == pid and found.server.starts == starts
    row = {
        **load.row(),
        "model": model,
        "seconds": seconds,
        "sustained_requests_per_second": most,
        "longest_wait_ms": 1000 * max(each.done - each.sent for each in sent),
        "memory_mib": [round(mib, 1) for _, mib in memory.samples],
        "memory_seconds": [round(second, 2) for second, _ in memory.samples],
        "memory_growth": growth,
        "messages": load.messages,
        "before": before.row(),
        "after": after.row(),
        "normal_after_seconds": settled,
        "same_process": same_process,
        "within": same_process and growth < MEMORY_GROWTH and settled <= NORMAL_SECONDS,
    }
    print(_shown({key: row[key] for key in row if not key.startswith("memory_")}), flush=True)
    print(f"memory growth {growth:+.1%}, from {memory.samples[0][1]:.0f} MiB")
    return row


def seconds_until_normal(load: Load, usual_ms: float, factor: float = 1.5) -> float:
    """Return after how many seconds the latency is what it was: from then on, it stays below.

    Args:
        load: the one after the disturbance.
        usual_ms: the median before it.
        factor: by how much the median of a second may exceed the usual one.

    Returns:
        The start of the first second of those that stay below; infinite if there is none.
    """
    frame = pd.DataFrame(load.outcomes)
    frame["ms"] = np.where(frame.error == "", 1000 * (frame.done - frame.due), np.inf)
    medians = frame.groupby(frame.due.astype(int)).ms.median()
    slow = medians[medians > factor * usual_ms]
    if slow.empty:
        return 0.0
    return math.inf if slow.index[-1] == medians.index[-1] else float(slow.index[-1] + 1)


def _all_errors(loads: Sequence[Load]) -> dict[str, int]:
    errors: dict[str, int] = {}
    for load in loads:
        for kind, count in load.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return errors


def _shown(row: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name} {text(value)}" for name, value in row.items())


def verdicts(record: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether each promise was kept, of those that the record has figures for."""
    found: dict[str, bool] = {}
    networks = {"": record, ", ResNet-50": record.get("larger", {})}
    for name, part in networks.items():
        if "overhead" in part:
            rows = pd.DataFrame(part["overhead"])
            at_8, large = rows[rows.batch == 8], rows[rows.batch >= 32]
            found[f"at most {ADDED_MS} ms more at batch size 8{name}"] = bool(
                (at_8.added_ms <= ADDED_MS).all()
            )
            found[f"at most 10 % more from batch size 32 on{name}"] = all(
                row["value"] <= ADDED_SHARE for row in large.ratio
            )
        if "throughput" in part:
            rows = pd.DataFrame(part["throughput"])
            four = rows[(rows.clients == 4) & (rows.protocol == "grpc")]
            found[f"4 clients get 0.9 of the bare throughput over gRPC{name}"] = all(
                row["value"] >= KEPT_THROUGHPUT for row in four.kept
            )
    if "kill" in record:
        found["back within 15 s after SIGKILL"] = record["kill"]["within"]
    if "soak" in record:
        found["overload: no restart, memory flat, normal within 5 s"] = record["soak"]["within"]
    return found


def draw(record: Mapping[str, Any]) -> plt.Figure:
    """Draw latency against throughput."""
    what = f"Triton and its clients on {record['machine']['cores']} cores, batches of 8, gRPC"
    return plot_load(pd.DataFrame(record["curve"]), what)


def draw_soak(soak: Mapping[str, Any]) -> plt.Figure:
    """Draw the memory of the server's processes under overload."""
    figure, axis = plt.subplots(figsize=(6.5, 2.6))
    plt.close(figure)
    axis.plot(soak["memory_seconds"], soak["memory_mib"], color=PRUNED)
    axis.set_ylim(bottom=0)
    refused = 1 - soak["answered"] / soak["requests"]
    axis.set_xlabel(f"seconds of overload; {refused:.0%} of the requests were refused")
    axis.set_ylabel("MiB of its processes")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main(
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file for the results")] = RESULT,
    parts: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; else all but locust")
    ] = None,
    minutes: Annotated[float, typer.Option(help="of the part soak")] = 10.0,
    rate: Annotated[
        float | None,
        typer.Option(help="requests/s of 32 images in the part soak; else twice what is sustained"),
    ] = None,
    locust: Annotated[Path | None, typer.Option(help="locust's program")] = None,
) -> None:
    """Measure what serving with Triton costs on this machine."""
    chosen = parts or [part for part in PARTS if part != "locust"]
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if "locust" in chosen and locust is None:
        raise typer.BadParameter("--locust has to name locust's program")
    record = json.loads(out.read_text()) if out.exists() else {}
    try:
        with TemporaryDirectory(prefix="serving_") as name, served(Path(name)) as found:
            work: dict[str, Callable[[], Any]] = {
                "overhead": lambda: measure_overhead(found),
                "throughput": lambda: measure_throughput(found),
                "larger": lambda: measure_larger(Path(name) / "larger"),
                "curve": lambda: measure_curve(found),
                "locust": lambda: measure_locust(found, locust or Path(), Path(name)),
                "kill": lambda: measure_kill(found),
                "soak": lambda: measure_soak(found, seconds=60 * minutes, rate=rate),
            }
            for part in chosen:
                record |= {
                    "what": "dense and sparse on ONNX Runtime behind Triton, clients on the same "
                    "machine; latencies in ms",
                    "command": "python benchmarks/serving.py",
                    part: work[part](),
                    **machine.provenance(),
                }
                # Through JSON: what was measured now looks as what was measured before.
                write_json(out, record)
                record = json.loads(out.read_text())
                record["verdicts"] = verdicts(record)
                write_json(out, record)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    if "curve" in record:
        save(draw(record), out.with_suffix(".png"))
    if "soak" in record:
        save(draw_soak(record["soak"]), out.with_name(f"{out.stem}_soak.png"))
    for promise, kept in record["verdicts"].items():
        print(f"{'yes' if kept else 'NO ':3}  {promise}")


if __name__ == "__main__":
    typer.run(main)
