"""The pictures of the documents: `python -m tests.playground.screenshots` makes docs/images/playground-*.png anew."""

import tempfile
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, sync_playwright

from tests.api.conftest import ROOT, ServerProcess
from tests.playground.browser import WAIT, find_chromium, launch

FOLDER = ROOT / "docs" / "images"
SEED = 7
VOICES = [("base", "1"), ("voice", "quotes"), ("voice", "wilde")]
SCENE = [("prompt", "Quote by Oscar Wilde:"), *VOICES, ("seed", SEED), ("keep", "1")]
SHOTS = {"light": ("light", 1440, 1175), "dark": ("dark", 1440, 1175), "phone": ("light", 390, 844)}


def shoot(browser: Browser, url: str, name: str) -> None:
    """One picture, after the scene was generated."""
    scheme, width, height = SHOTS[name]
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce",
        device_scale_factor=2 if name == "phone" else 1,
    )  # fmt: skip
    page.goto(f"{url}/playground#{urlencode(SCENE)}")
    page.locator(".voices .badge[data-state]").nth(2).wait_for(timeout=WAIT)
    for _ in range(2):  # the first time loads the adapters
        page.get_by_role("button", name="Generate").click()
        page.locator(".card[data-status=done]").nth(2).wait_for(timeout=WAIT)
    if name == "phone":
        page.locator(".card[data-voice=quotes]").evaluate("card => scrollTo(0, card.offsetTop - 16)")
    else:
        for voice in ("quotes", "wilde"):
            page.locator(f".card[data-voice={voice}] .report > summary").click()
    page.screenshot(path=FOLDER / f"playground-{name}.png")
    page.close()


def main() -> None:
    executable = find_chromium()
    if executable is None:
        raise SystemExit("no Chromium found; apt-get install chromium")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = ServerProcess(Path(folder) / "log")
        try:
            server.wait_ready()
            browser = launch(playwright, executable)
            for name in SHOTS:
                shoot(browser, server.url, name)
            browser.close()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
