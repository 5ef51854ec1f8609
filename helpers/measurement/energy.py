"""Energy of the GPU, from the counter that NVIDIA's driver keeps.

This module only reads: it never changes a clock, a power limit or a mode. Explained in
`06_infer_and_benchmark.ipynb`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from helpers.errors import UnavailableError

WINDOW = 5.0  # seconds; the counter is refreshed about every 100 ms, which is 2 % of it

# Why the clocks may be below their best, by NVML's names. An idle GPU lowers them too, but is
# not throttled.
THROTTLES = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal slowdown by the driver",
    "nvmlClocksEventReasonHwThermalSlowdown": "thermal slowdown by the GPU",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonApplicationsClocksSetting": "application clocks",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonDisplayClockSetting": "display clocks",
}


class EnergyError(UnavailableError):
    """The energy counter of the GPU cannot be read."""


@dataclass(frozen=True)
class GpuState:
    """Clock, temperature and throttling of the GPU at one moment, as the driver reports them."""

    sm_mhz: int
    celsius: int
    throttles: frozenset[str]  # what holds the clocks down; empty if nothing does


class EnergyCounter:
    """The energy that PyTorch's GPU has used since its driver was loaded, in joules.

    It covers the board, not the host, and is refreshed about every 100 ms, so measure over
    seconds.

    Raises:
        EnergyError: there is no GPU, no driver, or this GPU has no counter.

    Source: NVML's `nvmlDeviceGetTotalEnergyConsumption`, on Volta and later.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise _unreadable("no NVIDIA GPU was found")
        import pynvml  # here, since nothing else needs it

        self._nvml = pynvml
        # NVML numbers all GPUs of the machine, PyTorch only those that it may use.
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            raise _unreadable(error) from error
        self._throttles = {getattr(pynvml, bit): name for bit, name in THROTTLES.items()}
        self.joules()
        self.state()

    def joules(self) -> float:
        """Return the counter's reading.

        Raises:
            EnergyError: the driver refuses it.
        """
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1000
        except self._nvml.NVMLError as error:
            raise _unreadable(error) from error

    def state(self) -> GpuState:
        """Return clock, temperature and throttle reasons.

        Raises:
            EnergyError: the driver refuses them.
        """
        nvml = self._nvml
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
            return GpuState(
                sm_mhz=nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_SM),
                celsius=nvml.nvmlDeviceGetTemperature(self._device, nvml.NVML_TEMPERATURE_GPU),
                throttles=frozenset(name for bit, name in self._throttles.items() if reasons & bit),
            )
        except nvml.NVMLError as error:
            raise _unreadable(error) from error


def _unreadable(reason: object) -> EnergyError:
    return EnergyError(
        f"The GPU's energy counter cannot be read ({reason}), so images per joule are "
        "left out. The counter needs an NVIDIA GPU (Volta or later) and its driver."
    )


@dataclass(frozen=True)
class EnergyWindow:
    """Energy, time and state of the GPU while work was repeated for some seconds."""

    calls: int
    joules: float
    seconds: float
    sm_mhz: float  # mean over the window
    celsius: int  # highest in the window
    throttles: frozenset[str]  # all that occurred in the window

    @property
    def joules_per_call(self) -> float:
        """Mean energy of one call."""
        return self.joules / self.calls

    @property
    def watts(self) -> float:
        """Mean power of the board."""
        return self.joules / self.seconds


def measure_energy(
    work: Callable[[], object], counter: EnergyCounter, seconds: float = WINDOW
) -> EnergyWindow:
    """Repeat `work` for some seconds and return the energy it took.

    Args:
        work: must return only when the GPU has finished.
        counter: the GPU's energy counter.
        seconds: least length of the window; below 5 the counter's refresh adds an error.

    Raises:
        EnergyError: the counter stood still or was reset during the window.
    """
    calls = 0
    states: list[GpuState] = []
    before, start = counter.joules(), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        if elapsed >= len(states):  # once a second, so that the GPU hardly waits for it
            states.append(counter.state())
        work()
        calls += 1
    joules = counter.joules() - before
    if joules <= 0:
        raise EnergyError(
            f"The GPU's energy counter moved by {joules:.3f} J in {elapsed:.1f} s: it stands "
            "still, or the driver was reloaded. Images per joule are unknown; measure again."
        )
    return EnergyWindow(
        calls=calls,
        joules=joules,
        seconds=elapsed,
        sm_mhz=float(np.mean([state.sm_mhz for state in states])),
        celsius=max(state.celsius for state in states),
        throttles=frozenset(name for state in states for name in state.throttles),
    )


def idle_watts(counter: EnergyCounter) -> float:
    """Return the power of the GPU in watts while this process does not use it."""
    return measure_energy(lambda: time.sleep(0.1), counter, 2 * WINDOW).watts
