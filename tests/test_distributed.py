"""Several processes on one machine, with gloo."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch

from helpers.training import distributed
from helpers.training.distributed import Processes, process_group, processes


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_and_three_processes_do_what_one_does(tmp_path):
    torch.save(rank_cases.trained(rank_cases.RECIPE), tmp_path / "plain.pt")
    torch.save(rank_cases.trained(rank_cases.OPTIONS), tmp_path / "options.pt")
    for count in (2, 3):
        rank_cases.begin(tmp_path / f"begun_{count}.pt")
        torch.multiprocessing.spawn(rank_cases.check_all, (count, str(tmp_path)), nprocs=count)
    # Two processes have begun this one, and one ends it.
    rank_cases.a_training_goes_on_with_another_number(tmp_path)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_see_together_the_batches_of_one(count):
    loader = rank_cases.splits().train
    assert rank_cases.batches_of(count, loader) == rank_cases.batches_of(1, loader)


@pytest.mark.parametrize("count", [1, 2, 3, 70])
def test_each_image_is_in_one_share_of_an_evaluation(count):
    loader = rank_cases.splits().validation
    expected = sorted(label for _, labels in loader for label in labels.tolist())
    assert sorted(rank_cases.validation_of(count, loader)) == expected


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as together:
        assert together == processes() == Processes(0, 1)
        assert together.is_first
        assert together.sum(2, 3.5) == [2, 3.5]
        assert together.share(b"x") == b"x"
        together.require_same("x", "words")
        together.wait()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(distributed.UnavailableError, match="--nproc-per-node 1"),
        process_group(),
    ):
        pass


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")  # on a free port


def python(*command: str) -> subprocess.CompletedProcess:
    """Run a Python program that finds this package and these tests."""
    paths = [str(Path(distributed.__file__).parents[2]), str(Path(__file__).parent)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "TQDM_DISABLE": "1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_torchrun_starts_the_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from helpers.training.distributed import process_group\n"
        "with process_group() as together:\n"
        "    total = together.sum(together.rank + 1)\n"
        "    together.wait()\n"
        f"    Path({str(tmp_path)!r}, str(together.rank)).write_text(str(total))\n"
    )
    done = python(*TORCHRUN, "--nproc-per-node=2", str(script))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[3.0]", "[3.0]"]


KILLED = str(Path(__file__).with_name("killed_training.py"))


def ended_as_the_unbroken(folder: Path, tolerance: float) -> None:
    assert (folder / "killed").exists()
    assert (folder / "epochs").read_text() == "2", "a finished epoch was computed again"
    names = {"progress.pt", "killed", "epochs", "weights.pt"}
    assert {path.name for path in folder.iterdir()} == names, "a half-written file was left"
    state = torch.load(folder / "weights.pt")
    for key, expected in rank_cases.trained(rank_cases.RECIPE).items():
        torch.testing.assert_close(state[key], expected, rtol=tolerance, atol=tolerance / 10)


def test_a_killed_training_loses_no_finished_epoch(tmp_path):
    first = python(sys.executable, KILLED, str(tmp_path))
    assert first.returncode == -signal.SIGKILL
    again = python(sys.executable, KILLED, str(tmp_path))
    assert again.returncode == 0, again.stderr
    ended_as_the_unbroken(tmp_path, 0)


def test_torchrun_restarts_a_killed_training(tmp_path):
    """The first of two processes is killed; torchrun ends the other one and starts both again."""
    command = (*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", KILLED, str(tmp_path))
    done = python(*command)
    assert done.returncode == 0, done.stderr
    ended_as_the_unbroken(tmp_path, 1e-4)
