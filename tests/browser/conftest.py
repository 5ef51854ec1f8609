"""JupyterLab as `make lab` opens it, in a real browser: Chromium, driven by Playwright.

Each module of tests has a project of its own, a copy, so that nobody's work in `build/learn/` is
touched. Screenshots are left in `build/browser/`.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_lab import MINUTE, SCREENSHOTS, Lab, Project


def chromium() -> str | None:
    """Return the path of the system's Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The browser; the tests are skipped where it or Playwright is missing."""
    reason = "Chromium and Playwright are needed: apt install chromium, pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = chromium()
    if path is None:
        pytest.skip(reason)
    with playwright.sync_playwright() as started:
        # Chromium's sandbox does not work for root, as in a container.
        sandbox = [] if hasattr(os, "getuid") and os.getuid() else ["--no-sandbox"]
        browser = started.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request) -> Iterator[Any]:
    """An empty tab of 1024 pixels, of which a screenshot is kept when the test ends."""
    page = browser.new_page(viewport={"width": 1024, "height": 900})
    page.set_default_timeout(MINUTE)
    yield page
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
    page.close()


@pytest.fixture(scope="module")
def project(browser, tmp_path_factory) -> Iterator[Project]:
    """A learner's project with JupyterLab running on it."""
    project = Project(tmp_path_factory.mktemp("project"))
    server = project.start()
    yield project
    server.terminate()
    server.wait(timeout=60)


@pytest.fixture
def lab(page, project) -> Lab:
    """JupyterLab, with nothing opened yet."""
    return Lab(page, project)
