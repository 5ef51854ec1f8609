"""The documentation against the code: names, modules and examples."""

import re

import pytest
import typer.main

import gpu
from helpers import sparsity
from helpers.tutorial import commands
from helpers.tutorial.settings import project_root

DOCS = project_root() / "docs"
API = (DOCS / "sparsity.md").read_text()
HELPERS = (DOCS / "helpers.md").read_text()


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


@pytest.mark.parametrize("path", re.findall(r"`(helpers/[\w/]+\.py)`", HELPERS))
def test_the_files_to_edit_exist(path):
    assert (project_root() / path).is_file()


def test_the_three_common_changes_name_one_file_each():
    rows = HELPERS.partition("\n## Three common changes\n")[2].partition("\n## ")[0]
    changes = re.findall(r"^\| a (.*)$", rows, re.M)
    assert len(changes) == 3
    assert all(len(re.findall(r"`helpers/[\w/]+\.py`", change)) == 1 for change in changes)


def test_the_options_of_the_gpu_benchmark_exist():
    section = HELPERS.partition("\n## Measuring a GPU\n")[2].partition("\n## ")[0]
    app = typer.Typer()
    app.command()(gpu.main)
    known = {name for option in typer.main.get_command(app).params for name in option.opts}
    known.add("--rates")  # of `advise`, which reads the record
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", section))
    assert {"--out", "--parts", "--batch-sizes"} <= named <= known


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/helpers.md",
        "docs/sparsity.md",
        "docs/cli.md",
        "docs/teaching.md",
        "docs/install.md",
    ],
)
def test_the_commands_of_the_documents_exist(page):
    text = (project_root() / page).read_text()
    known = set(typer.main.get_command(commands.app).commands)
    assert set(re.findall(r"python -m helpers ([a-z][\w-]*)", text)) <= known


CLI = (DOCS / "cli.md").read_text()


def test_the_options_of_the_command_line_page_exist():
    here = CLI.partition("\n## For users")[0] + "".join(
        line.split("|")[1] for line in CLI.splitlines() if line.count("|") == 4
    )
    options = {"--help"}
    for command in typer.main.get_command(commands.app).commands.values():
        for parameter in command.params:
            options |= {*parameter.opts, *parameter.secondary_opts}
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", here))
    assert {"--shape", "--minShapes", "--json", "--noCudaGraph"} <= named <= options
