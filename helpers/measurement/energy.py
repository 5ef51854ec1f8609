"""Energy of the GPU or the processor, from the counters that their drivers keep.

This module only reads: it never changes a clock, a power limit or a mode. Explained in
`06_infer_and_benchmark.ipynb`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from helpers.errors import UnavailableError

WINDOW = 5.0  # seconds; the GPU's counter is refreshed about every 100 ms
CPU_WINDOW = 1.0  # seconds; the processor's counter is refreshed about every millisecond
LONGEST_REFRESH = 0.5  # seconds; a counter that moves less often than that stands still
POWERCAP = Path("/sys/class/powercap")  # where Linux shows the processor's counters

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
    """The energy counter of the GPU, or of the processor, cannot be read."""


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

    device = "GPU"
    window = WINDOW

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


class CpuEnergyCounter:
    """The energy that the processors of this machine have used, in joules.

    It covers all packages, with all their cores and whatever else runs on them; most
    processors leave out the memory.

    Raises:
        EnergyError: this system has no such counter, or does not let this user read it.

    Source: Linux's power capping framework, which shows Intel's and AMD's RAPL counters.
    """

    device = "processor"
    window = CPU_WINDOW

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._packages = [
            zone
            for zone in sorted(folder.glob("*-rapl:*"))
            if _read(zone / "name").startswith("package")
        ]
        if not self._packages:
            raise _cpu_unreadable("this system shows none, as is usual in virtual machines")
        # A counter starts again from zero behind its largest reading.
        self._largest = [int(_read(zone / "max_energy_range_uj")) for zone in self._packages]
        self._last = [self._microjoules(zone) for zone in self._packages]
        self._total = 0

    def _microjoules(self, zone: Path) -> int:
        return int(_read(zone / "energy_uj"))

    def joules(self) -> float:
        """Return the energy since this object was made; ask at least every few minutes.

        Raises:
            EnergyError: the system refuses it.
        """
        for number, zone in enumerate(self._packages):
            now = self._microjoules(zone)
            step = now - self._last[number]
            self._total += step if step >= 0 else step + self._largest[number] + 1
            self._last[number] = now
        return self._total / 1e6

    def state(self) -> None:
        """Return nothing: clock and temperature are not part of the counter."""


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError as error:
        raise _cpu_unreadable(
            f"only root may read {file}; `sudo chmod a+r {file.parent.parent}/*/energy_uj` lets "
            "everyone read it until the next start"
        ) from error
    except (OSError, ValueError) as error:
        raise _cpu_unreadable(error) from error


def _cpu_unreadable(reason: object) -> EnergyError:
    return EnergyError(
        f"The processor's energy counter cannot be read ({reason}), so images per joule are "
        "left out."
    )


def _unreadable(reason: object) -> EnergyError:
    return EnergyError(
        f"The GPU's energy counter cannot be read ({reason}), so images per joule are "
        "left out. The counter needs an NVIDIA GPU (Volta or later) and its driver."
    )


@dataclass(frozen=True)
class EnergyWindow:
    """Energy and time while work was repeated for some seconds, and the state of a GPU."""

    calls: int
    joules: float
    seconds: float
    sm_mhz: float | None = None  # mean over the window; None on a CPU, as what follows
    celsius: int | None = None  # highest in the window
    throttles: frozenset[str] = frozenset()  # all that occurred in the window

    @property
    def joules_per_call(self) -> float:
        """Mean energy of one call."""
        return self.joules / self.calls

    @property
    def watts(self) -> float:
        """Mean power of the board, or of the processors."""
        return self.joules / self.seconds


def measure_energy(
    work: Callable[[], object],
    counter: EnergyCounter | CpuEnergyCounter,
    seconds: float | None = None,
) -> EnergyWindow:
    """Repeat `work` for some seconds and return the energy it took.

    The window starts and ends right after the counter was refreshed, so that a refresh that is
    due does not count as an error. Until it starts, the work runs already.

    Args:
        work: must return only when it is finished, on a GPU too.
        counter: the energy counter of the GPU or of the processor.
        seconds: least length of the window; the counter's own unless given.

    Raises:
        EnergyError: the counter stood still or was reset during the window.
    """
    seconds = counter.window if seconds is None else seconds
    states: list[GpuState | None] = []
    _, before, start = _until_refreshed(work, counter)
    calls = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        if elapsed >= len(states):  # once a second, so that the GPU hardly waits for it
            states.append(counter.state())
        work()
        calls += 1
    more, after, end = _until_refreshed(work, counter)
    calls, joules, elapsed = calls + more, after - before, end - start
    if joules <= 0:
        raise EnergyError(
            f"The {counter.device}'s energy counter moved by {joules:.3f} J in {elapsed:.1f} s: "
            "it stands still, or the driver was reloaded. Images per joule are unknown; measure "
            "again."
        )
    told = [state for state in states if state is not None]
    if not told:
        return EnergyWindow(calls, joules, elapsed)
    return EnergyWindow(
        calls=calls,
        joules=joules,
        seconds=elapsed,
        sm_mhz=float(np.mean([state.sm_mhz for state in told])),
        celsius=max(state.celsius for state in told),
        throttles=frozenset(name for state in told for name in state.throttles),
    )


def _until_refreshed(
    work: Callable[[], object], counter: EnergyCounter | CpuEnergyCounter
) -> tuple[int, float, float]:
    """Repeat some work until the counter moves; return the calls, its reading, and the time.

    A counter that stands still for `LONGEST_REFRESH` seconds has no refresh to wait for.
    """
    first, start = counter.joules(), time.perf_counter()
    calls = 0
    while True:
        work()
        calls += 1
        joules, now = counter.joules(), time.perf_counter()
        if joules != first or now - start >= LONGEST_REFRESH:
            return calls, joules, now


def idle_watts(counter: EnergyCounter | CpuEnergyCounter) -> float:
    """Return the power of the GPU or the processors in watts while this process is idle."""
    return measure_energy(lambda: time.sleep(0.1), counter, 2 * counter.window).watts
