"""A headless Chromium, where the machine has one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "_build"
LOCAL = "file:", "data:", "http://127.0.0.1:"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
Open = Callable[..., Any]


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api, path = pytest.importorskip("playwright.sync_api"), chromium_path()
    if path is None:
        pytest.skip("there is no Chromium on this machine; Debian's package is called chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Open a page of this machine, without a network, in a window of some size; errors of its scripts fail the test."""
    errors: list[str] = []
    contexts: list[Any] = []

    def go(url: str, window: str = "desktop", **options: Any) -> Any:
        width, height = WIDTHS[window]
        size = {"width": width, "height": height}
        context = chromium.new_context(viewport=size, is_mobile=window == "phone", **options)
        contexts.append(context)
        context.route(lambda asked: not asked.startswith(LOCAL), lambda route: route.abort())
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where pictures of pages are left to be looked at."""
    folder = DOCS / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
