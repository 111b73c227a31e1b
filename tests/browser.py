"""Headless Chromium for tests of the page: one browser a run, a fresh context for each test, every request noted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
# A browser that asks its maker for updates would be refused by machines without a network, many times a second.
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
PATIENCE_MS = 20_000.0


def browser_path() -> str:
    """Where a Chromium is: the one of MOE_EDGE_CHROMIUM, else the first one found."""
    if named := os.environ.get("MOE_EDGE_CHROMIUM"):
        return named
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.path.exists(MAC):
        found = MAC
    assert found, "no Chromium on this machine; run `make browser`, or name one in MOE_EDGE_CHROMIUM"
    return found


@contextmanager
def started() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=[*FLAGS, *sandbox])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page, and what it did: addresses it asked, what its console said, errors that nothing caught."""

    page: Page
    url: str
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def others(self) -> list[str]:
        """Addresses of requests to anything but the server."""
        ours = urlsplit(self.url).netloc
        return [each for each in self.asked if urlsplit(each).netloc != ours and not each.startswith("blob:")]


@contextmanager
def opened(browser: Browser, url: str, *, width: int = 1280, height: int = 800, **context: Any) -> Iterator[Opened]:
    """The server's page in a browser that has never been there. Fails when it asked another host, or threw."""
    made = browser.new_context(viewport={"width": width, "height": height}, **context)
    made.set_default_timeout(PATIENCE_MS)
    seen = Opened(made.new_page(), url)
    made.on("request", lambda request: seen.asked.append(request.url))
    made.on("weberror", lambda error: seen.complaints.append(str(error.error)))
    made.on("console", lambda message: seen.complaints.append(message.text) if message.type == "error" else None)
    try:
        seen.page.goto(url)
        yield seen
        assert seen.others() == []
    finally:
        made.close()
