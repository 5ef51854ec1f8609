"""What this computer is: versions, processor, GPU.

Every result that the project records carries `versions()` and `describe()`, so that
a number can be traced to what made it. Shown in `00_check_your_setup.ipynb`.
"""

import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pynvml
import torch

from helpers.settings import Settings, relative

REQUIRED = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
PACKAGES = (*REQUIRED, "tensorrt", "tensorrt-rtx-cu13", "pycuda")


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of those `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def describe() -> dict[str, Any]:
    """Return the processor, cores, memory and GPU of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cores": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.system(),
        **gpu(),
    }


def provenance() -> dict[str, Any]:
    """Return what every recorded result carries: date, machine and versions."""
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "machine": describe(), "versions": versions()}


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where none is told."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, str]:
    """Return name, compute capability and driver of the first GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    found = {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    try:
        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        found["driver"] = f"unknown ({error})"
    return found


def setup_report(settings: Settings) -> list[tuple[bool, str]]:
    """Return what the tutorial needs of this machine: is it there, and which."""
    found = versions()
    here = describe()
    # An older one than 3.11 does not get here.
    lines = [(sys.version_info < (3, 14), f"Python {found['python']}")]
    lines += [
        (package in found, f"{package} {found.get(package, 'is not installed')}")
        for package in REQUIRED
    ]
    lines.append((True, f"{here['cores']} cores, {here['memory_gib']} GiB, {here['cpu']}"))
    free = shutil.disk_usage(_existing_parent(settings.artifacts_dir)).free / 1e9
    lines.append((free > 1, f"{free:.0f} GB free for {relative(settings.artifacts_dir)}"))
    return lines


def _existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    while not path.exists():
        path = path.parent
    return path


def device() -> torch.device:
    """Return the device that PyTorch computes on here: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
