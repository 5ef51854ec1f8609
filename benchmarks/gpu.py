"""Measure everything that the tutorial reports for a GPU, with no more than this command.

    python benchmarks/gpu.py                        # or: make gpu
    python benchmarks/gpu.py --minutes 9            # as much as fits; the next call goes on

First the short checks: what is here, whether each datatype survives cuSPARSELt's search for its
fastest algorithm, and the tests that need a GPU. Then the measurements, the most telling first.

One kernel that fails can leave CUDA unusable for its process. So each part and datatype runs in a
process of its own (`gpu_worker.py`) with a time limit, and this one never touches the GPU. Every
record is written as it grows and names what was under way when its process died. Where FP16 died,
the networks run in BF16. A later call keeps what this machine has measured with these versions; to
measure anew, give another folder.
"""

import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import torchvision
import typer
from torchvision.models import list_models

from child_process import Ending, run_child
from gpu_run import BATCH_SIZES, DATATYPES, NETWORKS, SQUARES, TYPES, Job, earlier
from gpu_worker import STOPPED, record_of
from helpers.files import write_json

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("gpu_worker.py")
ALGORITHMS = Path(__file__).with_name("gpu_algorithms.py")
PARTS = [
    "probe",
    "algorithms",
    "tests",
    "products",
    "networks",
    "advice",
    "int8",
    "profile",
    "engines",
    "compiled",
]
PROBED = (128, 1024, 4096)  # sizes of the probe's products
# The tests that need a GPU, in groups: one that breaks CUDA costs the rest of its group.
TESTS = {
    "graphs, energy and products": ("cuda_graphs", "energy", "gemm", "cusparselt"),
    "networks": ("sparse_torch", "sparsegpt", "benchmark"),
    "engines": ("runners", "engine"),
}
# Seconds after which a process is killed, and those that have to be left for it to start.
LIMITS = {
    "machine": (120, 0),
    "probe": (60, 20),
    "algorithms": (120, 30),
    "tests": (120, 30),
    "products": (300, 25),
    "network": (420, 45),
    "advice": (60, 15),
    "int8": (420, 60),
    "profile": (180, 45),
    "engines": (1800, 60),
    "compiled": (1800, 90),
}
SOFT = 0.75  # of its limit, after which a part starts nothing new
RETRIES = 4  # processes for the products of one datatype, if they die


@dataclass
class Session:
    """One call of this script: what it may use, and how its processes ended."""

    base: Job
    until: float
    machine: dict[str, Any] = field(default_factory=dict)  # `machine` and `versions` of records
    ended: list[dict[str, Any]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where the records go."""
        return Path(self.base.out)

    @property
    def left(self) -> float:
        """Seconds until nothing may run."""
        return self.until - time.monotonic()

    def is_of_this_machine(self, record: dict[str, Any]) -> bool:
        """Return whether a record was made here, with these versions."""
        return bool(record) and all(record.get(key) == self.machine[key] for key in self.machine)

    def measure(self, part: str, **options: Any) -> Ending | None:
        """Do one job in a process of its own; None if there was no time for it."""
        job = replace(self.base, part=part, **options)
        title = title_of(job)
        limit = self.limit(part, title)
        if limit is None:
            return None
        job = replace(job, limit=SOFT * limit)
        name = record_of(job) if part == "probe" else "gpu"  # probes run at the same time
        log = Path(job.out) / f"{name}.log"
        ending = self.child(title, [str(WORKER), json.dumps(asdict(job))], limit, log)
        if died(ending):
            note(Path(job.out) / f"{record_of(job)}.json", job.datatype, ending)
        return ending

    def limit(self, part: str, title: str) -> float | None:
        """Return how many seconds a process may take; None, which is noted, if too few are left."""
        most, least = LIMITS[part]
        if least and self.left < least:
            self.tell(title, f"no time was left for it; {least} s is the least", 0)
            return None
        return min(most, self.left) if least else most

    def child(self, title: str, arguments: Sequence[str], limit: float, log: Path) -> Ending:
        """Run Python in a process of its own, and tell how it ended."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "CUDA_MODULE_LOADING": "LAZY",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self.base.cache).absolute() / "inductor"),
        }
        command = [sys.executable, *arguments]
        ending = run_child(command, log, limit, environment, ROOT)
        said = ending.last_line if ending.code in (1, STOPPED) or title.startswith("tests") else ""
        self.tell(title, f"{ending}{': ' if said else ''}{said}", ending.seconds)
        return ending

    def tell(self, title: str, how: str, seconds: float) -> None:
        """Print how a process ended, and add it to the record of this run."""
        print(f"{title}: {how} ({max(0, self.left):.0f} s left)", flush=True)
        self.ended.append({"process": title, "ended": how, "seconds": round(seconds, 1)})
        write_json(self.out / "session.json", {**self.machine, "ended": self.ended})


def title_of(job: Job) -> str:
    """Return what a job measures, for people."""
    match job.part:
        case "probe":
            return f"probe {job.datatype} {job.squares[0]}"
        case "products":
            return f"products {job.datatype}"
        case "profile":
            return f"profile {job.networks[0]} {job.datatype} {job.model}"
        case "network" | "int8" | "engines" | "compiled":
            return f"{job.part} {job.networks[0]} {job.datatype}"
    return job.part


def died(ending: Ending) -> bool:
    """Return whether a process ended in another way than by saying why it stopped."""
    return ending.code not in (0, STOPPED)


def note(path: Path, datatype: str, ending: Ending) -> None:
    """Say in a record how the process that wrote it died, if it was still writing."""
    record = earlier(path)
    if begun := record.pop("begun", None):
        record.setdefault("stopped", {})[datatype] = f"The process {ending}."
        record.setdefault("fatal", []).append(begun)
        write_json(path, record)


# --- the first minutes ---


def find_machine(session: Session) -> str:
    """Find out in a child what is here; return in one sentence what is missing, if anything."""
    ending = session.measure("machine")
    record = earlier(session.out / "machine.json")
    if ending is None or not ending.fine:
        return f"PyTorch does not start here: {ending} ({ending.last_line if ending else ''})."
    session.machine = {key: record[key] for key in ("machine", "versions")}
    print(json.dumps(session.machine, indent=2))
    return record["missing"]


def probe(session: Session, datatypes: Sequence[str]) -> dict[str, str]:
    """Return for each datatype the best way to multiply that it survives, as `safest` does.

    Each product is tried in a process of its own, and the datatypes at the same time.
    """
    folder = Path(session.base.cache) / "probes"
    folder.mkdir(parents=True, exist_ok=True)

    def found(datatype: str) -> list[dict[str, Any]]:
        records = []
        for side in PROBED:
            file = folder / f"probe_{datatype}_{side}.json"
            if not session.is_of_this_machine(earlier(file)):
                session.measure("probe", datatype=datatype, squares=[side], out=str(folder))
            record = earlier(file)
            records.append(record if session.is_of_this_machine(record) else {})
        return records

    with ThreadPoolExecutor(len(datatypes)) as pool:
        records = dict(zip(datatypes, pool.map(found, datatypes), strict=True))
    safe = {datatype: safest(own) for datatype, own in records.items()}
    rows = [
        {"datatype": datatype, "size": side, **{key: own.get(key) for key in WAYS}}
        | {"stopped": own.get("stopped", {}).get(datatype)}
        for datatype, each in records.items()
        for side, own in zip(PROBED, each, strict=True)
    ]
    write_json(session.out / "probe.json", {**session.machine, "safe": safe, "rows": rows})
    print(f"safe: {safe}")
    return safe


WAYS = {"searched": "search", "default": "default"}  # by the probe's key, the best first


def safest(records: Sequence[dict[str, Any]]) -> str:
    """Return the best way to multiply that every probe of a datatype survived; empty if none.

    A probe that there was no time for has an empty record, and says nothing.
    """
    ran = [own for own in records if own]
    return next((way for key, way in WAYS.items() if all(key in own for own in ran)), "")


def try_algorithms(session: Session, datatypes: Sequence[str]) -> None:
    """Find out which of cuSPARSELt's algorithms break CUDA, each in a process of its own."""
    if datatypes and (limit := session.limit("algorithms", "algorithms")) is not None:
        out = session.out / "algorithms.json"
        session.child(
            f"algorithms {' '.join(datatypes)}", [str(ALGORITHMS), str(out), *datatypes], limit,
            session.out / "gpu.log",
        )  # fmt: skip


def run_tests(session: Session, safe: dict[str, str]) -> None:
    """Run the tests that need a GPU, without the datatypes that break CUDA."""
    unsafe = [datatype for datatype, way in safe.items() if way != "search"]
    chosen = ["-k", " and ".join(f"not {datatype}" for datatype in unsafe)] if unsafe else []
    for group, modules in TESTS.items():
        title = f"tests of {group}"
        limit = session.limit("tests", title)
        if limit is not None:
            files = [str(ROOT / "tests" / f"test_{module}.py") for module in modules]
            command = ["-m", "pytest", "-m", "gpu", "-q", *chosen, *files]
            session.child(title, command, limit, session.out / "gpu.log")


# --- the measurements ---


def attempts(safe: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Yield the ways to run a network, the best first: its datatype, and whether to search."""
    for way in WAYS.values():
        for datatype in TYPES:
            if safe.get(datatype) == way:
                yield datatype, way == "search"


def measure_products(
    session: Session, safe: dict[str, str], squares: Sequence[int], networks: Sequence[str] = ()
) -> None:
    """Measure products of each datatype, those of the networks in the networks' datatype."""
    first = next(attempts(safe), None)
    for datatype in safe:
        if not safe[datatype]:
            session.tell(f"products {datatype}", "left out: the probe did not survive it", 0)
            continue
        layers = list(networks) if first and datatype == first[0] else []
        for _ in range(RETRIES):
            ending = session.measure(
                "products", datatype=datatype, squares=list(squares), networks=layers,
                search=safe[datatype] == "search",
            )  # fmt: skip
            if ending is None or not died(ending):
                break
            safe[datatype] = "default"  # the next process leaves out what was fatal to this one


def measure_network(
    session: Session, safe: dict[str, str], name: str, batch_sizes: Sequence[int], part: str
) -> None:
    """Measure a network in the best way; where that dies, in the next one."""
    for datatype, search in attempts(dict(safe)):
        ending = session.measure(
            part, networks=[name], batch_sizes=list(batch_sizes), datatype=datatype, search=search,
        )  # fmt: skip
        if ending is None or not died(ending):
            return
        safe[datatype] = "default" if search and ending.code is not None else ""
        print(f"{name} goes on in another way: {datatype} died")


def measure(session: Session, parts: Collection[str], datatypes: Sequence[str]) -> None:
    """Do the parts in the order of what they tell for their time."""
    base = session.base
    safe = dict.fromkeys(datatypes, "search")
    if "probe" in parts:
        safe = probe(session, datatypes)
    if "algorithms" in parts:  # after a probe, only where it did not survive the search
        broken = [datatype for datatype, way in safe.items() if way != "search"]
        try_algorithms(session, broken if "probe" in parts else datatypes)
    if "tests" in parts:
        run_tests(session, safe)
    # The smallest run from end to end; what it measures is kept by the larger ones.
    quick = "resnet50" if "resnet50" in base.networks else base.networks[0]
    if "products" in parts:
        measure_products(session, safe, base.squares[:2])
    if "networks" in parts:
        measure_network(session, safe, quick, base.batch_sizes[1:2] or base.batch_sizes, "network")
    if "advice" in parts:
        session.measure("advice", networks=[quick])
    # The real ones.
    if "products" in parts:
        measure_products(session, safe, base.squares[:-1] or base.squares, base.networks)
    for name in base.networks if "networks" in parts else ():
        measure_network(session, safe, name, base.batch_sizes, "network")
    if "advice" in parts:
        session.measure("advice")
    if "int8" in parts:
        measure_network(session, safe, base.networks[0], base.batch_sizes[:2], "int8")
    datatype, search = next(attempts(safe), ("BF16", False))
    own = {"networks": base.networks[:1], "datatype": datatype, "search": search}
    for model in ("dense", "sparse") if "profile" in parts else ():
        session.measure("profile", model=model, **own)
    if "engines" in parts:
        session.measure("engines", networks=base.networks[:1], datatype="FP16")
    if "compiled" in parts:
        measure_network(session, safe, quick, base.batch_sizes[:1], "compiled")
    if "products" in parts:
        measure_products(session, safe, base.squares, base.networks)


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the records")] = ROOT
    / "build"
    / "gpu",
    cache: Annotated[
        Path, typer.Option(file_okay=False, help="folder for engines and compiled kernels")
    ] = ROOT / "build" / "gpu_cache",
    parts: Annotated[list[str], typer.Option(help="only these parts")] = PARTS,
    networks: Annotated[list[str], typer.Option(help="names of torchvision's")] = NETWORKS,
    batch_sizes: Annotated[
        list[int], typer.Option(min=1, help="the most telling first")
    ] = BATCH_SIZES,
    squares: Annotated[
        list[int], typer.Option(min=16, help="sizes of products, the most telling first")
    ] = SQUARES,
    datatypes: Annotated[list[str], typer.Option(help="of the products")] = DATATYPES,
    image_size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 224,
    seconds: Annotated[float, typer.Option(min=0, help="for each network and batch size")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0, help="after which everything has ended")] = 90.0,
    on_cpu: Annotated[bool, typer.Option(help="try the parts without a GPU")] = False,
) -> None:
    """Measure everything that the tutorial reports for a GPU."""
    _require_known("parts", parts, PARTS)
    _require_known("datatypes", datatypes, DATATYPES)
    _require_known(
        "networks", networks, ["resnext14_8x1d", *list_models(module=torchvision.models)]
    )
    for folder in (out, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise typer.BadParameter(
                f"{folder} cannot be written to: {error.strerror}", param_hint="out"
            ) from error
    base = Job(
        "", str(out.absolute()), str(cache.absolute()), networks, batch_sizes, squares,
        image_size=image_size, seconds=seconds,
    )  # fmt: skip
    session = Session(base, time.monotonic() + 60 * minutes)
    if missing := find_machine(session):
        print(missing)
        if not on_cpu:
            raise typer.Exit(1)
    measure(session, parts, datatypes)
    print(f"The records are in {out}.")


def _require_known(option: str, given: Sequence[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{name}; there are {', '.join(known)}", param_hint=option)


if __name__ == "__main__":
    typer.run(main)
