"""A Triton Inference Server for this machine, from PyPI, in an environment of its own.

The wheel `nvidia-pytriton` contains NVIDIA's own `tritonserver`, with the backend that runs
Python. That backend was compiled before NumPy 2 and returns empty answers with it, while this
project needs NumPy 2. So the first use makes a small environment with the server and with
NumPy 1.26, the last version before 2. Everything else is read from the environment of this
Python, so the models are computed by the same version of ONNX Runtime as elsewhere.

The environment is kept in the user's cache and not among the artifacts: it takes 220 MB, depends
on this Python alone, and outlives `make clean`. Explained in `09_serve_with_triton.ipynb`.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import WriteError
from helpers.files import shown
from helpers.serving.errors import ServingError

# The server's version is that of Triton 24.10, the one in this wheel.
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
PYTHONS = ((3, 11), (3, 12))  # for which the wheel has a stub, and NumPy 1.26 a wheel
GLIBC = (2, 35)  # of Ubuntu 22.04 and Debian 12

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TritonBinary:
    """The folder of the environment, and what of it starts a server."""

    folder: Path

    @property
    def packages(self) -> Path:
        """The folder of the environment's packages."""
        major, minor = sys.version_info[:2]
        return self.folder / "lib" / f"python{major}.{minor}" / "site-packages"

    @property
    def program(self) -> Path:
        """The program `tritonserver`."""
        return self.packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"

    @property
    def backends(self) -> Path:
        """The folder of the backends, which has one: `python`."""
        return self.folder / "backends"

    def variables(self) -> dict[str, str]:
        """Return the environment variables that the server needs, with all others of this process.

        The backend starts the Python that it finds first on the path. Without the folder of
        this Python's own library it may load that of another Python.
        """
        libraries = [str(_library_folder()), str(self.packages / "nvidia_pytriton.libs")]
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONHOME"}
        if own := variables.get("LD_LIBRARY_PATH"):
            libraries.append(own)
        path = f"{self.folder / 'bin'}{os.pathsep}{variables.get('PATH', os.defpath)}"
        return variables | {"PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}


def why_no_triton() -> str:
    """Return in one sentence why the server cannot run on this machine; empty if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return (
            "The Triton server on PyPI is for Linux on x86-64, and this is "
            f"{platform.system()} on {platform.machine()}; the model repository that is written "
            "here runs in NVIDIA's container."
        )
    name, version = platform.libc_ver()
    found = tuple(int(part) for part in version.split(".")) if version else ()
    if name != "glibc" or found < GLIBC:
        return (
            f"The Triton server on PyPI needs glibc {'.'.join(map(str, GLIBC))} or later, and this "
            f"system has {name or 'another C library'} {version}; use a newer one, such as Debian "
            "12 or Ubuntu 22.04, or NVIDIA's container."
        )
    if sys.version_info[:2] not in PYTHONS:
        known = " and ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        return (
            f"The Triton server on PyPI runs models in Python {known}, and this is Python "
            f"{platform.python_version()}; make the environment of this project with one of those."
        )
    if _library_folder() is None:
        return (
            f"This Python has no shared library {_library_name()}, which the Triton server loads; "
            "install it (Debian and Ubuntu: the package libpython3), or use another Python."
        )
    return ""


def _library_name() -> str:
    major, minor = sys.version_info[:2]
    return f"libpython{major}.{minor}.so.1.0"


def _library_folder() -> Path | None:
    """Return the folder of this Python's shared library, if there is one."""
    folder = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    candidates = (folder, folder / (sysconfig.get_config_var("MULTIARCH") or ""))
    return next((each for each in candidates if (each / _library_name()).exists()), None)


def default_folder() -> Path:
    """Return where the environment of this Python is kept, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = hashlib.sha256(repr((PACKAGES, _project_packages())).encode()).hexdigest()[:12]
    return cache / "sparsity-2to4" / f"triton-{own}"


def _project_packages() -> str:
    return sysconfig.get_path("purelib")


def find_triton(folder: Path | None = None) -> TritonBinary:
    """Return the server's environment, which is made if it is not there; that takes a minute.

    The first call downloads 75 MB with pip.

    Args:
        folder: of the environment; in the user's cache unless given.

    Raises:
        ServingError: the server cannot run on this machine, or a package cannot be installed.
        WriteError: the folder cannot be written.
    """
    if reason := why_no_triton():
        raise ServingError(reason)
    folder = Path(folder or default_folder())
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        except OSError as error:
            raise WriteError(
                f"{shown(folder)} could not be written ({error.strerror}). Give another folder, "
                "or set XDG_CACHE_HOME to one."
            ) from error
        try:
            _logger.info("installing %s in %s", " and ".join(PACKAGES), shown(folder))
            _make(TritonBinary(part))
            if not folder.exists():  # another process may have been faster
                part.chmod(0o755)
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return TritonBinary(folder)


def _make(triton: TritonBinary) -> None:
    """Fill a new folder with a Python, the packages and the backend."""
    venv.EnvBuilder(symlinks=True).create(triton.folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--target", str(triton.packages)]
    done = subprocess.run([*command, *options, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else done.stderr.strip()
        raise ServingError(
            f"pip could not install {' and '.join(PACKAGES)}: {reason.rstrip('.')}. Check the "
            "connection to PyPI and try again; nothing was left behind."
        )
    # This Python's packages follow those of the environment, so NumPy is the older one.
    follow = f"import site; site.addsitedir({_project_packages()!r})\n"
    (triton.packages / "this_project.pth").write_text(follow)
    server = triton.program.parents[1]
    major, minor = sys.version_info[:2]
    backend = triton.backends / "python"
    shutil.copytree(server / "backends" / "python", backend)
    stub = server / "python_backend_stubs" / f"{major}.{minor}" / "triton_python_backend_stub"
    shutil.copy(stub, backend)
    for program in (triton.program, backend / stub.name):
        program.chmod(0o755)
