"""pyproject.toml, environment.yml and requirements.lock describe one environment."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from helpers import machine
from helpers.tutorial.settings import project_root

PROJECT = tomllib.loads((project_root() / "pyproject.toml").read_text())["project"]
CONDA_TEXT = (project_root() / "environment.yml").read_text()
LOCK_TEXT = (project_root() / "requirements.lock").read_text()
EXTRAS = ("notebooks", "gpu", "serving", "book", "browser", "dev")


def declared(*extras: str) -> dict[str, Requirement]:
    """Return what pyproject.toml asks for, with these extras, by name."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = {Requirement(line).name: Requirement(line) for line in lines}
    assert len(found) == len(lines), "a package is asked for twice"
    return found


def conda() -> dict[str, Requirement]:
    """Return what environment.yml asks for, from conda-forge and from PyPI, by name."""
    *lines, last = yaml.safe_load(CONDA_TEXT)["dependencies"]
    lines = [line for line in lines if line != "pip" and not line.startswith("python=")]
    lines += [line for line in last["pip"] if not line.startswith("--editable")]
    found = {Requirement(line).name: Requirement(line) for line in lines}
    assert len(found) == len(lines), "a package is asked for twice"
    return found


def locked() -> dict[str, list[Requirement]]:
    """Return the pins of requirements.lock by name: one for each platform or Python."""
    found: dict[str, list[Requirement]] = {}
    for line in LOCK_TEXT.splitlines():
        if not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            found.setdefault(requirement.name, []).append(requirement)
    return found


def test_the_extras_are_those_the_documents_name():
    assert set(PROJECT["optional-dependencies"]) == set(EXTRAS)


def test_pyproject_and_environment_name_the_same_packages():
    assert set(declared(*EXTRAS)) == set(conda())


@pytest.mark.parametrize("name", declared(*EXTRAS))
def test_pyproject_and_environment_agree_on_the_bounds(name):
    bound = declared(*EXTRAS)[name].specifier
    assert bound == conda()[name].specifier
    operators = {part.operator for part in bound}
    assert ">=" in operators
    assert "==" not in operators, "the exact versions are the lock's business"


@pytest.mark.parametrize(
    "name",
    ["jupyterlab", "torch", "torchvision", "onnx", "tensorrt-cu13", "pycuda", "nbmake"],
)
def test_the_environment_has_what_the_case_study_is_made_of(name):
    assert name in conda()
    assert name in declared(*EXTRAS)


def test_every_package_says_what_it_is_for():
    lines = CONDA_TEXT.partition("dependencies:")[2].splitlines()
    packages = [line for line in lines if re.match(r"\s+- [a-z]", line) and ">=" in line]
    assert len(packages) == len(conda())
    assert all(re.search(r">=[\d.,<]+ +# \w", line) for line in packages)


@pytest.mark.parametrize("name", declared("notebooks", "serving", "book", "dev"))
def test_every_direct_dependency_is_pinned_within_its_bound(name):
    bound = declared("notebooks", "serving", "book", "dev")[name].specifier
    assert name in locked()
    for pin in locked()[name]:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert version.version in bound


def test_everything_in_the_lock_is_pinned():
    assert len(locked()) > 50
    for name, pins in locked().items():
        for pin in pins:
            assert [item.operator for item in pin.specifier] == ["=="], name
            assert pin.url is None


def test_the_lock_names_no_package_index():
    assert not re.search(r"https?://|^\s*--?(extra-)?(index|find-links|i |f )", LOCK_TEXT, re.M)


def test_the_lock_is_made_as_the_makefile_makes_it():
    recipe = (project_root() / "Makefile").read_text().partition("\nlock:")[2]
    header = LOCK_TEXT.partition("uv pip compile ")[2].splitlines()[0]
    assert "--universal" in header
    assert set(header.split()) <= set(recipe.split())


def test_no_file_is_a_link():
    """Git for Windows checks links out as small text files."""
    folders = ("benchmarks", "data", "docs", "helpers", "notebooks", "tests")
    files = [*project_root().glob("*.*")]
    files += [path for folder in folders for path in (project_root() / folder).rglob("*")]
    assert len(files) > 200
    assert not [path for path in files if path.is_symlink()]


def test_the_range_of_python_is_the_same_everywhere():
    allowed = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(20) if Version(f"3.{minor}") in allowed]
    chosen, low, high = re.search(
        r"- python=(\d\.\d+) +# (\d\.\d+) to (\d\.\d+)$", CONDA_TEXT, re.M
    ).groups()
    assert (low, high) == (minors[0], minors[-1])
    assert chosen in minors
    assert f"--python-version {low} " in LOCK_TEXT
    notebook = (project_root() / "notebooks" / "00_check_your_setup.ipynb").read_text()
    assert f"Python {low} to {high}" in notebook


def test_the_versions_that_are_recorded_are_those_of_packages_we_ask_for():
    renamed = {"tensorrt-cu13": "tensorrt"}  # what NVIDIA's wheel calls itself when installed
    known = {renamed.get(name, name) for name in declared(*EXTRAS)}
    assert set(machine.PACKAGES) <= known
