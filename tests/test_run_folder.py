import errno
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from helpers import files
from helpers.errors import WriteError
from helpers.training import run_folder
from helpers.training.distributed import Processes
from helpers.training.progress import Epoch
from helpers.training.recipe import Recipe, read_recipe
from helpers.training.run_folder import RunFolder, git_revision

RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=0.1, weight_decay=0.0)
EPOCHS = [Epoch(1, 2.0, 50.0, 1.5, 40.0, 0.1, 100.0, 0.25), Epoch(2, float("nan"), 60.0, 1.5)]


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda _: None)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_has_recipe_starts_and_metrics(tmp_path, no_tensorboard):
    for count in (1, 2):
        folder = RunFolder(tmp_path / "run", RECIPE, Processes(0, count))
    assert read_recipe(tmp_path / "run" / "recipe.yaml") == RECIPE
    starts = lines(tmp_path / "run" / "starts.jsonl")
    assert [start["processes"] for start in starts] == [1, 2]
    assert starts[0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"command", "git", "date", "machine"} <= set(starts[0])
    for count in (1, 2, 1):  # as after a kill between the progress file and this one
        folder.record(EPOCHS[:count])
        metrics = lines(tmp_path / "run" / "metrics.jsonl")
        assert [each["number"] for each in metrics] == [1, 2][:count]
    folder.record(EPOCHS)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0] == vars(EPOCHS[0])
    assert metrics[1]["loss"] is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.jsonl", "recipe.yaml", "starts.jsonl",
    ]  # fmt: skip


def test_tensorboard_gets_each_epoch_once(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path), 1)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            written.append("flush")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda _: "found")
    folder = RunFolder(tmp_path, RECIPE, Processes())
    folder.record(EPOCHS[:1])
    folder.record(EPOCHS)
    assert [each for each in written if each[0] == "loss"] == [("loss", 1), ("loss", 2)]
    assert written.count("flush") == 2


def test_a_full_disk_leaves_the_metrics_there_were(tmp_path, no_tensorboard, monkeypatch):
    folder = RunFolder(tmp_path, RECIPE, Processes())
    folder.record(EPOCHS[:1])
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.Path, "write_text", full)
    with pytest.raises(WriteError, match="the disk is full"):
        folder.record(EPOCHS)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_the_revision_tells_a_changed_file(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    clean = git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path) == f"{clean}-dirty"


def test_outside_of_a_repository_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_revision(tmp_path) is None
