"""Energy of the GPU, from the counter that NVIDIA's driver keeps.

Explained in `06_infer_and_benchmark.ipynb`.
"""

import time
from collections.abc import Callable

import pynvml

from helpers.checks import TutorialError


class EnergyError(TutorialError):
    """The energy counter of the GPU cannot be read."""


class EnergyCounter:
    """The energy that the first GPU has used since its driver was loaded, in joules.

    Source: NVML's `nvmlDeviceGetTotalEnergyConsumption`, on Volta and later. It covers
    the board, not the host, and is refreshed about every 100 ms: measure for seconds.

    Raises:
        EnergyError: there is no NVIDIA driver, no GPU, or no counter in this GPU.
    """

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.joules()
        except pynvml.NVMLError as error:
            raise EnergyError(
                f"The GPU's energy counter cannot be read ({error}), so images per joule are "
                "left out. It takes an NVIDIA GPU (Volta or later) and its driver."
            ) from error

    def joules(self) -> float:
        """Return the counter's reading."""
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1000


def joules_per_call(
    work: Callable[[], object], counter: EnergyCounter, seconds: float = 5
) -> float:
    """Repeat `work` for some seconds and return the mean energy of one call, in joules.

    Args:
        work: must return only when the GPU has finished.
        counter: the GPU's energy counter.
        seconds: length of the window; below 5 the counter's refresh shows.
    """
    calls = 0
    before, start = counter.joules(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    return (counter.joules() - before) / calls
