"""Opens a page in headless Chromium, Debian's own, to see what it draws, complains about and requests."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# Anything slower than this hangs; the limit is generous because other tests share a slow machine.
PATIENCE_MS = 600_000


@dataclass
class Opened:
    """A page, the errors that it has reported and the addresses that it has requested."""

    page: object
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(file: Path) -> Iterator[Opened]:
    """Open a file's page. Without a browser the test is skipped, or fails where CI is set."""
    chromium = shutil.which("chromium")
    if chromium is None:
        message = "Chromium is not installed; on Debian, as root: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to start as root, and CI runs as root.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=PATIENCE_MS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        shown = Opened(page)
        page.on("console", lambda message: shown.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: shown.errors.append(str(error)))
        page.on("request", lambda request: shown.requests.append(request.url))
        page.goto(file.resolve().as_uri())
        yield shown
        browser.close()
