import re
from collections import namedtuple
from datetime import date
from importlib import metadata

import pynvml
import pytest
import torch

from helpers import machine
from helpers.tutorial import setup
from helpers.tutorial.settings import Settings


@pytest.fixture(autouse=True)
def nothing_is_cached():
    def clear() -> None:
        machine.versions.cache_clear()
        machine.cuda_versions.cache_clear()
        machine.describe.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "600.1")


def hide(monkeypatch, *names: str) -> None:
    """Let these packages look as if they were not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def failures(settings: Settings) -> list[str]:
    return [line for fine, line in setup.setup_report(settings) if not fine]


def test_versions_are_those_of_the_installed_packages():
    found = machine.versions()
    assert found["torch"] == metadata.version("torch")
    assert re.fullmatch(r"3\.\d+\.\d+\S*", found["python"])
    assert set(found) - {"cuda", "cusparselt"} <= {"python", *machine.PACKAGES}


def test_a_gpu_adds_the_versions_of_its_libraries(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    monkeypatch.setattr(machine, "CUSPARSELT", ("pytest",))
    libraries = {"cuda": "13.0", "cusparselt": metadata.version("pytest")}
    assert machine.versions().items() >= libraries.items(), "the installed one is what runs"
    machine.cuda_versions.cache_clear()
    monkeypatch.setattr(machine, "CUSPARSELT", ("no such package",))
    assert machine.cuda_versions()["cusparselt"] == "0.8.1"


def test_a_build_for_cpus_has_neither_cuda_nor_cusparselt(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: None)
    assert machine.cuda_versions() == {}


def test_versions_of_other_packages_are_added():
    found = machine.versions("numpy", "no-such-package")
    assert found == machine.versions() | {"numpy": metadata.version("numpy")}
    assert machine.provenance("numpy")["versions"] == found


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    hide(monkeypatch, "onnx", "tensorrt", "pycuda")
    found = machine.versions()
    assert "onnx" not in found
    assert "onnxruntime" in found


def test_the_machine_is_described_by_processor_cores_and_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = machine.describe()
    assert here["cpu"] == machine.cpu_name() != ""
    assert here["cores"] == torch.get_num_threads()
    assert here["memory_gib"] > 0
    assert "gpu" not in here


def test_the_machine_is_described_by_its_gpu(fake_gpu):
    gpu = {"gpu": "a fake GPU", "compute_capability": "8.6", "driver": "600.1"}
    assert machine.gpu() == gpu
    assert machine.describe().items() >= gpu.items()
    assert machine.device() == torch.device("cuda")


def test_a_driver_that_does_not_answer_is_recorded_as_unknown(fake_gpu, monkeypatch):
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert machine.gpu()["driver"].startswith("unknown (")


def test_without_a_gpu_everything_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpu() == {}
    assert machine.device() == torch.device("cpu")


def test_every_record_carries_date_machine_and_versions():
    record = machine.provenance()
    assert set(record) == {"date", "machine", "versions"}
    assert abs((date.today() - date.fromisoformat(record["date"])).days) <= 1
    assert record["machine"] == machine.describe()
    assert record["versions"] == machine.versions()


def test_the_setup_report_is_fine_here(tiny_settings):
    assert failures(tiny_settings) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "torchvision"])
def test_the_setup_report_flags_a_missing_package(monkeypatch, tiny_settings, package):
    hide(monkeypatch, package)
    assert failures(tiny_settings) == [f"{package} is not installed"]


def test_the_setup_report_flags_a_full_disk(monkeypatch, tiny_settings):
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(path) -> usage:
        asked.append(path)
        return usage(10e9, 9.5e9, 0.5e9)

    monkeypatch.setattr(setup.shutil, "disk_usage", disk_usage)
    (line,) = failures(tiny_settings)
    assert "GB free" in line
    assert asked[0].exists(), "asked for a folder that is there"


def test_the_setup_report_flags_a_python_that_is_too_new(monkeypatch, tiny_settings):
    monkeypatch.setattr(setup.sys, "version_info", (3, 14, 0))
    (line,) = failures(tiny_settings)
    assert line.startswith("Python 3")
