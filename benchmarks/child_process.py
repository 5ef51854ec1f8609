"""Run work that may die or hang in a process of its own, and tell how it ended.

The child prints `begun: ...` before each step (`begin`), so that the parent can name the step
that killed it. Unlike `multiprocessing`, nothing is shared and nothing is forked: a child of a
process that has used CUDA could not use it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEGUN = "begun: "


def begin(step: str) -> None:
    """Tell the parent which step begins; if the process ends without another, it was this one."""
    print(f"{BEGUN}{step}", flush=True)


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    `code` is its exit status, the negative number of the signal that killed it, or None if it did
    not end within `limit` seconds. `during` is the step that it had begun last; `last_line` what it
    printed last.
    """

    code: int | None
    seconds: float
    limit: float
    during: str = ""
    last_line: str = ""

    @property
    def fine(self) -> bool:
        """Whether the child did its work."""
        return self.code == 0

    def __str__(self) -> str:
        if self.code is None:
            how = f"did not end within {self.limit:.0f} s and was killed"
        elif self.code < 0:
            how = f"was killed by {signal.Signals(-self.code).name} after {self.seconds:.0f} s"
        elif self.code > 0:
            how = f"ended with exit status {self.code} after {self.seconds:.0f} s"
        else:
            return f"ended well after {self.seconds:.0f} s"
        return f"{how}, during {self.during}" if self.during else how


def run_child(
    command: Sequence[str],
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ending:
    """Run a command, add what it prints to a file, and return how it ended.

    Args:
        command: the program and its arguments.
        log: the file, of no other child at the same time.
        limit: seconds after which the child is killed, with the processes that it has started.
        environment: variables to set in addition to those of this process.
        folder: where the child works; here unless given.
    """
    start = time.monotonic()
    with open(log, "ab") as file:
        printed = file.tell()
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, **(environment or {})}, process_group=0,
        )  # fmt: skip
        code: int | None = None
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also if this process is interrupted
            _kill(child)
    seconds = time.monotonic() - start
    with open(log, "rb") as file:
        file.seek(printed)
        lines = file.read().decode(errors="replace").splitlines()
    begun = [line.removeprefix(BEGUN) for line in lines if line.startswith(BEGUN)]
    said = [line.strip() for line in lines[2:] if line.strip() and not line.startswith(BEGUN)]
    return Ending(code, seconds, limit, begun[-1] if begun else "", said[-1] if said else "")


def _kill(child: subprocess.Popen) -> None:
    """Kill a child and what it has started; one that the driver holds is left behind."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(10)
