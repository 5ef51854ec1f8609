"""A learner's copy of the project, and JupyterLab on it in a tab of a browser."""

import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import nbformat

from helpers.tutorial.artifacts import NOTEBOOKS
from helpers.tutorial.learner_copies import solved
from helpers.tutorial.settings import project_root

SCREENSHOTS = project_root() / "build" / "browser"
MINUTE = 60_000  # milliseconds
READY = re.compile(r"http://127\.0\.0\.1:(\d+)/\S*token=(\w+)")


class Project:
    """A copy of this project, for a learner, and JupyterLab on it."""

    def __init__(self, folder: Path) -> None:
        root = project_root()
        self.folder = folder
        for name in ("helpers", "notebooks", "docs"):
            skip = shutil.ignore_patterns("__pycache__", "api")
            shutil.copytree(root / name, folder / name, ignore=skip)
        names = ("PYTHONPATH", "TUTORIAL_DATA", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
        paths = (folder, root / "data", folder / "runtime", folder / "settings")
        gone = ("TUTORIAL_PRESET", "TUTORIAL_ARTIFACTS", "TQDM_DISABLE", "JUPYTER_CONFIG_PATH")
        self.environment = {key: value for key, value in os.environ.items() if key not in gone}
        self.environment |= dict(zip(names, map(str, paths), strict=True))
        self.url = self.token = ""

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of `python -m helpers`."""
        return [sys.executable, "-m", "helpers", *arguments]

    def start(self) -> subprocess.Popen:
        """Start `python -m helpers learn`, and return when it answers."""
        options = ["--no-browser", "--ServerApp.port=0", "--LabApp.expose_app_in_browser=True"]
        options.append("--ServerApp.allow_root=True")  # as in a container
        server = subprocess.Popen(
            self.command("learn", *options),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        found: queue.Queue[re.Match[str]] = queue.Queue()

        def read() -> None:
            with open(self.folder / "server.log", "w") as log:
                for line in server.stderr:
                    log.write(line)
                    if match := READY.search(line):
                        found.put(match)

        threading.Thread(target=read, daemon=True).start()
        port, self.token = found.get(timeout=120).groups()
        self.url = f"http://127.0.0.1:{port}"
        return server

    def copy(self, name: str) -> Path:
        """Return the path of a learner's copy."""
        return self.folder / "build" / "learn" / name

    def solutions(self, number: str) -> dict[str, str]:
        """Return the solution of each exercise of a notebook, by the id of its cell."""
        notebook = nbformat.read(self.folder / "notebooks" / NOTEBOOKS[number], as_version=4)
        return {
            cell.id: cell.source
            for cell in solved(notebook).cells
            if "exercise" in cell.metadata.get("tags", [])
        }


# The notebook in front, and its outputs, as JupyterLab itself sees them.
_PANEL = "const panel = window.jupyterapp.shell.currentWidget;"
_OUTPUTS = """panel.content.widgets.filter(cell => cell.model.type === 'code').map(cell => ({
    id: cell.model.id, count: cell.model.executionCount, outputs: cell.model.outputs.toJSON()
}))"""


class Lab:
    """JupyterLab in a tab of the browser."""

    def __init__(self, page: Any, project: Project) -> None:
        self.page, self.project = page, project
        page.goto(f"{project.url}/lab?token={project.token}")
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.evaluate("window.jupyterapp.restored")

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        return self.page.evaluate(expression, argument)

    def command(self, name: str, arguments: Any = None) -> Any:
        """Run one of JupyterLab's commands to its end."""
        return self.evaluate(
            "async ([name, all]) => { await window.jupyterapp.commands.execute(name, all) }",
            [name, arguments or {}],
        )

    def open(self, name: str) -> None:
        """Open a copy."""
        self.command("docmanager:open", {"path": f"build/learn/{name}"})
        self.wait_for_notebook(name)

    def wait_for_notebook(self, name: str) -> None:
        """Wait until a notebook is in front and its kernel is ready."""
        self.page.wait_for_function(
            "name => window.jupyterapp.shell.currentWidget?.context?.path.endsWith('/' + name)",
            arg=name,
        )
        self.evaluate(
            f"async () => {{ {_PANEL} await panel.revealed; await panel.sessionContext.ready }}"
        )

    def run_all(self) -> None:
        """Run all cells of the notebook in front, to the end or to an error."""
        self.command("notebook:run-all-cells")

    def start_all(self) -> None:
        """Let all cells of the notebook in front run; `wait_for_end` waits for them."""
        self.evaluate(
            "() => { window.running ="
            " window.jupyterapp.commands.execute('notebook:run-all-cells') }"
        )

    def wait_for_end(self) -> None:
        """Wait until the cells that `start_all` let run have run, or were stopped."""
        self.evaluate("async () => { await window.running }")

    def go_to(self, id: str) -> None:
        """Make a cell of the notebook in front the active one, and scroll to it."""
        self.evaluate(
            f"""async id => {{ {_PANEL}
                const place = panel.content.widgets.findIndex(cell => cell.model.id === id);
                panel.content.activeCellIndex = place;
                await panel.content.scrollToItem(place, 'center');
            }}""",
            id,
        )

    def run_cell(self, id: str) -> None:
        """Run one cell of the notebook in front to its end."""
        self.go_to(id)
        self.command("notebook:run-cell")

    def fill_in(self, sources: dict[str, str]) -> None:
        """Put code into cells of the notebook in front, by their ids."""
        filled = self.evaluate(
            f"""sources => {{ {_PANEL}
                const cells = panel.content.widgets.filter(cell => cell.model.id in sources);
                cells.forEach(cell => cell.model.sharedModel.setSource(sources[cell.model.id]));
                return cells.length;
            }}""",
            sources,
        )
        assert filled == len(sources)

    def cells(self) -> list[dict[str, Any]]:
        """Return id, count and outputs of each code cell of the notebook in front."""
        return self.evaluate(f"() => {{ {_PANEL} return {_OUTPUTS} }}")

    def wait_for_output(self, text: str, id: str | None = None, minutes: float = 1) -> None:
        """Wait until a cell of the notebook in front, or the one with this id, shows a text."""
        self.page.wait_for_function(
            f"""([text, id]) => {{ {_PANEL}
                const cells = {_OUTPUTS}.filter(cell => id === null || cell.id === id);
                return JSON.stringify(cells).includes(text);
            }}""",
            arg=[text, id],
            timeout=minutes * MINUTE,
        )

    def close(self) -> None:
        """Save and close the notebook in front, and shut its kernel down."""
        self.command("docmanager:save")
        self.evaluate(
            f"async () => {{ {_PANEL} await panel.sessionContext.shutdown(); panel.dispose() }}"
        )

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


def text_of(cell: dict[str, Any]) -> str:
    """Return what a cell shows as text."""
    parts = []
    for output in cell["outputs"]:
        text = output.get("text") or output.get("data", {}).get("text/plain") or ""
        parts.append(text if isinstance(text, str) else "".join(text))
    return "\n".join(parts)


def errors_of(cells: list[dict[str, Any]]) -> list[str]:
    """Return the errors that the cells show."""
    return [
        f"{output['ename']}: {output['evalue']}"
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
