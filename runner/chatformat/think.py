"""Models that think between `<think>` and `</think>` before they answer: Qwen3, DeepSeek-R1, GLM and many more.

Some templates open the thinking in the prompt, so that a reply begins inside it. Thinking is dropped from the history:
that is what these templates do with all turns but the last.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_edge.runner.chatformat.format import ChatFormat, Message, StreamParser
from moe_edge.runner.chatformat.forms import Thinking
from moe_edge.runner.chatformat.parts import Part, Reasoning

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class ThinkTags:
    """What stands around the thinking. between: what else may stand before the answer, and is none of it."""

    open: str
    close: str
    between: tuple[str, ...] = ()


THINK = ThinkTags(OPEN, CLOSE)


class ThinkParser(StreamParser):
    """Reasoning between the tags at the head of a reply, text behind them. opened: by the prompt."""

    def __init__(self, opened: bool, tags: ThinkTags = THINK) -> None:
        self._opened, self._tags = opened, tags
        super().__init__()

    def _parts(self) -> Iterator[Part | None]:
        yield from self.thinking()
        yield from self._rest()

    def thinking(self) -> Iterator[Part | None]:
        """The head of the reply up to the answer. White space around the tags belongs to neither part."""
        if not self._opened:
            space = yield from self.blank()
            found = yield from self._mark((self._tags.open, *self._tags.between))
            if found != self._tags.open:
                self.scan.text = ("" if found else space) + self.scan.text
                return
        yield from self.blank()
        held = ""  # white space that may turn out to stand before the closing tag
        while True:
            text, mark = self.scan.until([self._tags.close])
            text = held + text
            held = text[len(text.rstrip()) :]
            if text.rstrip():
                yield Reasoning(text[: len(text) - len(held)])
            if mark is not None:
                yield from self.blank()
                if self._tags.between:
                    yield from self._mark(self._tags.between)
                return
            if self.scan.ended:
                return
            yield None

    def _mark(self, marks: Sequence[str]) -> Generator[Part | None, None, str]:
        """The one of the marks that comes next, taken out; empty when none does."""
        while (found := self.scan.starts_with(marks)) is None:
            yield None
        if not isinstance(found, str):
            return ""
        self.scan.text = self.scan.text[len(found) :]
        return found

    def blank(self) -> Generator[Part | None, None, str]:
        """Skip white space; returns what was skipped."""
        skipped = ""
        while True:
            rest = self.scan.text.lstrip()
            skipped += self.scan.text[: len(self.scan.text) - len(rest)]
            self.scan.text = rest
            if rest or self.scan.ended:
                return skipped
            yield None


def opened_by(prompt: str, tags: ThinkTags = THINK) -> bool:
    """Whether the prompt leaves the thinking open."""
    return prompt.rstrip().endswith(tags.open.rstrip())


def without_thinking(messages: list[Message], tags: ThinkTags = THINK) -> list[Message]:
    """Answers without what stood between the tags, should a client send it back."""
    cleaned = []
    for message in messages:
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str) and tags.close in content:
            message = {**message, "content": content.split(tags.close)[-1].lstrip("\n")}
        cleaned.append(message)
    return cleaned


def least_effort(told: dict[str, Any]) -> dict[str, Any]:
    """Settings of a family that knows efforts alone: kept from thinking, it gets the least."""
    return {"reasoning_effort": "low", **told} if told.get("enable_thinking") is False else told


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> ThinkParser:
    return ThinkParser(opened_by(prompt))


FORMAT = ChatFormat(
    "think", 900, lambda template: CLOSE in template, make_parser, tags=(OPEN, CLOSE), prepare=without_thinking,
    thinking=Thinking(OPEN, CLOSE),
)  # fmt: skip
