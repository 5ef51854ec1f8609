"""One part of a GPU's measurement: what it measures, how much time it has, and its record.

Each part runs in a process of its own (`gpu_worker.py`) and writes one JSON file, which is
rewritten whenever something was measured. A record of this machine with these versions is
continued; one of another machine stays until there is something to replace it. `begun` is the
step under way; `stopped` says by datatype why a part did not end well; `fatal` lists the steps
that no process survived; `seconds` tells by datatype what the part has cost.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from child_process import begin
from helpers import machine
from helpers.files import json_text, write_json
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.sparse_torch import SparseTorchRunner
from helpers.sparsity import prune_2to4_
from helpers.training import networks

NETWORKS = ["resnext101_32x8d", "resnet50", "vit_b_16"]
BATCH_SIZES = [256, 32, 1, 128, 8, 64]  # the most telling first, in case time runs out
SQUARES = [1024, 4096, 2048, 8192, 16384]  # likewise
DATATYPES = ["BF16", "INT8", "FP8", "TF32", "FP16"]  # the one that may break CUDA last
TYPES = {"FP16": torch.float16, "BF16": torch.bfloat16}  # of the networks
BRANCH = 0.2  # the scale of a residual branch in a random model


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    part: str
    out: str  # the folder of the records
    cache: str  # the folder of what is expensive to make again
    networks: list[str] = field(default_factory=lambda: list(NETWORKS))
    batch_sizes: list[int] = field(default_factory=lambda: list(BATCH_SIZES))
    squares: list[int] = field(default_factory=lambda: list(SQUARES))
    datatype: str = "FP16"
    search: bool = True  # let cuSPARSELt try all its algorithms
    model: str = "dense"  # or sparse; of a part that takes one at a time
    image_size: int = 224
    seconds: float = 1.0  # for each network and batch size
    limit: float = 600.0  # seconds after which nothing new is started


class Run:
    """A job under way, with its record so far.

    Args:
        job: what to measure.
        name: of the record's file, without its ending; the part's unless given.
    """

    def __init__(self, job: Job, name: str = "") -> None:
        self.job = job
        self.out, self.cache = Path(job.out), Path(job.cache)
        self.name = name or job.part
        self.began = time.monotonic()
        self.record = self.continued()
        self.record.setdefault("stopped", {}).pop(job.datatype, None)
        self.made: dict[str, dict[str, nn.Module]] = {}

    @property
    def left(self) -> float:
        """Seconds in which something new may be started."""
        return self.began + self.job.limit - time.monotonic()

    def path(self, name: str) -> Path:
        """Return the file of a record."""
        return self.out / f"{name}.json"

    def continued(self) -> dict[str, Any]:
        """Return what an earlier run left, if this machine made it with these versions."""
        record = earlier(self.path(self.name))
        here = json.loads(json_text(machine.provenance()))
        same = all(record.get(key) == here[key] for key in ("machine", "versions"))
        return record if same else {}

    def begin(self, step: str) -> None:
        """Note in the record and for the parent which step begins."""
        self.record["begun"] = step
        self.write()
        begin(step)

    def write(self) -> None:
        """Write what has been measured so far; until then, another machine's file stays."""
        path = self.path(self.name)
        if not has_figures(self.record) and has_figures(earlier(path)):
            print(f"{path.name} keeps the measurements of an earlier run", flush=True)
        else:
            write_json(path, self.record | machine.provenance())

    def finish(self, stopped: str = "", fatal: bool = False) -> None:
        """Write the record for the last time.

        Args:
            stopped: why the part did not end well.
            fatal: whether the step under way left CUDA unusable.
        """
        begun = self.record.pop("begun", self.job.part)
        seconds = self.record.setdefault("seconds", {})
        taken = seconds.get(self.job.datatype, 0.0) + time.monotonic() - self.began
        seconds[self.job.datatype] = round(taken, 1)
        if stopped:
            self.record["stopped"][self.job.datatype] = f"{stopped} (during {begun})"
        if fatal:
            self.record.setdefault("fatal", []).append(begun)
        self.write()

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return the shape of a network's images."""
        size = self.job.image_size
        return (1, 28, 28) if name == "resnext14_8x1d" else (3, size, size)

    def models(self, name: str) -> dict[str, nn.Module]:
        """Return a network's model with random weights, and the same model pruned 2:4."""
        if name not in self.made:
            dense = random_model(name, self.shape(name))
            sparse = copy.deepcopy(dense)
            prune_2to4_(sparse, "cusparselt")
            self.made[name] = {"dense": dense, "sparse": sparse}
        return self.made[name]

    def runners(self, name: str, compile: bool = False) -> dict[str, SparseTorchRunner]:
        """Return the dense and the sparse model of a network on PyTorch's runners.

        Both choose among the same dense kernels, so that they differ in sparsity alone.
        """
        models, cache = self.models(name), self.cache / "kernels.json"
        dtype = TYPES[self.job.datatype] if torch.cuda.is_available() else None
        sparse = "cusparselt" if self.job.search else "cusparselt without search"
        kernels = {"dense": "dense", "sparse": "dense" if why_no_sparse_gemms() else sparse}
        return {
            label: SparseTorchRunner(models[label], kind, dtype, cache, compile)
            for label, kind in kernels.items()
        }


def earlier(path: Path) -> dict[str, Any]:
    """Return the record that an earlier run left in a file; empty if there is none."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def has_figures(record: dict[str, Any]) -> bool:
    """Return whether a record holds any measurement, not only reasons why there is none."""
    times = [row.get("p50", row.get("dense_ms")) for row in record.get("rows", [])]
    measured = not pd.Series(times, dtype=float).isna().all()
    return measured or bool(record.get("kernels")) or bool(record.get("builds"))


def random_model(name: str, shape: tuple[int, int, int], num_classes: int = 1000) -> nn.Module:
    """Return a model with random weights whose outputs are usable numbers.

    Speed does not depend on the weights, but outputs can only be compared if they neither
    vanish nor overflow, and do not amplify rounding: batch norms get the statistics of random
    images, residual branches are scaled down, and a last layer that starts with zeros gets
    random weights.
    """
    torch.manual_seed(0)
    model = networks.create_model(name, num_classes).to(machine.device())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches, not a moving one
        if isinstance(layer, Bottleneck):
            nn.init.constant_(layer.bn3.weight, BRANCH)
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    with torch.no_grad():
        model.train()(torch.randn(8, *shape, device=machine.device()))
    return model.eval()


def network_file(name: str, datatype: str) -> str:
    """Return the name of a network's record."""
    return name if datatype == "FP16" else f"{name}_{datatype.lower()}"
