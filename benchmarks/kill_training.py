"""Kill a training with `kill -9` at random moments and compare its end with an unbroken one.

    python benchmarks/kill_training.py --processes 2

It retrains a small network on images that it makes, once without a break and once with. With one
process, the process is killed and started again; with several, one of them is killed at random
and `torchrun` restarts all. After each kill the progress file must be whole and have every epoch
that was finished before; in the end both checkpoints must have the same checksum.
"""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from helpers import machine
from helpers.files import sha256, write_json
from helpers.sparsity import prune_2to4_
from helpers.training.networks import create_model, save_checkpoint

NETWORK = "resnet18"
OPTIONS = (
    "--epochs", "12", "--batch-size", "16", "--image-size", "32", "--learning-rate", "0.01",
    "--step-epochs", "none", "--workers", "1", "--validation-images", "8", "--overwrite",
)  # fmt: skip


def make_images(folder: Path) -> None:
    """Write random photographs of two classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 36), ("val", 8)):
        for name, light in (("dark", 100), ("light", 255)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, light, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.jpg")


def command(processes: int, folder: Path, name: str) -> list[str]:
    """Return the command line of a training."""
    start = [sys.executable, "-m", "helpers"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={processes}", "--max-restarts=1000", "-m", "helpers"]
    files = [str(folder / "pruned.safetensors"), str(folder / f"{name}.safetensors")]
    return [*start, "retrain", *files, "--images", str(folder / "images"), *OPTIONS]


def finished(run: Path) -> int:
    """Return how many epochs a progress file has; it must be whole."""
    path = run / "progress.pt"
    return len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0


def workers_of(process: subprocess.Popen) -> list[int]:
    """Return the training processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in children.read_text().split()]


def end(pid: int) -> None:
    """Kill a process that may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def break_off(processes: int, folder: Path, kills: int, longest: float, seed: int) -> list[dict]:
    """Train with so many kills on the way; return what was found after each."""
    rng, run = random.Random(seed), folder / "broken.run"
    found: list[dict] = []
    line = command(processes, folder, "broken")
    with open(folder / "broken.log", "w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
        while len(found) < kills:
            wait = rng.uniform(0, longest)
            before = finished(run)
            time.sleep(wait)
            if process.poll() is not None:
                if process.returncode == 0:  # it came to its end: once more from the first epoch
                    for path in run.iterdir():
                        path.unlink()
                process = subprocess.Popen(line, stdout=log, stderr=log)
                continue
            victims = [process.pid] if processes == 1 else workers_of(process)
            if not victims:
                continue
            end(rng.choice(victims))
            if processes == 1:
                process.wait()
            after = finished(run)
            if after < before:
                raise RuntimeError(f"{before - after} finished epochs were lost")
            found.append({"seconds": round(wait, 2), "epochs": after})
            print(f"kill {len(found)}/{kills} after {wait:.1f} s: {after} epochs finished")
        if process.wait() != 0:
            subprocess.run(line, check=True, stdout=log, stderr=log)
    return found


def main(
    processes: Annotated[int, typer.Option(min=1)] = 1,
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the result")] = None,
) -> None:
    """Kill a training at random moments and compare its end with an unbroken one."""
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_images(folder / "images")
        torch.manual_seed(0)
        model = create_model(NETWORK, 2)
        prune_2to4_(model)
        save_checkpoint(model, folder / "pruned.safetensors", NETWORK)
        start = time.perf_counter()
        subprocess.run(command(processes, folder, "unbroken"), check=True)
        seconds = time.perf_counter() - start
        found = break_off(processes, folder, kills, seconds, seed)
        same = sha256(folder / "broken.safetensors") == sha256(folder / "unbroken.safetensors")
    result = {
        "processes": processes,
        "kills": found,
        "unbroken_seconds": round(seconds, 1),
        "same_weights": same,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.provenance(),
    }
    if out is not None:
        write_json(out, result)
    print(f"{len(found)} kills; the final weights are {'the same' if same else 'DIFFERENT'}")
    if not same:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
