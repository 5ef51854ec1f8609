"""A training that is killed while it writes its second checkpoint, unless it was before.

`test_distributed.py` starts it, with a folder as argument.
"""

import os
import signal
import sys
from pathlib import Path
from typing import IO

import rank_cases
import torch

from helpers.training.distributed import process_group

folder = Path(sys.argv[1])
killed = folder / "killed"
save, calls = torch.save, []


def save_or_die(content: object, file: IO[bytes]) -> None:
    """Write the content; at the second call half of it, and then nothing ever again."""
    calls.append(file)
    save(content, file)
    if len(calls) == 2 and not killed.exists():
        killed.touch()
        file.flush()
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
with process_group() as together:
    torch.save = save_or_die
    state = rank_cases.trained(rank_cases.RECIPE, folder / "progress.pt")
    torch.save = save
    if together.is_first:
        (folder / "epochs").write_text(str(len(calls)))
        torch.save(state, folder / "weights.pt")
