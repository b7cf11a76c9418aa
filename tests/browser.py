"""A headless Chromium for tests of pages: pictures, and what a page said on its console and asked of the network.

    @needs_chromium
    def test_the_page(tmp_path):
        with page(width=390) as seen:
            seen.page.goto(file.as_uri())                       # any method of Playwright's Page
            seen.page.get_by_text("verdict").first.wait_for()
            seen.page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert seen.errors == [] and seen.requests == [file.as_uri()]

The browser is the system's own (Debian: ``apt-get install chromium``); Playwright only drives it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine; on Debian: apt-get install chromium"
)

#: Nothing but the page under test is to be loaded. As root, and in containers, there is no sandbox.
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Seen:
    """An open page, and what came of it so far."""

    page: Page
    #: What was written to the console as an error, and uncaught exceptions.
    errors: list[str] = field(default_factory=list)
    #: Every address that was asked for, that of the page included; data URLs are not.
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def page(width: int = 1280, height: int = 900) -> Iterator[Seen]:
    """An empty page of that size in pixels, in a browser of its own with a new profile."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS)) as browser,
    ):
        seen = Seen(browser.new_page(viewport={"width": width, "height": height}))
        seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda sent: None if sent.url.startswith("data:") else seen.requests.append(sent.url))
        yield seen
