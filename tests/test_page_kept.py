# ruff: noqa: F811
"""The page's conversations, which the browser keeps, its colours, and a narrow screen; in a headless Chromium."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import Opened, opened
from page_fake import Fake, browser, last_reply, model, say, seen, server  # noqa: F401
from playwright.sync_api import Browser, Page, expect
from serving import Server, serving

# ---- conversations


def titles(page: Page) -> list[str]:
    return [each.inner_text() for each in page.locator("#conversations .open").all()]


def test_two_conversations_survive_a_reload(seen: Opened) -> None:
    page = seen.page
    say(page, "apples")
    page.click("#new-conversation")
    expect(page.locator("#empty")).to_be_visible()
    say(page, "pears")
    page.reload()
    expect(page.locator("#conversations .open")).to_have_text(["pears", "apples"])
    expect(last_reply(page).locator(".markdown")).to_have_text("You said: pears")
    page.click("text=apples")
    expect(last_reply(page).locator(".markdown")).to_have_text("You said: apples")
    expect(last_reply(page).locator(".stats")).to_contain_text("hits")


def test_conversations_are_renamed_deleted_exported_and_imported(seen: Opened, tmp_path: Path) -> None:
    page = seen.page
    say(page, "apples")
    page.hover("#conversations li")
    page.click('[aria-label="Rename “apples”"]')
    page.fill("#question-value", "fruit <b>")
    page.click("#question-yes")
    expect(page.locator("#conversations .open")).to_have_text(["fruit <b>"])
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "export.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text())["conversations"]
    assert [message["content"] for message in exported[0]["messages"]] == ["apples", "You said: apples"]
    page.click('[aria-label="Delete “fruit <b>”"]')
    page.click("#question-no")
    assert titles(page) == ["fruit <b>"]
    page.click('[aria-label="Delete “fruit <b>”"]')
    page.click("#question-yes")
    expect(page.locator("#conversations .open")).to_have_count(0)
    page.set_input_files("#import-file", file)
    expect(page.locator("#conversations .open")).to_have_text(["fruit <b>"])
    page.reload()
    page.click("#conversations .open")
    expect(last_reply(page).locator(".markdown")).to_have_text("You said: apples")
    wrong = tmp_path / "wrong.json"
    for text, words in (("no", "no JSON"), ("{}", "no export"), (_damaged(exported), "damaged; nothing was imported")):
        wrong.write_text(text)
        page.set_input_files("#import-file", wrong)
        expect(page.locator("#banner")).to_contain_text(words)
    assert titles(page) == ["fruit <b>"]


def _damaged(conversations: list[dict[str, Any]]) -> str:
    bad = conversations[0] | {"messages": [{"role": "root", "content": "x"}]}
    return json.dumps({"format": "moe-edge conversations", "conversations": [conversations[0], bad]})


def test_a_reply_goes_on_while_another_conversation_is_read_and_what_was_said_is_kept(browser: Browser) -> None:
    with serving(Fake(token_seconds=0.003)) as server, opened(browser, server.url) as seen:
        page = seen.page
        say(page, "apples")
        page.click("#new-conversation")
        say(page, "long", wait=False)
        page.click("text=apples")
        expect(page.locator("#conversations .writing")).to_have_count(1)
        expect(page.locator(".message.assistant")).to_have_count(1)
        page.click("#conversations >> text=long")
        expect(last_reply(page)).to_contain_text("word400 ")  # saved every second
        page.reload()
        expect(last_reply(page)).to_contain_text("word9 ")
        expect(last_reply(page).locator(".notice")).to_have_text("Stopped.")
        assert server.idle()


# ---- looks


def contrast(page: Page, selector: str) -> float:
    """WCAG's contrast of a node's text against the first background behind it."""
    return float(page.eval_on_selector(selector, """(node) => {
        const parts = (text) => text.match(/[\\d.]+/g).map(Number);
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(rgb[i] / 255), 0);
        let behind = node;
        while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
        const [a, b] = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(parts).map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""))  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_chosen_and_read(browser: Browser, server: Server, scheme: str) -> None:
    with opened(browser, server.url, color_scheme=scheme) as seen:
        page = seen.page
        say(page, "think")
        root = page.locator("html")
        expect(root).to_have_attribute("data-theme", scheme)
        for selector in (".question", ".markdown p", ".thinking summary", ".stats", "#model-facts", ".sidebar .hint",
                         "#conversations .open", ".memory dt", ".composer .hint", ".axis"):  # fmt: skip
            assert contrast(page, selector) >= 4.5, selector
        other = "dark" if scheme == "light" else "light"
        page.click("#theme")  # light
        if other == "dark":
            page.click("#theme")
        expect(root).to_have_attribute("data-theme", other)
        page.reload()
        expect(root).to_have_attribute("data-theme", other)


def test_at_360_pixels_nothing_sticks_out_and_the_drawers_open(browser: Browser, server: Server) -> None:
    with opened(browser, server.url, width=360, height=740, has_touch=True) as seen:
        page = seen.page
        say(page, "code")
        say(page, "x" * 300)
        wide = """() => ["html", ".scroller", ".console-body", ".sidebar nav", "dialog"].filter((name) =>
            [...document.querySelectorAll(name)].some((node) => node.scrollWidth > node.clientWidth))"""
        assert page.evaluate(wide) == []
        page.click("#open-sidebar")
        expect(page.locator("#new-conversation")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(page.locator("#open-sidebar")).to_be_focused()
        page.click("#toggle-console")
        expect(page.locator("#map")).to_be_visible()
        assert page.evaluate(wide) == []
        page.click("#close-console")
        page.click("#open-settings")
        assert page.evaluate(wide) == []
