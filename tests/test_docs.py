"""The documentation against the code: names, modules and examples."""

import re

import pytest

from helpers import sparsity
from helpers.settings import project_root

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


def test_links_lead_to_files():
    for page in (*DOCS.glob("*.md"), project_root() / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
