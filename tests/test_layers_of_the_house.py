"""Imports go down only, in the order of docs/helpers.md, and the wheel holds every module."""

import ast
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import helpers
from helpers.tutorial.settings import project_root

ROOT = project_root()
PACKAGE = ROOT / "helpers"
FLOORS = [
    "helpers", "helpers.sparsity", "helpers.training", "helpers.inference", "helpers.measurement",
    "helpers.serving", "helpers.tutorial",
]  # fmt: skip


def documented() -> list[str]:
    """Return the modules of the tables of docs/helpers.md, from the lowest floor up."""
    house = (ROOT / "docs" / "helpers.md").read_text()
    floors = house.partition("\n## The floors\n")[2].partition("\n## ")[0]
    found = []
    for section in floors.split("\n### ")[1:]:
        floor = re.search(r"`(helpers[.\w]*)`$", section.splitlines()[0])[1]
        found += [f"{floor}.{name}" for name in re.findall(r"^\| `(\w+)` \|", section, re.M)]
    return found


ORDER = documented()


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    """Return every module of the package but `__main__`, packages included."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


@cache
def imports(module: str) -> list[tuple[str, str, str | None]]:
    """Return each import from `helpers`, wherever in a module: its local name, module and name."""
    found: list[tuple[str, str, str | None]] = []
    for node in ast.walk(ast.parse(source(module).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports are not followed by this test"
            if (node.module or "").partition(".")[0] == "helpers":
                found += [(a.asname or a.name, node.module, a.name) for a in node.names]
        elif isinstance(node, ast.Import):
            found += [
                (a.asname or a.name, a.name, None)
                for a in node.names
                if a.name.partition(".")[0] == "helpers"
            ]
    return found


def origins(module: str, name: str | None) -> set[str]:
    """Return the modules that an import needs: those it passes through and the last, which defines.

    A package only passes on what its modules define, so it does not count itself.
    """
    if name is None:
        return {module}
    if source(f"{module}.{name}").exists():
        return {f"{module}.{name}"}
    passed = set() if source(module).name == "__init__.py" else {module}
    imported = [origins(*target) for local, *target in imports(module) if local == name]
    if imported:
        return passed.union(*imported)
    thing = getattr(importlib.import_module(module), name)  # perhaps by a lazy `__getattr__`
    defined = getattr(thing, "__name__" if isinstance(thing, ModuleType) else "__module__", "")
    return passed | {defined if defined.startswith("helpers.") else module}


def needs(module: str) -> set[str]:
    return set().union(*(origins(*target) for _, *target in imports(module)))


def test_every_module_is_in_the_house_once():
    inside = [
        name
        for name in modules()
        if source(name).name not in ("__init__.py", "__main__.py")
        and not name.startswith("helpers.tutorial.answers.")  # by number; `exercises` reads them
    ]
    assert sorted(ORDER) == inside
    assert list(dict.fromkeys(name.rpartition(".")[0] for name in ORDER)) == FLOORS


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_below_and_before_it(module):
    for known in needs(module) - {"helpers"}:
        if known == "helpers.tutorial":  # its own `__init__`, which knows the errors alone
            assert module.startswith("helpers.tutorial.")
        else:
            assert known in ORDER[: ORDER.index(module)], f"{module} knows {known}"


@pytest.mark.parametrize("floor", FLOORS)
def test_a_package_imports_nothing_from_above_it(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for known in needs(floor):
        assert known.rpartition(".")[0] not in above, f"{floor} knows {known}"


@pytest.mark.parametrize(
    ("module", "name", "needed"),
    [
        ("helpers.sparsity.masks", "is_2to4", {"helpers.sparsity.masks"}),
        ("helpers.sparsity", "is_2to4", {"helpers.sparsity.masks"}),
        ("helpers.sparsity", "verify_onnx", {"helpers.sparsity.verify"}),
        ("helpers.sparsity", "masks", {"helpers.sparsity.masks"}),
        ("helpers", "machine", {"helpers.machine"}),
        ("helpers", "__version__", {"helpers"}),
        ("helpers.machine", None, {"helpers.machine"}),
        ("helpers.files", "WriteError", {"helpers.files", "helpers.errors"}),
        ("helpers.measurement.roofline", "DATASHEETS", {"helpers.measurement.roofline"}),
    ],
)
def test_an_import_is_followed_to_the_module_that_defines_the_object(module, name, needed):
    assert origins(module, name) == needed


@pytest.fixture
def copied_house(monkeypatch, tmp_path):
    """Let the tests of this module look at a copy of the package, which may be changed."""
    shutil.copytree(PACKAGE, tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name, value in (("ROOT", tmp_path), ("PACKAGE", tmp_path / "helpers")):
        monkeypatch.setattr(sys.modules[__name__], name, value)
    imports.cache_clear()
    yield tmp_path / "helpers"
    imports.cache_clear()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("helpers.files", "from helpers.machine import versions"),  # the same floor, further down
        ("helpers.files", "from helpers import machine"),
        ("helpers.files", "import helpers.tutorial.settings as settings"),
        ("helpers.machine", "from helpers.tutorial import print_log"),
        ("helpers.layers", "from helpers.sparsity import is_2to4"),
        ("helpers.sparsity.masks", "from helpers.sparsity import verify_onnx"),  # lazily imported
        ("helpers.sparsity.prune", "from helpers.inference.runners import Runner as Sparse"),
        ("helpers.inference.engine", "def late(): from helpers.tutorial import artifacts"),
        ("helpers.inference.fold", "if False: from helpers.measurement.gemm import why_not"),
    ],
)
def test_an_import_that_runs_upwards_is_found(copied_house, module, line):
    test_a_module_imports_only_from_below_and_before_it(module)
    path = source(module)
    path.write_text(f"{path.read_text()}\n{line}\n")
    imports.cache_clear()
    with pytest.raises(AssertionError, match=f"{module} knows|startswith"):
        test_a_module_imports_only_from_below_and_before_it(module)


def test_one_local_name_does_not_hide_another_import(copied_house):
    (copied_house / "machine.py").write_text(
        "def one(): from helpers.tutorial import settings as x\n"
        "def two(): from helpers import errors as x\n"
    )
    assert needs("helpers.machine") == {"helpers.tutorial.settings", "helpers.errors"}


def test_a_package_that_imports_from_above_is_found(copied_house):
    (copied_house / "sparsity" / "__init__.py").write_text("from helpers.training import loop\n")
    with pytest.raises(AssertionError, match=r"helpers\.sparsity knows helpers\.training\.loop"):
        test_a_package_imports_nothing_from_above_it("helpers.sparsity")


def test_a_module_that_is_not_in_the_house_is_found(copied_house):
    (copied_house / "training" / "stray.py").touch()
    assert "helpers.training.stray" in modules()
    with pytest.raises(AssertionError):
        test_every_module_is_in_the_house_once()


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import helpers
for each in pkgutil.walk_packages(helpers.__path__, "helpers."):
    print(importlib.import_module(each.name).__file__)
"""


def test_the_wheel_holds_every_module_and_says_that_it_is_typed(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    kept = ("*.py", "*.json", "*.yaml", "py.typed")
    for path in [path for pattern in kept for path in PACKAGE.rglob(pattern)]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    installed = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel)
    assert (installed / "helpers" / "py.typed").exists()
    assert (installed / "helpers" / "measurement" / "calibration.json").exists()
    assert (installed / "helpers" / "tutorial" / "recipes" / "full.yaml").exists()

    here = {each.name for each in pkgutil.walk_packages(helpers.__path__, "helpers.")}
    imported = run("-I", "-c", IMPORT_EVERYTHING, installed).splitlines()
    assert len(imported) == len(here)
    assert all(Path(file).is_relative_to(installed) for file in imported)
