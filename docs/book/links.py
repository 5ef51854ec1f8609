"""Check that every link of a built site leads to a file and to a place that exist.

    python docs/book/links.py build/book

Links to other sites are not followed. Sphinx checks what it resolves itself; this also checks
the HTML that stands in notebooks and docstrings.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the places in it that a link can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Return a sentence for each link in the pages below `site` that leads nowhere."""
    pages = {path: Page(path) for path in sorted(site.resolve().rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.exists():
                broken.append(f"{path.name}: there is no file for {link}")
            elif place and target in pages and place not in pages[target].anchors:
                broken.append(f"{path.name}: there is no such place: {link}")
    return broken


def main() -> None:
    site = Path(sys.argv[1])
    if not any(site.rglob("*.html")):
        sys.exit(f"{site} has no pages.")
    if broken := broken_links(site):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
