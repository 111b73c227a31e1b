# ruff: noqa: F811
"""The page's chat in a headless Chromium: messages, thinking, markup, settings, and what goes wrong."""

from __future__ import annotations

import json
import re

from browser import Opened, opened
from moe_edge.runner.chatformat.parts import Text
from page_fake import Fake, browser, last_reply, model, say, seen, server  # noqa: F401
from playwright.sync_api import Browser, expect
from serving import Server, eventually, serving

# ---- chat


def test_a_message_is_answered_and_told_what_it_took(seen: Opened, model: Fake) -> None:
    page = seen.page
    page.fill("#input", "one")
    page.press("#input", "Shift+Enter")
    page.type("#input", "two")
    page.press("#input", "Enter")
    expect(last_reply(page).locator(".markdown")).to_have_text(re.compile("You said: one\\s*two"))
    expect(last_reply(page).locator(".stats")).to_have_text(
        re.compile(r"to the first token.*75 % hits.*100 B read.*exact")
    )
    assert model.requests[0].messages == ({"role": "user", "content": "one\ntwo"},)
    assert page.input_value("#input") == ""
    say(page, "again")
    roles = [message["role"] for message in model.requests[1].messages or ()]
    assert roles == ["user", "assistant", "user"]


def test_a_reply_is_stopped_and_the_engine_is_free(browser: Browser) -> None:
    model = Fake(token_seconds=0.005)
    with serving(model) as server, opened(browser, server.url) as seen:
        page = seen.page
        say(page, "long please", wait=False)
        expect(last_reply(page)).to_contain_text("word5")
        expect(page.locator("#input")).to_be_focused()
        page.click("#stop")
        expect(last_reply(page).locator(".notice")).to_have_text("Stopped.")
        expect(page.locator("#send")).to_be_visible()
        assert eventually(lambda: model.cancelled == 1) and server.idle()
        say(page, "long again", wait=False)
        expect(last_reply(page)).to_contain_text("word5")
        page.keyboard.press("Escape")
        assert eventually(lambda: model.cancelled == 2)


def test_thinking_is_folded_and_opens(seen: Opened, model: Fake) -> None:
    page = seen.page
    say(page, "think about it")
    thoughts = page.locator(".thoughts")
    expect(thoughts).to_be_hidden()
    expect(last_reply(page).locator(".markdown")).to_have_text("Done.")
    page.click(".thinking summary")
    expect(thoughts).to_have_text("I turn it around.")
    page.locator(".thinking summary").press("Enter")
    expect(thoughts).to_be_hidden()
    say(page, "and now")
    assert (model.requests[1].messages or ())[1] == {"role": "assistant", "content": "Done."}


def test_markup_in_a_reply_stays_text(seen: Opened) -> None:
    page = seen.page
    say(page, "evil")
    text = last_reply(page).locator(".markdown")
    expect(text).to_contain_text("<script>document.title = 'taken'</script>")
    expect(text).to_contain_text("<img src=x onerror=\"document.title = 'taken'\">")
    expect(text.locator("code")).to_have_text("<script>alert('&amp;')</script>")
    assert text.locator("script, img, iframe, [onclick], [onerror]").count() == 0
    hrefs = [each.get_attribute("href") for each in text.locator("a").all()]
    assert hrefs == ["http://elsewhere.example/p.png", "https://elsewhere.example/"]
    assert text.locator("a").last.get_attribute("rel") == "noopener noreferrer"
    assert "taken" not in page.title()
    page.reload()
    expect(text.locator("code")).to_have_text("<script>alert('&amp;')</script>")


def test_the_browser_itself_refuses_markup_from_text_and_requests_elsewhere(seen: Opened) -> None:
    page = seen.page
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return 'done' } catch (e) { return e.name } }"
    )
    assert refused == "TypeError"
    failed = page.evaluate("() => fetch('http://127.0.0.2:1/').then(() => 'sent', (error) => error.name)")
    assert failed == "TypeError" and seen.others() == []
    assert len(seen.complaints) >= 2 and "Content Security Policy" in "".join(seen.complaints)
    seen.complaints.clear()


def test_code_is_coloured_and_copied_and_tables_and_lists_are_drawn(browser: Browser, server: Server) -> None:
    with opened(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as seen:
        page = seen.page
        say(page, "code")
        expect(page.locator("figure.code .code-string").first).to_have_text("'a'")
        expect(page.locator("figure.code code")).to_have_text("x = 'a' < 'b'  # & more")
        page.click("figure.code .copy")
        expect(page.locator("figure.code .copy")).to_have_text("Copied")
        assert page.evaluate("() => navigator.clipboard.readText()") == "x = 'a' < 'b'  # & more"
        expect(page.locator(".markdown ol li em")).to_have_text("two")
        expect(page.locator(".markdown td.align-right")).to_have_text("2")


def test_the_last_question_is_edited_and_the_last_reply_retried(seen: Opened, model: Fake) -> None:
    page = seen.page
    say(page, "first")
    say(page, "secnd")
    assert page.locator(".edit").count() == 1
    page.click(".message .edit")
    page.fill(".editor textarea", "second")
    page.press(".editor textarea", "Enter")
    expect(last_reply(page).locator(".markdown")).to_have_text("You said: second")
    expect(page.locator(".message.user")).to_have_count(2)
    page.click(".message .retry")
    expect(page.locator("#send")).to_be_visible()
    assert eventually(lambda: len(model.requests) == 4)
    contents = [message["content"] for message in model.requests[3].messages or ()]
    assert contents == ["first", "You said: first", "second"]
    expect(page.locator(".message.assistant")).to_have_count(2)


def test_settings_reach_the_model_and_are_kept(seen: Opened, model: Fake) -> None:
    page = seen.page
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.25")
    page.fill("#max-tokens", "7")
    page.check('input[name="think"][value="off"]', force=True)
    page.click("#settings .primary")
    expect(page.locator("#chosen")).to_have_text("temperature 0.25, at most 7 tokens, thinking off, system prompt")
    say(page, "long")
    request = model.requests[0]
    assert (request.messages or ())[0] == {"role": "system", "content": "Be brief."}
    assert (request.sampling.temp, request.n_tokens, request.think) == (0.25, 7, False)
    expect(last_reply(page).locator(".notice")).to_contain_text("as many tokens as it may have")
    page.reload()
    page.click("#open-settings")
    assert (page.input_value("#system"), page.input_value("#temperature")) == ("Be brief.", "0.25")
    page.fill("#temperature", "")
    page.fill("#max-tokens", "")
    page.check('input[name="think"][value="auto"]', force=True)
    page.click("#settings .primary")
    say(page, "hello")
    assert (model.requests[1].sampling.temp, model.requests[1].n_tokens, model.requests[1].think) == (None, None, None)


# ---- what goes wrong


def test_an_error_of_the_server_is_shown_in_its_sentence_and_can_be_retried(seen: Opened, model: Fake) -> None:
    page = seen.page
    say(page, "fail")
    expect(last_reply(page).locator(".notice.failed")).to_contain_text("the disk of the test has gone; plug it in")
    expect(last_reply(page).locator(".markdown")).to_have_text("So far")
    model.script = lambda request: [Text("It works.")]
    page.click(".notice button")
    expect(last_reply(page).locator(".markdown")).to_have_text("It works.")
    expect(page.locator(".notice")).to_have_count(0)
    page.fill("#input", "x" * 70_000)
    page.press("#input", "Enter")
    expect(page.locator(".notice.failed")).to_contain_text("but the context holds 65536")
    seen.complaints.clear()  # Chromium's own line about the status 400


def test_a_lost_connection_offers_to_try_again(browser: Browser) -> None:
    with serving(Fake(token_seconds=0.005)) as server:
        with opened(browser, server.url) as seen:
            page = seen.page
            say(page, "long", wait=False)
            expect(last_reply(page)).to_contain_text("word3")
            page.route("**/*", lambda route: route.abort())
            server.running._http._server.force_exit = True
            server.running.leave()
            expect(page.locator(".message.assistant .notice")).to_be_visible()
            say(page, "hello")
            expect(last_reply(page).locator(".notice.failed")).to_contain_text("cannot be reached")
            expect(page.locator("#banner")).to_contain_text("cannot be reached")
            expect(last_reply(page).locator(".notice button")).to_have_text("Retry")


def test_a_server_with_a_key_asks_for_it_until_it_is_right(browser: Browser) -> None:
    with serving(Fake(), api_key="right") as server, opened(browser, server.url) as seen:
        page = seen.page
        expect(page.locator("#question")).to_be_visible()
        page.fill("#question-value", "wrong")
        page.press("#question-value", "Enter")
        expect(page.locator("#question-value")).to_have_value("")
        page.fill("#question-value", "right")
        page.click("#question-yes")
        expect(page.locator("#model-name")).to_have_text("fake")
        say(page, "hello")
        expect(last_reply(page).locator(".markdown")).to_have_text("You said: hello")
        page.reload()
        expect(page.locator("#model-name")).to_have_text("fake")
        assert "right" not in json.dumps(page.evaluate("() => ({...localStorage})"))


def test_a_page_that_comes_before_the_model_waits_for_it(browser: Browser) -> None:
    with serving(None) as server, opened(browser, server.url) as seen:
        expect(seen.page.locator("#banner")).to_contain_text("Loading model")
        server.running.service.ready(Fake())
        expect(seen.page.locator("#model-name")).to_have_text("fake")
        expect(seen.page.locator("#banner")).to_be_hidden()


MARKDOWN = [  # (text, the first block's HTML as the page draws it, without classes)
    ("a **b** *c* ~~d~~ `e*f`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e*f</code></p>"),
    ("***both***", "<p><strong><em>both</em></strong></p>"),
    ("snake_case and 2 * 3 * 4 \\* x", "<p>snake_case and 2 * 3 * 4 * x</p>"),
    ("one\ntwo", "<p>one<br>two</p>"),
    ("- a\n- b\n  1. c\n\n1) d",
     "<ul><li><span>a</span></li><li><span>b</span><ol><li><span>c</span></li></ol></li></ul>"),
    ("> q\n> - x", "<blockquote><p>q</p><ul><li><span>x</span></li></ul></blockquote>"),
    ("### t ###", "<h5>t</h5>"),
    ("a **b", "<p>a **b</p>"),
    ("[x](javascript:alert(1))", '<p><span title="javascript:alert(1)">x</span></p>'),
]  # fmt: skip


def test_markdown_is_drawn_as_it_is_meant(seen: Opened) -> None:
    draw = """async (text) => {
        const { renderMarkdown } = await import('/page/markdown.js');
        const target = document.createElement('div');
        renderMarkdown(target, text);
        target.querySelectorAll('[class]').forEach((each) => each.removeAttribute('class'));
        return target.firstChild.outerHTML;
    }"""
    for text, expected in MARKDOWN:
        assert seen.page.evaluate(draw, text) == expected, text


def test_no_text_brings_the_page_down_and_growing_it_draws_the_same(seen: Opened) -> None:
    """Marks without end, blocks within blocks, and a reply drawn after each of its characters."""
    draw = """async (text) => {
        const { renderMarkdown } = await import('/page/markdown.js');
        const whole = document.createElement('div'), grown = document.createElement('div');
        for (let n = 1; n <= Math.min(text.length, 200); n += 1) renderMarkdown(grown, text.slice(0, n));
        renderMarkdown(grown, text);
        renderMarkdown(whole, text);
        return grown.innerHTML === whole.innerHTML;
    }"""
    more = "| a | b |\n|---|--:|\n| 1 | 2 |\n\n```py\nx = 1\n```\nend"
    everything = "\n\n".join([*(text for text, _ in MARKDOWN), more])
    for text in (everything, *(mark * 5000 for mark in ("*", "_", "`", "[", "![", "> ", "- ", "|", "**a", "<", "~~"))):
        assert seen.page.evaluate(draw, text), text[:40]


def test_colouring_never_changes_the_code(seen: Opened) -> None:
    code = "def f(x): # 'hi'\n  return \"a\\\"b\" + `t` + 1.5e3 <b>&amp;</b> -- x\n/* open\n+ 'never closed"
    check = """async (code) => {
        const { piecesOf, languageOf } = await import('/page/highlight.js');
        const names = 'py js sh c++ html json toml yml diff sql rs go css ts java c'.split(' ');
        return names.filter((name) => piecesOf(code, languageOf(name)).map((piece) => piece[1]).join('') !== code);
    }"""
    assert seen.page.evaluate(check, code) == []
