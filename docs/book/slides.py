"""Make the slides: docs/slides.ipynb with the figures that the notebooks store.

    python docs/book/slides.py build/slides

A picture of the deck whose address is `figure:02/plot_layers` is the first one that a cell of
notebook 02 shows which calls `plot_layers`. So the slides show what the notebooks show, and need
no run. The page works without network: reveal.js comes with the package sphinx-revealjs.
"""

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

ROOT = Path(__file__).parents[2]
DECK = ROOT / "docs" / "slides.ipynb"
FIGURE = re.compile(r"\(figure:(\d\d)/(\w+)\)")


def stored_figure(number: str, call: str) -> str:
    """Return a figure that a notebook stores, as an address that holds the whole picture.

    Args:
        number: of the notebook, such as 02.
        call: the function that draws it.
    """
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and f"{call}(" in cell.source:
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    picture = output.data["image/png"].replace("\n", "")
                    return f"data:image/png;base64,{picture}"
    sys.exit(f"{path.name} stores no figure by {call}. Change the picture in {DECK.name}.")


def deck() -> nbformat.NotebookNode:
    """Return the deck with its figures."""
    notebook = nbformat.read(DECK, as_version=4)
    for cell in notebook.cells:
        cell.source = FIGURE.sub(lambda match: f"({stored_figure(*match.groups())})", cell.source)
    return notebook


def reveal_js() -> Path:
    """Return the folder of reveal.js in the package that brings it."""
    package = find_spec("sphinx_revealjs")
    if package is None or package.origin is None:
        sys.exit("reveal.js is missing. Install it with pip install '.[book]'.")
    return Path(package.origin).with_name("_static") / "revealjs"


def write_slides(folder: Path) -> Path:
    """Write the deck and reveal.js into a folder, and return the page to open."""
    exporter = SlidesExporter(
        template_name="slides",
        extra_template_basedirs=[str(Path(__file__).with_name("templates"))],
        reveal_url_prefix="reveal.js",
        reveal_theme="white",
    )
    page, _ = exporter.from_notebook_node(deck())
    shutil.copytree(reveal_js(), folder / "reveal.js", dirs_exist_ok=True)
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


if __name__ == "__main__":
    print(write_slides(Path(sys.argv[1])))
