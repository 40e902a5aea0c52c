"""The site of the documents: it builds without a warning, its links lead somewhere, its search finds names."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
ENTRIES = sorted(
    path
    for page in (ROOT / "docs" / "api").glob("*.md")
    for path in re.findall(r"(?m)^::: (\S+)$", page.read_text(encoding="utf-8"))
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built as `make check` builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is not None and name in {"href", "src"}:
                self.links.append(value)
            elif value is not None and name in {"id", "name"}:
                self.anchors.add(value)


def test_every_link_and_anchor_of_the_site_is_there(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = defaultdict(list)
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?|mailto:\S+@\S+", link), f"{path}: {link}"
                continue
            if path.name == "404.html":  # its links begin at the place where the site will stand
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            if not target.is_file() or (target in pages and not anchored(pages[target], parts.fragment)):
                broken[path.relative_to(site)].append(link)
    assert len(pages) > 40
    assert not broken


def anchored(page: Page, fragment: str) -> bool:
    return not fragment or unquote(fragment) in page.anchors


def test_the_index_of_the_search_has_each_public_name(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[2]: entry for entry in index["docs"]}
    missing = [path for path in ENTRIES if path not in found or path not in found[path]["title"]]
    assert len(ENTRIES) > 250
    assert not missing


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_the_search_finds_each_public_name(address, browser):
    """Typed into the search of the page, a name's own entry is among the results."""
    from playwright.sync_api import TimeoutError

    page = browser.new_page()
    page.goto(address)
    typed = page.locator("input.md-search__input")
    typed.click()
    missing = []
    for path in ENTRIES:
        typed.fill(path.rpartition(".")[2])
        typed.press("End")  # it searches when a key comes up
        result = page.locator(f"a.md-search-result__link[href*='#{path}']").first
        try:
            result.wait_for(state="attached", timeout=3000)
        except TimeoutError:
            missing.append(path)
    assert not missing
