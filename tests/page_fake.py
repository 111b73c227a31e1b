"""What tests of the page share: a model that answers by the question's first word, a page open before it, and hands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from browser import Opened, opened, started
from moe_edge.models.errors import EngineError
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text
from moe_edge.runner.fake import FakeModel
from moe_edge.runner.protocol import Request
from playwright.sync_api import Browser, Locator, Page, expect
from serving import Server, serving

expect.set_options(timeout=20_000)
EVIL = (
    "Here: <script>document.title = 'taken'</script> and <img src=x onerror=\"document.title = 'taken'\"> and\n\n"
    "<div onclick=x><iframe src='http://elsewhere.example/'></iframe></div>\n\n"
    "![a picture](http://elsewhere.example/p.png) [a link](javascript:alert(1)) [fine](https://elsewhere.example/)\n\n"
    "```html\n<script>alert('&amp;')</script>\n```\n"
)


def script(request: Request) -> Sequence[Part | BaseException]:
    """Answers by the last question's first word."""
    assert request.messages is not None
    question = str(request.messages[-1]["content"])
    word = question.split()[0].strip(".,").lower()
    if word == "think":
        return [Reasoning("I turn it "), Reasoning("around."), Text("Done.")]
    if word == "evil":
        return [Text(EVIL[at : at + 7]) for at in range(0, len(EVIL), 7)]
    if word == "long":
        return [Text(f"word{n} ") for n in range(3000)]
    if word == "fail":
        return [Text("So far "), EngineError("the disk of the test has gone; plug it in again")]
    if word == "code":
        return [Text("```python\nx = 'a' < 'b'  # & more\n```\n\n1. one\n2. *two*\n\n| a | b |\n|--|--:|\n| 1 | 2 |\n")]
    return [Text(f"You said: {question}")]


class Fake(FakeModel):
    """48 layers of 128 experts, half of which are in memory."""

    def __init__(self, **more: Any) -> None:
        super().__init__(script, n_ctx=65536, **more)
        self.facts = replace(self.facts, capabilities=("completion", "thinking"))
        self.asked = 0

    def picture(self) -> dict[str, Any]:
        return {
            "budget_bytes": 1000, "policy": "exact", "layers": list(range(2, 50)), "levels": ["high"],
            "memory": [{"name": "dense weights", "bytes": 300}, {"name": "experts", "bytes": 600}],
            "resident": [[0] * 128] * 48,
        }  # fmt: skip

    def numbers(self) -> dict[str, float]:
        self.asked += 1
        n = float(self.asked)
        return {"expert_uses": 8 * n, "expert_hits": 6 * n, "expert_bytes_read": 2048 * n, "tokens": n, "low_uses": 0.0}

    def recency(self) -> bytes:
        return bytes(each % 2 * (each % 255 + 1) for each in range(48 * 128))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found


@pytest.fixture
def model() -> Fake:
    return Fake()


@pytest.fixture
def server(model: Fake) -> Iterator[Server]:
    with serving(model) as running:
        yield running


@pytest.fixture
def seen(browser: Browser, server: Server) -> Iterator[Opened]:
    with opened(browser, server.url) as page:
        expect(page.page.locator("#model-name")).to_have_text("fake")
        yield page
        assert page.complaints == []


def say(page: Page, text: str, *, wait: bool = True) -> None:
    """Write it, send it with Enter, and wait for the end of the reply."""
    n = page.locator(".message.assistant").count()
    page.fill("#input", text)
    page.press("#input", "Enter")
    expect(page.locator(".message.assistant")).to_have_count(n + 1)
    if wait:
        expect(page.locator("#send")).to_be_visible()


def last_reply(page: Page) -> Locator:
    return page.locator(".message.assistant").last
