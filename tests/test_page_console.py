# ruff: noqa: F811
"""The page's console in a headless Chromium, before the fake model and before the embedded one."""

from __future__ import annotations

import re
from typing import Any

from browser import Opened, opened
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sampling import Sampling
from moe_edge.runner.serve.engine_model import EngineModel
from page_fake import Fake, browser, last_reply, model, say, seen, server  # noqa: F401
from playwright.sync_api import Browser, Page, expect
from serving import eventually, serving

# ---- the console


def colours_of_map(page: Page) -> int:
    return int(page.evaluate("""() => {
        const canvas = document.querySelector('#map');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(new Uint32Array(data.buffer)).size;
    }"""))  # fmt: skip


def test_the_console_draws_experts_memory_and_figures(seen: Opened) -> None:
    page = seen.page
    expect(page.locator("#map-count")).to_have_text("3,072 of 6,144")
    assert colours_of_map(page) > 50
    expect(page.locator("#memory dt")).to_have_text(["dense weights", "experts", "free"])
    expect(page.locator("#hit-rate")).to_have_text("75 %")
    expect(page.locator("#bytes-token")).to_have_text("2.00 KiB")
    expect(page.locator("#queue")).to_have_text("idle")
    expect(page.locator("#traded")).to_contain_text("none")
    page.focus("#map")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#map-tip")).to_have_text(re.compile(r"^layer 3, expert 1: in memory, used later than"))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#map-tip")).to_have_text("layer 3, expert 0: on disk")
    page.hover("#map", position={"x": 2, "y": 2})
    expect(page.locator("#map-tip")).to_have_text("layer 2, expert 0: on disk")
    expect(page.locator("#boards-section")).to_be_hidden()


def test_the_console_shows_where_the_layers_are(browser: Browser) -> None:
    class OnBoards(Fake):
        def picture(self) -> dict[str, Any]:
            runs = (("a:1", [0, 9], 2048), ("b:2", [10, 12], 1024))
            reports = [{"board": board, "layers": layers, "rss_bytes": n} for board, layers, n in runs]
            return {**super().picture(), "boards": reports}

    with serving(OnBoards()) as server, opened(browser, server.url) as seen:
        expect(seen.page.locator("#boards dt")).to_have_text(["a:1", "b:2"])
        expect(seen.page.locator("#boards dd")).to_have_text(["layers 0 to 9, 2.00 KiB", "layers 10 to 12, 1.00 KiB"])
        expect(seen.page.locator("#boards-bar i")).to_have_count(2)


def test_before_the_server_answers_the_console_shows_no_empty_figures(browser: Browser) -> None:
    with serving(None) as server, opened(browser, server.url) as seen:
        page = seen.page
        expect(page.locator("#console-notice")).to_have_text("Waiting for the server.")
        expect(page.locator("#map")).to_be_hidden()
        server.running.service.ready(Fake())
        expect(page.locator("#map-count")).to_have_text("3,072 of 6,144")
        seen.complaints.clear()  # Chromium's own line about the status 503


def test_the_console_asks_only_while_it_is_seen(seen: Opened, model: Fake) -> None:
    page = seen.page
    expect(page.locator("#hit-rate")).to_have_text("75 %")
    page.click("#close-console")
    page.wait_for_timeout(200)
    asked = model.asked
    say(page, "hello")
    page.wait_for_timeout(1200)
    assert model.asked == asked
    page.click("#toggle-console")
    assert eventually(lambda: model.asked > asked)


def test_chat_and_console_on_the_embedded_model(browser: Browser) -> None:
    engine = Engine(tiny_model_path(), EngineOptions(ram_bytes=38 << 20, n_threads=1))
    engine.load()
    model = EngineModel(engine, name="tiny", defaults=Sampling(temp=0.0))
    try:
        with serving(model) as server, opened(browser, server.url) as seen:
            page = seen.page
            expect(page.locator("#model-facts")).to_contain_text("tokens of context")
            page.click("#open-settings")
            page.fill("#max-tokens", "40")
            page.click("#settings .primary")
            say(page, "The king said")
            expect(last_reply(page).locator(".stats")).to_contain_text("hits")
            expect(page.locator("#map-count")).to_have_text(re.compile(r"^[1-9]\d* of \d+$"))
            expect(page.locator("#hit-rate")).to_have_text(re.compile("%"))
            assert colours_of_map(page) > 20
        recency = model.recency()
        assert [unit for unit, each in enumerate(recency) if each] == engine.native.resident_units()
        last_layer = engine.layout.layer_units(engine.layout.n_layers - 1)
        assert max(recency) == 255 and recency.index(255) in last_layer
    finally:
        engine.close()
