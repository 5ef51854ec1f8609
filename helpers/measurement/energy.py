"""Energy of the GPU, from the counter that NVIDIA's driver keeps.

Everything here only reads: no clock, power limit or mode is ever changed.
Explained in `06_infer_and_benchmark.ipynb`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pynvml
import torch

from helpers.errors import UnavailableError

WINDOW = 5.0  # seconds; the counter is refreshed about every 100 ms, which is 2 % of it

# Why the clocks may be below their best. An idle GPU lowers them too, but is not throttled.
THROTTLES = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal slowdown by the driver",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "thermal slowdown by the GPU",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "application clocks",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display clocks",
}


class EnergyError(UnavailableError):
    """The energy counter of the GPU cannot be read."""


@dataclass(frozen=True)
class GpuState:
    """What the driver says of the GPU at one moment."""

    sm_mhz: int
    celsius: int
    throttles: frozenset[str]  # why its clocks are held down; empty if they are not


class EnergyCounter:
    """The energy that PyTorch's GPU has used since its driver was loaded, in joules.

    It covers the board, not the host, and is refreshed about every 100 ms: measure
    for seconds.

    Raises:
        EnergyError: there is no GPU, no driver, or no counter in this GPU.

    Source: NVML's `nvmlDeviceGetTotalEnergyConsumption`, on Volta and later.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise _unreadable("no NVIDIA GPU was found")
        # NVML counts all GPUs of the machine, PyTorch those that it is allowed to see.
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            raise _unreadable(error) from error
        self.joules()
        self.state()

    def joules(self) -> float:
        """Return the counter's reading.

        Raises:
            EnergyError: the driver refuses it.
        """
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1000
        except pynvml.NVMLError as error:
            raise _unreadable(error) from error

    def state(self) -> GpuState:
        """Return clock, temperature and throttle reasons.

        Raises:
            EnergyError: the driver refuses them.
        """
        try:
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
            return GpuState(
                sm_mhz=pynvml.nvmlDeviceGetClockInfo(self._device, pynvml.NVML_CLOCK_SM),
                celsius=pynvml.nvmlDeviceGetTemperature(self._device, pynvml.NVML_TEMPERATURE_GPU),
                throttles=frozenset(name for bit, name in THROTTLES.items() if reasons & bit),
            )
        except pynvml.NVMLError as error:
            raise _unreadable(error) from error


def _unreadable(reason: object) -> EnergyError:
    return EnergyError(
        f"The GPU's energy counter cannot be read ({reason}), so images per joule are "
        "left out. It takes an NVIDIA GPU (Volta or later) and its driver."
    )


@dataclass(frozen=True)
class EnergyWindow:
    """What the GPU did and used while work was repeated for some seconds."""

    calls: int
    joules: float
    seconds: float
    sm_mhz: float  # mean over the window
    celsius: int  # highest
    throttles: frozenset[str]  # all that were seen

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
        seconds: least length of the window; below 5 the counter's refresh shows.

    Raises:
        EnergyError: the counter stood still or was reset meanwhile.
    """
    calls, states = 0, []
    before, start = counter.joules(), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        if elapsed >= len(states):  # about once a second, so that the GPU hardly waits for it
            states.append(counter.state())
        work()
        calls += 1
    joules = counter.joules() - before
    if joules <= 0:
        raise EnergyError(
            f"The GPU's energy counter moved by {joules:.3f} J in {elapsed:.1f} s: it stands "
            "still, or its driver was loaded anew. Images per joule cannot be told; measure again."
        )
    return EnergyWindow(
        calls=calls,
        joules=joules,
        seconds=elapsed,
        sm_mhz=float(np.mean([state.sm_mhz for state in states])),
        celsius=max(state.celsius for state in states),
        throttles=frozenset().union(*(state.throttles for state in states)),
    )


def idle_watts(counter: EnergyCounter) -> float:
    """Return the power of the GPU while this process leaves it alone, in watts."""
    return measure_energy(lambda: time.sleep(0.1), counter, 2 * WINDOW).watts
