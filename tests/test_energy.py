import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from helpers.measurement.energy import (
    CpuEnergyCounter,
    EnergyCounter,
    EnergyError,
    idle_watts,
    measure_energy,
)

UUID = "b17a6f0c-0000-1111-2222-333344445555"


class FakeNvml:
    """A GPU as NVML's documentation describes it, which draws so many watts on a clock.

    The counter holds whole millijoules, never falls, and is refreshed every 100 ms. What
    changes a GPU is not here, so that calling it fails.
    """

    def __init__(self, clock, watts: float = 300.0) -> None:
        self.clock, self.watts = clock, watts
        self.mhz, self.celsius, self.reasons = 1500, 60, 0

    def check(self, handle: str) -> None:
        if handle != f"the GPU of GPU-{UUID}":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return f"the GPU of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.check(handle)
        refreshed = int(10 * self.clock.now + 1e-6) / 10
        return 123_456_789 + int(1000 * self.watts * refreshed)

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        self.check(handle)
        assert kind == pynvml.NVML_CLOCK_SM
        return self.mhz

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        self.check(handle)
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self.celsius

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        self.check(handle)
        return self.reasons


@pytest.fixture
def nvml(clock, monkeypatch) -> FakeNvml:
    fake = FakeNvml(clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    cards = {3: SimpleNamespace(uuid=UUID)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    for name in dir(pynvml):
        if name.startswith("nvml") and callable(getattr(pynvml, name)):
            monkeypatch.setattr(pynvml, name, getattr(fake, name, None))
    return fake


def refuse(code: int):
    def call(*_: object) -> None:
        raise pynvml.NVMLError(code)

    return call


def test_the_module_is_imported_without_nvml():
    code = "import sys; sys.modules['pynvml'] = None; import helpers.measurement.energy as energy"
    code += "; print(energy.WINDOW)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "5.0\n", told.stderr


# --- the counter ---------------------------------------------------------------------------


def test_a_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnergyError, match="images per joule are left out") as raised:
        EnergyCounter()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found"),
        ("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_NOT_FOUND, "Not Found"),
        ("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NOT_SUPPORTED, "Not Supported"),
        ("nvmlDeviceGetCurrentClocksEventReasons", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, "Not F"),
    ],
)
def test_a_refusing_driver_is_reported_at_once(nvml, monkeypatch, call, code, said):
    monkeypatch.setattr(pynvml, call, refuse(code))
    with pytest.raises(EnergyError, match=said):
        EnergyCounter()


def test_the_counter_is_read_in_joules(nvml):
    assert EnergyCounter().joules() == 123_456.789  # NVML counts in millijoules


def test_the_counter_is_that_of_the_gpu_that_pytorch_uses(nvml, monkeypatch):
    """NVML counts all cards of the machine, PyTorch those that it is allowed to see."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(KeyError):
        EnergyCounter()


def test_clock_temperature_and_throttle_reasons_are_read(nvml):
    counter = EnergyCounter()
    assert counter.state().throttles == frozenset()
    nvml.reasons = pynvml.nvmlClocksEventReasonGpuIdle
    assert counter.state().throttles == frozenset(), "idling is no throttling"
    nvml.reasons |= pynvml.nvmlClocksEventReasonSwPowerCap
    nvml.reasons |= pynvml.nvmlClocksEventReasonHwThermalSlowdown
    state = counter.state()
    assert (state.sm_mhz, state.celsius) == (1500, 60)
    assert state.throttles == {"power cap", "thermal slowdown by the GPU"}


def test_every_throttle_reason_has_a_name(nvml):
    counter = EnergyCounter()
    known = pynvml.nvmlClocksEventReasonAll & ~pynvml.nvmlClocksEventReasonGpuIdle
    for bit in (1 << n for n in range(64) if known >> n & 1):
        nvml.reasons = bit
        (name,) = counter.state().throttles
        assert name


# --- the processor -------------------------------------------------------------------------


class FakeRapl:
    """Two processors of a folder as Linux shows it; each draws so many watts on a clock."""

    largest = 262_143_328_850  # microjoules

    def __init__(self, folder, clock, watts: float) -> None:
        self.folder, self.clock, self.watts = folder, clock, watts
        names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1"}
        names |= {"intel-rapl:0:0": "core", "intel-rapl:2": "psys", "dtpm": ""}
        for zone, name in names.items():
            (folder / zone).mkdir(parents=True)
            (folder / zone / "name").write_text(f"{name}\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{self.largest}\n")
        self.refresh()

    def refresh(self) -> None:
        used = int(1e6 * self.watts * self.clock.now)
        for zone, start in (("0", 123), ("1", self.largest - 5_000_000), ("0:0", 1), ("2", 2)):
            reading = (start + used) % (self.largest + 1)
            (self.folder / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{reading}\n")


@pytest.fixture
def rapl(tmp_path, clock) -> FakeRapl:
    return FakeRapl(tmp_path / "powercap", clock, watts=30.0)


def test_the_energy_of_all_processors_is_added_and_a_counter_may_start_again(rapl, clock):
    counter = CpuEnergyCounter(rapl.folder)
    assert counter.joules() == 0
    for seconds in (0.1, 1.0, 20.0):  # the second one starts again within the first second
        clock.now = seconds
        rapl.refresh()
        assert counter.joules() == pytest.approx(2 * 30 * seconds)


def test_a_window_on_a_processor_is_a_second_and_has_no_clock(rapl, clock):
    def work() -> None:
        clock.now += 0.1
        rapl.refresh()

    window = measure_energy(work, CpuEnergyCounter(rapl.folder))
    assert window.seconds == pytest.approx(1, abs=0.21)
    assert window.watts == pytest.approx(60)
    assert (window.sm_mhz, window.celsius, window.throttles) == (None, None, frozenset())


def test_a_processor_without_a_counter_is_told_in_one_sentence(tmp_path):
    with pytest.raises(EnergyError, match="processor's energy counter cannot be read") as raised:
        CpuEnergyCounter(tmp_path)
    assert "images per joule are left out" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_counter_that_only_root_may_read_says_how_to_allow_it(rapl, monkeypatch):
    read = Path.read_text

    def refuse(file: Path) -> str:
        if file.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(file)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(EnergyError, match=r"only root may read .*sudo chmod a\+r"):
        CpuEnergyCounter(rapl.folder)


def test_a_processors_counter_that_stands_still_is_told(rapl, clock):
    with pytest.raises(EnergyError, match="The processor's energy counter moved by 0"):
        measure_energy(lambda: clock.sleep(0.3), CpuEnergyCounter(rapl.folder))


# --- a window ------------------------------------------------------------------------------


def test_energy_is_shared_evenly_by_the_calls_of_the_window(nvml, clock):
    def work() -> None:
        clock.now += 0.5

    window = measure_energy(work, EnergyCounter())
    assert window.calls == 10 + 1, "five seconds by default, and one call to the next refresh"
    assert window.seconds == 5.5
    assert window.joules_per_call == pytest.approx(150)  # 300 W for half a second
    assert window.watts == pytest.approx(300)


@pytest.mark.parametrize("begin", [0.0, 0.033, 0.099])
def test_the_counters_refresh_costs_next_to_nothing(nvml, clock, begin):
    """Windows of the same length at any time would be off by up to 2 %, that is 0.1 s of 5 s."""
    clock.now = begin

    def work() -> None:
        clock.now += 0.017

    assert measure_energy(work, EnergyCounter()).watts == pytest.approx(300, rel=0.0035)


def test_what_the_gpu_went_through_in_the_window_is_kept(nvml, clock):
    seconds = iter(
        [
            (1500, 60, 0),  # before the window
            (1400, 60, 0),
            (1500, 70, pynvml.nvmlClocksEventReasonSwPowerCap),
            (1600, 65, 0),
            (1600, 65, 0),  # to the next refresh
        ]
    )

    def work() -> None:
        clock.now += 1.0
        nvml.mhz, nvml.celsius, nvml.reasons = next(seconds)

    window = measure_energy(work, EnergyCounter(), seconds=3)
    assert window.sm_mhz == pytest.approx((1500 + 1400 + 1500) / 3)
    assert window.celsius == 70
    assert window.throttles == {"power cap"}


def test_the_gpu_is_asked_for_its_state_once_a_second(nvml, clock, monkeypatch):
    counter, asked = EnergyCounter(), []
    state = EnergyCounter.state

    def spy(self):
        asked.append(clock.now)
        return state(self)

    monkeypatch.setattr(EnergyCounter, "state", spy)

    def work() -> None:
        clock.now += 0.125

    measure_energy(work, counter)
    assert asked == [0.125 + second for second in range(5)], "from the first refresh on"


@pytest.mark.parametrize("watts", [0.0, -300.0])
def test_a_counter_that_stands_still_or_is_reset_is_not_a_measurement(nvml, clock, watts):
    nvml.watts = watts

    def work() -> None:
        clock.now += 1.0

    with pytest.raises(EnergyError, match="stands still, or the driver was reloaded"):
        measure_energy(work, EnergyCounter())


def test_a_gpu_lost_while_measuring_is_reported(nvml, clock, monkeypatch):
    def work() -> None:
        clock.now += 1.0
        monkeypatch.setattr(
            pynvml,
            "nvmlDeviceGetTotalEnergyConsumption",
            refuse(pynvml.NVML_ERROR_GPU_IS_LOST),
        )

    with pytest.raises(EnergyError, match="GPU is lost"):
        measure_energy(work, EnergyCounter())


def test_idle_power_is_measured_while_nothing_runs(nvml, clock):
    nvml.watts = 70.0
    assert idle_watts(EnergyCounter()) == pytest.approx(70)
    assert clock.now == pytest.approx(10, rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_a_real_gpu_uses_energy():
    try:
        counter = EnergyCounter()
    except EnergyError as error:
        pytest.skip(str(error))
    x = torch.randn(4096, 4096, device="cuda")

    def work() -> None:
        x @ x
        torch.cuda.synchronize()

    window = measure_energy(work, counter, seconds=2)
    assert window.joules > 0
    assert window.sm_mhz > 0
