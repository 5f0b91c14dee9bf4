"""Debian's Chromium, driven by Playwright."""

import os
import shutil

from playwright.sync_api import Browser, Playwright

WAIT = 120_000  # milliseconds: a machine under load computes slowly


def find_chromium() -> str | None:
    """The path of a Chromium of this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def launch(playwright: Playwright, executable: str) -> Browser:
    """A headless browser; root has no sandbox."""
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    return playwright.chromium.launch(executable_path=executable, args=[*sandbox, "--disable-gpu"])
