"""A tool call that a grammar has forced: `{"name": ..., "arguments": {...}}` as it comes, into parts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from moe_edge.runner.chatformat.format import Parser
from moe_edge.runner.chatformat.parts import Part, Text, ToolArguments, ToolEnd, ToolStart

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


class ForcedCallParser:
    """inner: the model's own parser, which takes its thinking out; what it gives as text is the call."""

    def __init__(self, inner: Parser) -> None:
        self._inner = inner
        self._head = ""  # until the arguments begin
        self._begun = self._ended = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str) -> list[Part]:
        return [made for part in self._inner.feed(text) for made in self._convert(part)]

    def finish(self) -> list[Part]:
        parts = [made for part in self._inner.finish() for made in self._convert(part)]
        if not self._begun and self._head:
            parts.append(Text(self._head))
        if self._begun and not self._ended:
            parts.append(ToolEnd(0))
        return parts

    def _convert(self, part: Part) -> Iterator[Part]:
        if not isinstance(part, Text):
            yield part
            return
        text = part.text
        if not self._begun:
            self._head += text
            found = _HEAD.match(self._head)
            if found is None:
                return
            self._begun, text = True, self._head[found.end() :]
            yield ToolStart(0, "call_0", json.loads(found[1]))
        if self._depth == 0 and not self._in_string:
            text = text.lstrip()
        if not self._ended and (arguments := self._arguments(text)):
            yield ToolArguments(0, arguments)
        if self._ended and self._depth == 0:
            self._depth = -1  # once
            yield ToolEnd(0)

    def _arguments(self, text: str) -> str:
        """What of the text belongs to the arguments: it ends with the bracket that closes them."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = self._in_string
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0 and character in "}]":
                    self._ended = True
                    return text[: at + 1]
        return text
