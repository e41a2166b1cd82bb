"""The built docs at the width of a desk and of a phone. ``make browser`` builds them first."""

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.browser.conftest import DOCS, WIDTHS, Open

HTML = DOCS / "html"
PAGES = {
    "start": "start.html",
    "front": "index.html",
    "api": "api/policies.html",
    "howto": "howto/family.html",
    "benchmarks": "benchmarks.html",
    "gallery": "gallery/index.html",
    "gallery-script": "gallery/plot_where_it_looks.html",
}

pytestmark = pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the docs are not built: make docs")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The docs as a server shows them: from disk, a browser does not let the search read its results."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=HTML))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.parametrize("window", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, window: str, site: str, visit: Open, screenshots: Path) -> None:
    page = visit(site + PAGES[name], window, color_scheme="light")
    assert page.locator("h1").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    sizes = page.evaluate("[...document.querySelectorAll('article img')].map(image => image.naturalWidth)")
    assert all(sizes) and (sizes or "gallery" not in name)
    page.screenshot(path=screenshots / f"{name}-{window}.png", full_page=name == "gallery")


def test_the_menu_of_a_phone(site: str, visit: Open) -> None:
    """What stands beside the page on a desk opens with a button."""
    page = visit(site, "phone")
    entry = page.locator(".sidebar-tree a", has_text="Getting started")
    assert not entry.is_visible() or entry.bounding_box()["x"] < 0
    page.locator("label.nav-overlay-icon:visible").first.click()
    page.wait_for_timeout(500)
    assert entry.bounding_box()["x"] >= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, site: str, visit: Open, screenshots: Path) -> None:
    page = visit(site + "start.html", color_scheme=scheme)
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (red + green + blue > 3 * 128) == (scheme == "light")
    page.screenshot(path=screenshots / f"start-{scheme}.png")


def test_search_finds_a_name(site: str, visit: Open) -> None:
    """The index of words is part of the site."""
    page = visit(site + "search.html?q=pooled")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert "olicies" in page.locator("#search-results").inner_text()
