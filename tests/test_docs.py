"""The documentation against the code: names, modules and examples."""

import ast
import re

import pytest

from helpers import sparsity
from helpers.tutorial.settings import project_root

DOCS = project_root() / "docs"
API = (DOCS / "sparsity.md").read_text()
MODULES = (DOCS / "helpers.md").read_text()


@pytest.mark.parametrize("name", [name for name in sparsity.__all__ if name[0].islower()])
def test_every_public_function_is_on_the_api_page(name):
    assert f"`{name}(" in API or f"`{name}`" in API


@pytest.mark.parametrize("name", re.findall(r"`([a-z]\w+)\(", API))
def test_the_api_page_names_nothing_that_does_not_exist(name):
    assert hasattr(sparsity, name) or name == "state_dict"


def test_the_example_of_the_api_page_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", API, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/sparsity.md", "exec"), {})
    assert (tmp_path / "sparse.safetensors").exists()


def test_every_module_is_in_the_table_of_modules():
    package = project_root() / "helpers"
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if not path.name.startswith("_") or path.stem == "__main__":
            assert f"`{name}`" in MODULES, name


def test_a_module_knows_only_those_above_it_in_the_table():
    order = re.findall(r"^\| `([\w.]+)` \|", MODULES.partition("\n## ")[0], re.M)
    package = project_root() / "helpers"
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if name in order and isinstance(node, ast.ImportFrom) and node.module:
                for known in {node.module, *(f"{node.module}.{each.name}" for each in node.names)}:
                    known = known.removeprefix("helpers.")
                    if known in order:
                        assert order.index(known) < order.index(name), f"{name} knows {known}"
