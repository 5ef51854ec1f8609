import subprocess
import sys

import pytest
import torch

from helpers.training import progress
from helpers.training.distributed import Processes
from helpers.training.progress import EpochWatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def step(watch, clock, loading, computing, loss=1.0, right=3, images=4):
    clock[0] += loading
    watch.ready()
    clock[0] += computing
    watch.done(torch.tensor(loss), torch.tensor(right), images, images)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a clock of its own")
def test_loss_accuracy_speed_and_waiting_are_means_over_the_epoch(clock):
    with EpochWatch("epoch", 8, Processes()) as watch:
        step(watch, clock, loading=1, computing=3, loss=1.0, right=4)
        step(watch, clock, loading=2, computing=2, loss=2.0, right=2)
        result = watch.result()
    assert result.loss == 1.5
    assert result.right == 75
    assert result.images_per_second == 1
    assert result.waited == pytest.approx(3 / 8)


def test_the_bar_shows_loss_accuracy_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_FIGURES", -1)
    with EpochWatch("epoch 1/2", 12, Processes()) as watch:
        for _ in range(2):
            watch.ready()
            watch.done(torch.tensor(1.25), torch.tensor(3), 4, 4)
        shown = str(watch.bar)
    assert shown.startswith("epoch 1/2:  67%")
    assert "8/12" in shown
    assert " images/s" in shown
    assert "loss=1.250, right=75.0 %" in shown
    time_left = shown.partition("<")[2].partition(",")[0]
    assert time_left == "00:00"
    assert "epoch 1/2" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_has_a_bar(rank):
    with EpochWatch("epoch", 8, Processes(rank, 2)) as watch:
        assert (watch.bar is not None) == (rank == 0)


def test_the_bar_can_be_switched_off():
    code = (
        "import torch\n"
        "from helpers.training.distributed import Processes\n"
        "from helpers.training.progress import EpochWatch\n"
        "with EpochWatch('epoch', 8, Processes()) as watch:\n"
        "    watch.done(torch.tensor(1.0), torch.tensor(1), 4, 4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"TQDM_DISABLE": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
