"""Versions, processor and GPU of this computer.

Every recorded result carries `versions()` and `describe()`, so that a number can be traced to
what produced it. Shown in `00_check_your_setup.ipynb`.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

REQUIRED = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
PACKAGES = (*REQUIRED, "tensorrt", "tensorrt-rtx-cu13", "pycuda")
# The library that PyTorch's wheel asks for. One from conda-forge has it under no such name.
CUSPARSELT = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")


@cache
def versions(*others: str) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed.

    With a GPU also those of CUDA and cuSPARSELt that PyTorch uses.

    Args:
        others: packages besides `PACKAGES`.
    """
    found = {"python": platform.python_version(), **_installed(*PACKAGES, *others)}
    return found | cuda_versions() if torch.cuda.is_available() else found


@cache
def cuda_versions() -> dict[str, str]:
    """Return the versions of CUDA and cuSPARSELt that PyTorch uses; empty in a build without.

    Kernels come and go with them, and some versions of cuSPARSELt have kernels that fail.
    """
    found = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    if number := torch.backends.cusparselt.version():  # the one that PyTorch was built with
        built_with = f"{number // 1000}.{number // 100 % 10}.{number % 100}"
        found["cusparselt"] = next(iter(_installed(*CUSPARSELT).values()), built_with)
    return found


def _installed(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def describe() -> dict[str, Any]:
    """Return the processor, cores, memory and GPU of this machine."""
    return {
        "cpu": cpu_name(),
        "cores": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        **gpu(),
    }


def provenance(*others: str) -> dict[str, Any]:
    """Return the date, the machine and the versions, to be recorded with a result.

    Args:
        others: packages whose versions matter to the result, besides `PACKAGES`.
    """
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "machine": describe(), "versions": versions(*others)}


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where that is unknown."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, str]:
    """Return name, compute capability and driver of the GPU in use; empty without one."""
    if not torch.cuda.is_available():
        return {}
    import pynvml  # here: it is of no use without a driver

    major, minor = torch.cuda.get_device_capability()
    found = {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    try:
        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        found["driver"] = f"unknown ({error})"
    return found


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def numba_threads() -> Iterator[None]:
    """Give numba as many threads as PyTorch computes with, and leave PyTorch as many.

    Both may use the same OpenMP, and numba sets its number of threads when it starts, to that of
    all processors.
    """
    import numba

    threads = torch.get_num_threads()
    before = numba.get_num_threads()  # starts numba's threads, if nothing has yet
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, before))
    try:
        yield
    finally:
        numba.set_num_threads(before)
