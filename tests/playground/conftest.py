"""A real browser on a real server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.api.conftest import ServerProcess, adapters_dir
from tests.playground.browser import WAIT, find_chromium, launch

__all__ = ["adapters_dir"]
KEY = "s3cret"
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Ends with this package: Playwright keeps an event loop running in the thread."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = launch(playwright, executable)
        yield opened
        opened.close()


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo base with its bundled adapters."""
    process = ServerProcess(tmp_path_factory.mktemp("server") / "log").wait_ready()
    yield process
    assert process.stop() == 0, process.text()


@pytest.fixture(scope="package")
def locked(adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key, KEY, and an adapter that is refused, `misfit`."""
    log = tmp_path_factory.mktemp("locked") / "log"
    process = ServerProcess(log, "--adapters-dir", str(adapters_dir), "--api-key", KEY).wait_ready()
    yield process
    assert process.stop() == 0, process.text()


class Visit:
    """A page in a context of its own; what it asked for, and what went wrong in it."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(WAIT / 3)
        self.asked: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens pages; the keyword arguments are those of a browser context."""
    contexts: list[BrowserContext] = []

    def begin(**options) -> Visit:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        return Visit(contexts[-1])

    yield begin
    for context in contexts:
        context.close()
