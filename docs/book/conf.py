"""How Sphinx makes the book: the notebooks with their stored outputs, the docs, the API.

`make book` builds it into `build/book`. The source is the whole repository, so that the links
that work on GitHub work in the book too.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
CONTENTS = Path(__file__).with_name("contents.md")
sys.path.insert(0, str(ROOT))

import helpers  # noqa: E402

project = "2:4 sparsity, step by step"
author = "the maintainers"
copyright = "its authors; text and figures CC BY 4.0, code Apache-2.0"
version = release = helpers.__version__

root_doc = "README"
include_patterns = [
    "README.md",
    "notebooks/*.ipynb",
    "docs/*.md",
    "docs/api/*.rst",
    "data/README.md",
    "data/*/README.md",
    "benchmarks/README.md",
]
exclude_patterns = [".venv*", ".git", "build", "artifacts", "docs/book"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# The notebooks are shown as they were stored.
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4

default_role = "literal"  # `name` in a docstring is code
napoleon_use_ivar = True
autosummary_generate = False  # sphinx-apidoc makes the pages
viewcode_follow_imported_members = False  # a name has its source where it is defined
autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["book.css"]


def add_contents(app: Sphinx, document: str, source: list[str]) -> None:
    """Give the front page, which is the README, the table of contents."""
    if document == root_doc:
        source[0] += "\n" + CONTENTS.read_text()


def describe_figures(app: Sphinx, document: str, source: list[str]) -> None:
    """Give the figures of a notebook the descriptions that its cells have for readers who hear."""
    if document.startswith("notebooks/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if "alt" in cell["metadata"]:
                cell["metadata"]["mystnb"] = {"image": {"alt": cell["metadata"]["alt"]}}
        source[0] = json.dumps(notebook)


def write_front_page(app: Sphinx, error: Exception | None) -> None:
    """Let the site open with the README: servers look for index.html."""
    if error is None and app.builder.format == "html":
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", add_contents)
    app.connect("source-read", describe_figures)
    app.connect("build-finished", write_front_page)
    return {}
