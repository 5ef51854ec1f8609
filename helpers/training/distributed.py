"""The processes that train one model together, as `torchrun` starts them.

Explained in docs/retraining.md. Without `torchrun` there is one process, and all of this does
nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.errors import InputError, UnavailableError


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this one is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sums of numbers over all processes; the same on each."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their mean over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.count

    def share(self, content: bytes | None) -> bytes | None:
        """Return what the first process gives; what the others give is not looked at."""
        if self.count == 1:
            return content
        size = torch.tensor(-1 if content is None else len(content))
        dist.broadcast(size, 0)
        if size < 0:
            return None
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.is_first and content:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if size > 0:
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def require_same(self, value: str, what: str) -> None:
        """Raise an error on every process if `value` differs between them.

        Raises:
            InputError: says that the processes do not have the same `what`.
        """
        first = self.share(value.encode())
        (differing,) = self.sum(float(first != value.encode()))
        if differing:
            raise InputError(
                f"The {self.count} processes do not have the same {what}. Give every node the "
                "same files and the same command line."
            )

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            dist.barrier()


def processes() -> Processes:
    """Return the processes of the group that was initialised, or else this one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join the other processes that `torchrun` has started, until the block ends.

    Each process on a node with GPUs takes one of them.

    Raises:
        UnavailableError: there are more processes on this node than GPUs.
    """
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        yield processes()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UnavailableError(
                f"torchrun started more processes on this node than it has GPUs, which is {gpus}. "
                f"Give it --nproc-per-node {gpus}."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=_store(), rank=rank, world_size=count)
    yield processes()
    # Not after an error: the other processes may be waiting for this one, and torchrun ends them.
    dist.destroy_process_group()


def _store() -> dist.Store:
    """Return where the processes find each other.

    torchrun keeps its store over a restart, and PyTorch would look for the killed processes that
    are still listed there, so each attempt has its own part of it. The nodes of several count
    their attempts differently; docs/retraining.md says what they need instead.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt {attempt}", store)
    return store


def average_buffers_(model: nn.Module, together: Processes) -> None:
    """Give the model of every process the mean of their batch norms' statistics, in place.

    Each process has seen other images. The weights need no averaging: their gradients were.
    """
    together.average_([buffer for buffer in model.buffers() if buffer.is_floating_point()])
