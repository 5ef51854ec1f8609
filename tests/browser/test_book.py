"""The book's search, in a browser."""

import functools
import http.server
import threading

import pytest

from helpers.tutorial.settings import project_root

BOOK = project_root() / "build" / "book"


@pytest.fixture
def site():
    """The address of the book on a server of its own; a browser searches no files."""
    if not (BOOK / "search.html").exists():
        pytest.skip("The book is not built: make book")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=BOOK)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_search_finds_a_function_and_leads_to_it(site, page):
    page.goto(f"{site}/search.html?q=prune_2to4_")
    results = page.locator("ul.search li a")
    results.first.wait_for()
    results.first.click()
    page.wait_for_load_state()
    assert "prune_2to4_" in page.locator("body").inner_text()
