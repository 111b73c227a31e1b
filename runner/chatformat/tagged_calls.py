"""Calls whose arguments stand between tags, one by one: `<parameter=city>Paris</parameter>` and its relatives.

The values are text; the tool's own schema says which are numbers, objects or strings. A string is told as it comes,
since it may be a whole file; anything else when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting, as_json, without_line_ends
from moe_edge.runner.chatformat.format import held_back
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
            yield from self._argument(style, name, ", " if n else "{")
            n += 1
        yield self.arguments("}" if n else "{}")
        yield self.end()

    def _argument(self, style: CallTags, tool: str, separator: str) -> Waiting:
        key, _ = yield from self.until(style.key_end)
        if style.value:
            words, _ = yield from self.until(style.value)
            self.stray(words)
        key, _, is_string = key.strip().partition('" string="')
        begin = f"{separator}{json.dumps(key)}: "
        if is_string == "true" or (not is_string and self.is_string(tool, key)):
            yield self.arguments(begin + '"')
            yield from self._string(style.value_end)
            yield self.arguments('"')
            return
        text = ""
        while True:
            piece, mark = self._piece(style.value_end)
            text += piece
            if mark:
                yield self.arguments(begin + as_json(self.value(tool, key, without_line_ends(text))))
                return
            if self.scan.ended:  # JSON that breaks off, as the reply does
                yield self.arguments(begin + text.strip())
                raise NotACall
            yield None

    def _string(self, end: str) -> Waiting:
        """A text as it comes, up to its tag. One line end at each side is the format's."""
        held, begun = "", False
        while True:
            piece, mark = self._piece(end)
            text = held + piece
            if not begun and text:
                text, begun = text.removeprefix("\n"), True
            said = text.removesuffix("\n")
            held = text[len(said) :]  # the format's, if the tag follows
            if said:
                yield self.arguments(as_json(said)[1:-1])
            if mark:
                return
            if self.scan.ended:
                raise NotACall
            yield None

    def _piece(self, end: str) -> tuple[str, bool]:
        """(what has come of a value, whether the tag behind it has). Half a tag at the reply's end is none of it."""
        piece, mark = self.scan.until([end])
        self.took(piece + (mark or ""))
        if mark is None and self.scan.ended:
            piece = piece[: len(piece) - held_back(piece, [end])]
        return piece, mark is not None


def tagged_parser(*styles: CallTags, tags: ThinkTags = THINK) -> Callable[[str, Tools], TaggedCallParser]:
    """What ChatFormat.parser is: (prompt, tools) -> a parser for these tags."""

    def make(prompt: str, tools: Tools) -> TaggedCallParser:
        return TaggedCallParser(opened_by(prompt, tags), tools, styles, tags)

    return make
