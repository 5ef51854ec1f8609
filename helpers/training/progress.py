"""What a person sees of a training: each epoch's result, and its bar while it runs.

Explained in docs/retraining.md.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.machine import device
from helpers.progress_bar import progress_bar
from helpers.training.distributed import Processes

_SECONDS_BETWEEN_FIGURES = 0.5  # reading a loss makes the GPU wait for the host


@dataclass(frozen=True)
class Epoch:
    """The result of one pass over the training images."""

    number: int  # from 1
    loss: float  # mean over the epoch
    validation: float  # top-1 on the validation images, per cent
    seconds: float  # with the validation
    training: float = math.nan  # top-1 on the training images as they were trained on, per cent
    learning_rate: float = math.nan  # of the last step
    images_per_second: float = math.nan  # of the training, over all processes
    waited: float = math.nan  # share of the training's time in which a step waited for images


@dataclass(frozen=True)
class Pass:
    """What the training of one epoch gave, over all processes."""

    loss: float
    right: float  # per cent
    images_per_second: float
    waited: float  # share of the time


class EpochWatch:
    """Counts what the steps of one epoch give, times them, and shows the bar.

    Use it as a context; call `ready` when a batch is there and `done` after its step.
    """

    def __init__(self, title: str, images: int, together: Processes) -> None:
        """Begin an epoch of so many images, over all processes; the first one has the bar."""
        self.together = together
        self.loss = torch.zeros((), device=device())
        self.right = torch.zeros((), dtype=torch.int64, device=device())
        self.steps = self.images = self.own_images = 0
        self.bar = None
        if together.is_first:
            self.bar = progress_bar(total=images, desc=title, unit=" images")
        self.waiting = _WaitingTime()
        self.start = self.shown = time.perf_counter()

    def __enter__(self) -> "EpochWatch":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def ready(self) -> None:
        """Note that a batch is there."""
        self.waiting.end()

    def done(self, loss: Tensor, right: Tensor, own_images: int, images: int) -> None:
        """Add a step: its loss, its right answers, and its images here and over all processes."""
        self.waiting.begin()
        self.loss += loss
        self.right += right
        self.steps += 1
        self.own_images += own_images
        self.images += images
        if self.bar is None:
            return
        now = time.perf_counter()
        if not self.bar.disable and now - self.shown > _SECONDS_BETWEEN_FIGURES:
            self.shown = now
            figures = {
                "loss": f"{float(self.loss) / self.steps:.3f}",
                "right": f"{100 * float(self.right) / self.own_images:.1f} %",
            }
            self.bar.set_postfix(figures, refresh=False)
        self.bar.update(images)

    def result(self) -> Pass:
        """Return the means over the epoch and over all processes."""
        own = float(self.loss) / self.steps  # waits for the GPU
        seconds = time.perf_counter() - self.start
        if self.together.count == 1:
            loss, right, waited = own, float(self.right), self.waiting.seconds()
        else:
            loss, right, waited = self.together.sum(own, float(self.right), self.waiting.seconds())
            loss, waited = loss / self.together.count, waited / self.together.count
        share = waited / seconds
        return Pass(loss, 100 * right / self.images, self.images / seconds, share)


class _WaitingTime:
    """How long a device has had nothing to do because the next images were not there.

    The host runs ahead of a GPU, so only the GPU's own events tell when it was idle.
    """

    def __init__(self) -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.total = 0.0
        self.cuda = device().type == "cuda"
        self.begin()

    def begin(self) -> None:
        if self.cuda:
            self.last = torch.cuda.Event(enable_timing=True)
            self.last.record()
        else:
            self.since = time.perf_counter()

    def end(self) -> None:
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            self.events.append((self.last, now))
        else:
            self.total += time.perf_counter() - self.since

    def seconds(self) -> float:
        """Return the sum; the GPU must have done its work."""
        return self.total + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
