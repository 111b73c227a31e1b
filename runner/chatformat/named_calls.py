"""Calls that are a name, a tag, and arguments as JSON: Kimi K2, DeepSeek up to V3.1, Solar, Functionary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting
from moe_edge.runner.chatformat.think import THINK, ThinkTags, opened_by


@dataclass(frozen=True)
class NameTags:
    """begin, end: around all calls; empty where nothing is. call, call_end: around one; call is empty where begin is.

    before_name: what a call may have before its name, which ends with it. name_end: between name and arguments.
    clean: the name as it is written -> the tool's.
    """

    begin: str
    call: str
    name_end: str
    call_end: str
    end: str
    before_name: str = ""
    clean: Callable[[str], str] = str.strip

    @property
    def tokens(self) -> tuple[str, ...]:
        tags = (self.begin, self.call, self.before_name, self.name_end, self.call_end, self.end)
        return tuple(tag for tag in tags if tag.startswith("<") and tag.endswith(">"))


class NamedCallParser(CallParser):
    """Arguments are told as they come."""

    def __init__(self, opened: bool, tools: Tools, styles: Sequence[NameTags], tags: ThinkTags = THINK) -> None:
        self._styles = {style.begin or style.call: style for style in styles}
        self.marks = tuple(self._styles)
        super().__init__(opened, tools, tags)

    def read_calls(self, mark: str) -> Waiting:
        style = self._styles[mark]
        if not style.begin:
            yield from self._call(style)
            return
        n = 0
        while (yield from self.optional(style.call, *([style.end] if style.end else []))) == style.call:
            yield from self._call(style)
            n += 1
        if n == 0:
            raise NotACall

    def _call(self, style: NameTags) -> Waiting:
        if style.before_name:
            yield from self.until(style.before_name)
        name, _ = yield from self.until(style.name_end)
        # DeepSeek V3 and R1: the name stands on a line, the arguments in a block of Markdown.
        if (yield from self.character()) != "{":
            kind = name.strip()
            line, found = yield from self.until("{")
            name = line.split("```")[0].strip() or name
            if name != kind and kind != "function":
                self.stray(kind)
            self.scan.text, self._raw = found + self.scan.text, self._raw[:-1]
        yield self.start(self.name(style.clean(name)))
        yield from self.json_object()
        yield self.end()
        yield from self.optional("```")
        yield from self.optional(style.call_end)


def named_parser(*styles: NameTags, tags: ThinkTags = THINK) -> Callable[[str, Tools], NamedCallParser]:
    """What ChatFormat.parser is: (prompt, tools) -> a parser for these tags."""

    def make(prompt: str, tools: Tools) -> NamedCallParser:
        return NamedCallParser(opened_by(prompt, tags), tools, styles, tags)

    return make
