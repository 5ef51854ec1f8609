"""What JupyterLab may write while somebody learns."""

import pytest

from helpers.tutorial.learner_files import LearnerFiles


@pytest.fixture
def files(tmp_path) -> LearnerFiles:
    for name in ("notebooks/00_a.ipynb", "build/learn/00_a.ipynb", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return LearnerFiles(root_dir=str(tmp_path))


@pytest.mark.parametrize(
    "path", ["", "README.md", "notebooks", "notebooks/00_a.ipynb", "build", "/notebooks/00_a.ipynb"]
)
def test_the_files_of_the_project_are_read_only(files, path):
    assert not files.is_writable(path)


@pytest.mark.parametrize("path", ["build/learn", "build/learn/00_a.ipynb", "/build/learn/"])
def test_the_learners_own_can_be_written(files, path):
    assert files.is_writable(path)


async def _writable(files: LearnerFiles, path: str) -> bool:
    return bool((await files.get(path, content=False))["writable"])


@pytest.mark.parametrize(
    ("path", "writable"), [("notebooks/00_a.ipynb", False), ("build/learn/00_a.ipynb", True)]
)
def test_the_browser_is_told(files, path, writable):
    import asyncio

    assert asyncio.run(_writable(files, path)) == writable
