import pynvml
import pytest
import torch

from helpers.energy import EnergyCounter, EnergyError, joules_per_call


class FakeCounter:
    """A GPU that draws so many watts, on a clock that the work moves."""

    def __init__(self, clock, watts: float) -> None:
        self.clock, self.watts = clock, watts

    def joules(self) -> float:
        return 1000 + self.watts * self.clock.now


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU and its driver are here")
def test_without_a_driver_the_reader_is_told_what_is_left_out():
    with pytest.raises(EnergyError, match="images per joule are left out") as raised:
        EnergyCounter()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", ["HandleByIndex", "TotalEnergyConsumption"])
def test_a_gpu_without_a_counter_is_told_as_well(monkeypatch, call):
    def refuse(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: "gpu")
    monkeypatch.setattr(pynvml, f"nvmlDeviceGet{call}", refuse)
    with pytest.raises(EnergyError, match="Not Supported"):
        EnergyCounter()


def test_the_counter_is_read_in_joules_of_the_first_gpu(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: f"gpu {index}")
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetTotalEnergyConsumption", {"gpu 0": 12_345}.__getitem__
    )
    assert EnergyCounter().joules() == 12.345  # NVML counts in millijoules


def test_energy_is_shared_evenly_by_the_calls_of_the_window(clock):
    calls = []

    def work() -> None:
        calls.append(clock.now)
        clock.now += 0.5

    joules = joules_per_call(work, FakeCounter(clock, watts=300), seconds=5)
    assert joules == pytest.approx(150)  # 300 W for half a second
    assert len(calls) == 10


def test_the_window_is_five_seconds_by_default(clock):
    def work() -> None:
        clock.now += 1.0

    assert joules_per_call(work, FakeCounter(clock, watts=100)) == pytest.approx(100)
    assert clock.now == 5


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

    assert joules_per_call(work, counter, seconds=2) > 0
