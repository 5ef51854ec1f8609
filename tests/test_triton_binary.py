"""The server's own environment: where it can be made, and that it is made whole or not at all."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.errors import WriteError
from helpers.serving import triton_binary
from helpers.serving.errors import ServingError
from helpers.serving.triton_binary import find_triton, why_no_triton


@pytest.fixture
def able(monkeypatch):
    """A machine on which the server runs."""
    monkeypatch.setattr(triton_binary.platform, "system", lambda: "Linux")
    monkeypatch.setattr(triton_binary.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(triton_binary.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(triton_binary, "PYTHONS", (sys.version_info[:2],))
    monkeypatch.setattr(triton_binary, "_library_folder", lambda: Path("/usr/lib"))


@pytest.fixture
def pip(monkeypatch):
    """A pip that installs the files that the environment needs, or fails."""
    state = SimpleNamespace(fails=False, calls=[])

    def run(command, **_):
        state.calls.append(command)
        if state.fails:
            error = "noise\nERROR: No matching distribution found for nvidia-pytriton==0.7.0\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        packages = Path(command[command.index("--target") + 1])
        server = packages / "pytriton" / "tritonserver"
        own = server / "python_backend_stubs" / "{}.{}".format(*sys.version_info)
        for path in (
            server / "bin" / "tritonserver",
            server / "backends" / "python" / "libtriton_python.so",
            own / "triton_python_backend_stub",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(triton_binary.subprocess, "run", run)
    # Making a virtual environment takes seconds and is Python's own work.
    monkeypatch.setattr(
        triton_binary.venv, "EnvBuilder", lambda **_: SimpleNamespace(create=create)
    )
    return state


def create(folder: Path) -> None:
    major, minor = sys.version_info[:2]
    (folder / "lib" / f"python{major}.{minor}" / "site-packages").mkdir(parents=True)


def test_it_is_made_once(able, pip, tmp_path):
    first = find_triton(tmp_path / "triton")
    assert find_triton(tmp_path / "triton") == first
    (command,) = pip.calls
    assert {"nvidia-pytriton==0.7.0", "numpy==1.26.4", "--no-deps"} <= set(command)
    assert first.program.stat().st_mode & 0o111
    assert (first.backends / "python" / "triton_python_backend_stub").stat().st_mode & 0o111
    assert [path.name for path in tmp_path.iterdir()] == ["triton"]


def test_the_packages_of_this_python_come_after_the_environments_own(able, pip, tmp_path):
    (line,) = (
        (find_triton(tmp_path / "triton").packages / "this_project.pth").read_text().split("\n")[:1]
    )
    assert triton_binary._project_packages() in line


def test_a_failed_installation_leaves_nothing_and_says_why(able, pip, tmp_path):
    pip.fails = True
    with pytest.raises(ServingError, match=r"No matching distribution found .* nothing was left"):
        find_triton(tmp_path / "triton")
    assert not list(tmp_path.iterdir())
    pip.fails = False
    assert find_triton(tmp_path / "triton").program.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(able, pip, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="XDG_CACHE_HOME"):
        find_triton(tmp_path / "file" / "triton")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("platform.system", lambda: "Windows", "Linux on x86-64, and this is Windows"),
        ("platform.machine", lambda: "aarch64", "Linux on aarch64"),
        ("platform.libc_ver", lambda: ("glibc", "2.34"), "needs glibc 2.35 .* has glibc 2.34"),
        ("platform.libc_ver", lambda: ("", ""), "has another C library"),
        ("PYTHONS", ((2, 7),), "runs models in Python 2.7, and this is Python 3"),
        ("_library_folder", lambda: None, "no shared library libpython3"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_so(able, monkeypatch, tmp_path, name, value, reason):
    assert why_no_triton() == ""
    monkeypatch.setattr(f"helpers.serving.triton_binary.{name}", value)
    with pytest.raises(ServingError, match=reason):
        find_triton(tmp_path / "triton")
    assert not list(tmp_path.iterdir())


def test_the_cache_can_be_moved_and_belongs_to_this_python(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = triton_binary.default_folder()
    assert folder.is_relative_to(tmp_path)
    monkeypatch.setattr(triton_binary, "_project_packages", lambda: "/elsewhere")
    assert triton_binary.default_folder() != folder


def test_the_servers_environment_comes_first(able, monkeypatch, tmp_path):
    triton = triton_binary.TritonBinary(tmp_path)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/own")
    monkeypatch.setenv("PYTHONHOME", "/other")
    variables = triton.variables()
    assert variables["PATH"] == f"{tmp_path / 'bin'}:/bin"
    libraries = variables["LD_LIBRARY_PATH"].split(":")
    assert libraries == ["/usr/lib", str(triton.packages / "nvidia_pytriton.libs"), "/own"]
    assert "PYTHONHOME" not in variables
