"""The site as a reader's browser shows it: search, formulas, phones, errors."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from helpers_browser import Page, browser

ROOT = Path(__file__).parents[1]
PAGES = (
    "",
    "getting-started/",
    "concepts/distribution-matching/",
    "recipes/imagenet/",
    "api/losses/",
    "deviations/",
    "speed/",
    "study/",
)
pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the site, built anew: its search needs a server."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "browser") as page:
        page.call("Log.enable")
        yield page


def until(page: Page, script: str) -> Any:
    """Asks until the answer is true."""
    for _ in range(300):
        if found := page.run(script):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{script} did not become true")


def complaints(page: Page) -> list[str]:
    """What the console would show in red since the page was opened."""
    page.run("0")  # brings what has been said until now
    found = []
    for event in page.events:
        method, params = event.get("method"), event.get("params", {})
        wrong = (
            method == "Runtime.exceptionThrown"
            or method == "Network.loadingFailed"
            or (method == "Log.entryAdded" and params["entry"]["level"] == "error")
            or (method == "Runtime.consoleAPICalled" and params["type"] == "error")
            or (
                method == "Network.responseReceived"
                and params["response"]["status"] >= 400
            )
        )
        if wrong:
            found.append(str(params))
    return found


def open_page(page: Page, address: str) -> None:
    page.events.clear()
    page.call("Page.navigate", url=address)
    until(page, f"location.href == '{address}' && document.readyState == 'complete'")


def show_on(page: Page, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1}
    page.call("Emulation.setDeviceMetricsOverride", mobile=width < 500, **size)


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_pages_fit_and_nothing_fails(
    page: Page, address: str, width: int, height: int
) -> None:
    show_on(page, width, height)
    for name in PAGES:
        open_page(page, address + name)
        assert page.run("document.querySelector('h1').textContent.length") > 3
        wide = page.run("document.documentElement.scrollWidth")
        assert wide <= width, f"{name or 'home'} is {wide} wide on {width}"
        sources = page.run(
            "[...document.images].filter(i => i.complete && !i.naturalWidth)"
            ".map(i => i.src)"
        )
        assert sources == [], name
        assert complaints(page) == [], name


def test_formulas_are_set(page: Page, address: str) -> None:
    open_page(page, f"{address}concepts/distribution-matching/")
    assert until(page, "document.querySelectorAll('article .katex').length") > 3
    left = page.run("document.querySelector('article').innerText")
    assert r"\nabla" not in left
    assert page.run("document.querySelectorAll('.katex-error').length") == 0


@pytest.mark.parametrize(
    ("words", "title"),
    [("DistributionMatchingLoss", "losses"), ("backward simulation", "several steps")],
)
def test_search_finds_and_opens_a_page(
    page: Page, address: str, words: str, title: str
) -> None:
    show_on(page, 1280, 800)
    open_page(page, address)
    page.click("[data-md-component=search-query]")
    page.type(words)
    until(page, "document.querySelectorAll('.md-search-result__link').length")
    found = page.run(
        "[...document.querySelectorAll('.md-search-result__item')]"
        ".map(i => i.querySelector('h1, h2').textContent.toLowerCase())"
    )
    assert any(title in name for name in found[:5]), found
    assert complaints(page) == []
    page.events.clear()
    page.run("document.querySelector('.md-search-result__link').click()")
    page.wait_for("Page.loadEventFired")  # a question in between would find no page
    assert page.run("location.href").split("?")[0] != address
    word = words.split()[0].lower()
    until(page, f"document.body.innerText.toLowerCase().includes('{word}')")
    assert complaints(page) == []


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_a_reader_gets_the_colours_that_they_prefer(
    page: Page, address: str, scheme: str, dark: bool
) -> None:
    given = {"name": "prefers-color-scheme", "value": scheme}
    page.call("Emulation.setEmulatedMedia", features=[given])
    open_page(page, f"{address}concepts/iteration/")
    until(page, f"document.body.dataset.mdColorMedia?.includes('{scheme}')")
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert (brightness < 80) == dark, colour
