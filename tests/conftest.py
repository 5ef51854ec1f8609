"""What several test modules share."""

import json
import logging
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import sparsity
from helpers.inference import cuda_graphs, export
from helpers.training import networks
from helpers.training.data import InMemoryImages, Splits
from helpers.tutorial.settings import PRESETS, Settings

# The first call into torch is slow, and a test suite should not depend on the day.
hypothesis.settings.register_profile("tutorial", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tutorial")


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Take away what a test, or a command that it ran, has let print the log."""
    logger = logging.getLogger("helpers")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers, logger.level = handlers, level


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The quick preset, writing to a temporary folder."""
    for name in ("TUTORIAL_PRESET", "TUTORIAL_DATA", "TUTORIAL_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    return replace(Settings.load("quick"), artifacts_dir=tmp_path / "artifacts")


@pytest.fixture
def no_network(monkeypatch):
    """Let every download fail at once, on a machine with a network too."""

    def unreachable(*_, **__):
        raise URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)


# --- for training and everything after it: tiny, and nothing downloaded ---

SHAPE = (1, 28, 28)  # that of the quick preset


@pytest.fixture
def tiny_splits() -> Splits:
    """Ten noisy patterns in the shape of Fashion-MNIST: 128, 64 and 64 images."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(10, 1, 4, 4, generator=generator).repeat_interleave(7, 2)
    patterns = patterns.repeat_interleave(7, 3)  # blocks of 7 by 7 pixels

    def loader(count: int, train: bool = False) -> DataLoader:
        labels = torch.arange(count) % 10
        noise = torch.randn(count, *SHAPE, generator=generator)
        return DataLoader(
            InMemoryImages(patterns[labels] + 0.5 * noise, labels, flip=train),
            batch_size=32 if train else 64,
            shuffle=train,
            drop_last=train,
            collate_fn=lambda batch: batch,
        )

    return Splits(loader(128, train=True), loader(64), loader(64), [*"0123456789"])


def _tiny_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=4, bias=False),  # one input channel: stays dense
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture
def tiny_net() -> nn.Module:
    """Three weighted layers with fixed random weights; "3" and "8" can be sparse."""
    return _tiny_net()


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The tiny network pruned 2:4, in evaluation mode, and its ONNX files by precision."""
    model = _tiny_net()
    model(torch.randn(64, *SHAPE))  # gives the batch norms statistics other than 0 and 1
    model.eval()
    sparsity.prune_2to4_(model)
    folder = tmp_path_factory.mktemp("onnx")
    files = {
        name: export.export_onnx(model, folder / f"{name}.onnx", SHAPE, name == "fp16")
        for name in ("fp32", "fp16")
    }
    return model, files


@pytest.fixture(scope="session")
def pruned_resnext() -> nn.Module:
    """The quick preset's model pruned 2:4, in evaluation mode."""
    torch.manual_seed(0)
    model = networks.create_model("resnext14_8x1d", 10)
    model(torch.randn(16, *SHAPE))  # gives the batch norms statistics other than 0 and 1
    sparsity.prune_2to4_(model)
    return model.eval()


@pytest.fixture(scope="session")
def resnext_files(pruned_resnext, tmp_path_factory) -> dict[str, Path]:
    """The ONNX files of the pruned ResNeXt, by precision."""
    folder = tmp_path_factory.mktemp("resnext")
    return {
        name: export.export_onnx(pruned_resnext, folder / f"{name}.onnx", SHAPE, name == "fp16")
        for name in ("fp32", "fp16")
    }


@pytest.fixture(scope="session", params=["quick", "bottlenecks", "linear", "transformer"])
def pruned(request) -> tuple[nn.Module, Tensor]:
    """A model of `inference_cases` pruned 2:4, and images for it."""
    from inference_cases import NETWORKS, prepared, random

    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    return prepared(make(), random(8, *shape, seed=1)), random(3, *shape, seed=2)


@pytest.fixture
def cusparselt():
    """A fake cuSPARSELt on the CPU."""
    from inference_cases import fake_cusparselt

    with fake_cusparselt() as fake:
        yield fake


@pytest.fixture
def tiny_settings(monkeypatch, tmp_path) -> Settings:
    """The quick preset cut down to two epochs and small batches, with its files in `tmp_path`."""
    quick = PRESETS["quick"]
    tiny = replace(
        quick,
        recipe=replace(quick.recipe, epochs=2, batch_size=32),
        batch_sizes=(1, 4),
        best_batch_size=4,
        seconds_per_batch_size=0.01,
    )
    monkeypatch.setitem(PRESETS, "quick", tiny)
    monkeypatch.delenv("TUTORIAL_PRESET", raising=False)
    monkeypatch.setenv("TUTORIAL_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("TUTORIAL_DATA", str(tmp_path / "data"))
    return Settings.load()


@pytest.fixture
def clock(monkeypatch):
    """A clock for the modules that measure: it moves only when a test moves it."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    for module in ("helpers.measurement.benchmark", "helpers.measurement.energy"):
        monkeypatch.setattr(f"{module}.time", clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # so that nothing has to settle
    return clock


@pytest.fixture
def command_line(monkeypatch, capsys, tiny_settings, tiny_splits):
    """Run the command line in this process; return exit status, output and errors."""
    from helpers.tutorial import commands, inputs

    monkeypatch.setattr(inputs, "load_splits", lambda _: tiny_splits)

    def main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["helpers", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            commands.main()
        return (exit.value.code or 0, *capsys.readouterr())

    return main


# --- for what captures CUDA graphs, without a GPU ---


class Replay:
    """A CUDA graph on the CPU: it does the captured work again, into the same tensor."""

    def __init__(self, work: Callable[[], Tensor], result: Tensor) -> None:
        self.work, self.result = work, result

    def replay(self) -> None:
        result = self.work()
        if self.result is not None:
            self.result.copy_(result)


@pytest.fixture
def captured(monkeypatch) -> list[Replay]:
    """Every graph that is captured, on the CPU."""
    graphs = []

    def capture(work: Callable[[], Tensor], stream: object = None) -> tuple[Replay, Tensor]:
        work()
        graphs.append(Replay(work, work()))
        return graphs[-1], graphs[-1].result

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return graphs


@pytest.fixture
def gpu_clock(monkeypatch) -> list[float]:
    """The GPU's clock in milliseconds, which CUDA events read; a test moves its one entry."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return now


@pytest.fixture
def recorded(tmp_path):
    """Write a record of a GPU that nobody has, and return its path."""

    def write(*rows, **more):
        record = {"machine": {"gpu": "NVIDIA X1"}, "bandwidth_gbps": 2000.0, "rows": rows} | more
        (tmp_path / "gpu.json").write_text(json.dumps(record))
        return tmp_path / "gpu.json"

    return write
