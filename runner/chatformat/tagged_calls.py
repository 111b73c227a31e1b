"""Calls whose arguments stand between tags, one by one: `<parameter=city>Paris</parameter>` and its relatives.

The values are text; the tool's own schema says which are numbers, objects or strings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting, as_json, without_line_ends
from moe_edge.runner.chatformat.parts import Part
from moe_edge.runner.chatformat.think import THINK, ThinkTags, opened_by


@dataclass(frozen=True)
class CallTags:
    """begin, end: around the calls of a reply; empty where nothing is. call: before a name; empty where begin is.

    name_end: what may end the name. key, key_end, value, value_end: of an argument; where `value` is empty the value
    begins behind key_end. call_end: of one call.
    """

    begin: str
    call: str
    name_end: tuple[str, ...]
    key: str
    key_end: str
    value: str
    value_end: str
    call_end: str
    end: str

    @property
    def mark(self) -> str:
        return self.begin or self.call

    @property
    def tokens(self) -> tuple[str, ...]:
        """Those that a vocabulary may have as tokens of their own."""
        tags = (self.begin, self.call, *self.name_end, self.key, self.key_end, self.value, self.value_end)
        return tuple(tag for tag in (*tags, self.call_end, self.end) if tag.startswith("<") and tag.endswith(">"))


class TaggedCallParser(CallParser):
    """styles: the tags of the family, and those that its models are known to use besides."""

    def __init__(self, opened: bool, tools: Tools, styles: Sequence[CallTags], tags: ThinkTags = THINK) -> None:
        self._styles = {style.mark: style for style in styles}
        self.marks = tuple(self._styles)
        super().__init__(opened, tools, tags)

    def read_calls(self, mark: str) -> Waiting:
        style = self._styles[mark]
        if not (style.begin and style.call):  # one tag begins the call, and nothing stands around it
            yield from self._call(style)
            return
        n = 0
        while (yield from self.optional(style.call, style.end)) == style.call:
            yield from self._call(style)
            n += 1
        if n == 0:
            raise NotACall

    def _call(self, style: CallTags) -> Waiting:
        name, mark = yield from self.until(*style.name_end, style.call_end)
        name = self.name(name)
        if mark == style.key:
            self.scan.text, self._raw = mark + self.scan.text, self._raw[: -len(mark)]
        yield self.start(name)
        n = 0
        while mark != style.call_end and (yield from self.optional(style.key, style.call_end)) == style.key:
            key, value = yield from self._argument(style, name)
            separator = ", " if n else "{"
            yield self.arguments(separator + json.dumps(key) + ": " + as_json(value))
            n += 1
        yield self.arguments("}" if n else "{}")
        yield self.end()

    def _argument(self, style: CallTags, tool: str) -> Generator[Part | None, None, tuple[str, Any]]:
        key, _ = yield from self.until(style.key_end)
        if style.value:
            yield from self.until(style.value)
        text, _ = yield from self.until(style.value_end)
        key, _, is_string = key.strip().partition('" string="')
        text = without_line_ends(text)
        if is_string == "true":
            return key, text
        return key, self.value(tool, key, text)


def tagged_parser(*styles: CallTags, tags: ThinkTags = THINK) -> Callable[[str, Tools], TaggedCallParser]:
    """What ChatFormat.parser is: (prompt, tools) -> a parser for these tags."""

    def make(prompt: str, tools: Tools) -> TaggedCallParser:
        return TaggedCallParser(opened_by(prompt, tags), tools, styles, tags)

    return make
