"""Check that this machine has what the tutorial needs.

Shown in `00_check_your_setup.ipynb`.
"""

import shutil
import sys
from pathlib import Path

from helpers import machine
from helpers.files import write_json
from helpers.inference import engine
from helpers.machine import REQUIRED, describe, versions
from helpers.tutorial import backends
from helpers.tutorial.artifacts import Artifacts
from helpers.tutorial.settings import Settings, relative


def setup_report(settings: Settings) -> list[tuple[bool, str]]:
    """Return what the tutorial needs of this machine: whether it is there, and which."""
    found = versions()
    here = describe()
    # Before 3.11 this package does not even import.
    lines = [(sys.version_info < (3, 14), f"Python {found['python']}")]
    lines += [
        (package in found, f"{package} {found.get(package, 'is not installed')}")
        for package in REQUIRED
    ]
    cores = f"{here['cores']} core{'s' if here['cores'] > 1 else ''}"
    lines.append((True, f"{cores}, {here['memory_gib']} GiB, {here['cpu']}"))
    free = shutil.disk_usage(_existing_parent(settings.artifacts_dir)).free / 1e9
    lines.append((free > 1, f"{free:.0f} GB free for {relative(settings.artifacts_dir)}"))
    return lines


def _existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    while not path.exists():
        path = path.parent
    return path


def check_setup(settings: Settings) -> None:
    """Print what the tutorial finds on this machine, and record it for the next steps."""
    for fine, line in setup_report(settings):
        print(f"[{'OK' if fine else 'FAIL'}] {line}")
    builder = None
    if reason := engine.why_no_builder():
        print(f"[--] engines: {reason}")
    else:
        builder = engine.find_builder()
        print(f"[OK] engines: {builder.name} {builder.version} ({builder.why})")
    for backend, reason in backends.backend_status().items():
        if reason:
            print(f"[--] inference with {backend}: {reason}")
        else:
            print(f"[OK] inference with {backend}")
    with Artifacts(settings).writing("00_setup.json") as path:
        write_json(path, {"machine": machine.describe(), "builder": builder and builder.name})
