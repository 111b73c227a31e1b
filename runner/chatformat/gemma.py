"""Gemma 4: `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3}<tool_call|>`, thinking on the channel `thought`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting
from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm, TagArguments
from moe_edge.runner.chatformat.gbnf import quote
from moe_edge.runner.chatformat.shapes import between_tags
from moe_edge.runner.chatformat.think import ThinkTags, opened_by, without_thinking

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
THINKING = ThinkTags("<|channel>thought", "<channel|>")
WORDS = {"None": None, "True": True, "False": False}  # what its template writes for JSON's
TAGS = (BEGIN, END, QUOTE, "<|channel>", "<channel|>", "<|tool_response>")


class GemmaParser(CallParser):
    """A call is told when it is whole: its values are a notation of Gemma's own."""

    marks = (BEGIN,)

    def __init__(self, opened: bool, tools: Tools) -> None:
        super().__init__(opened, tools, THINKING)

    def read_calls(self, mark: str) -> Waiting:
        text, _ = yield from self.until(END)
        head, bracket, _ = text.partition("{")
        name = self.name(head.strip().removeprefix("call:"))
        if not bracket:
            raise NotACall
        reader = Notation(text[len(head) :])
        arguments = reader.value()
        if not isinstance(arguments, dict) or reader.rest().strip():
            raise NotACall
        yield from self.whole(name, arguments)
        yield from self.optional("<|tool_response>")


class Notation:
    """`{key:<|"|>text<|"|>,list:[1,true]}`: JSON without quotes around keys, and another quote around texts."""

    def __init__(self, text: str, depth: int = 0) -> None:
        self._text, self._at, self._depth = text, 0, depth

    def rest(self) -> str:
        return self._text[self._at :]

    def value(self) -> Any:
        """The next value, taken. Raises NotACall for what is none."""
        self._depth += 1
        if self._depth > 100:
            raise NotACall
        try:
            if self._next("{"):
                return self._object()
            if self._next("["):
                return self._list()
            if self._next(QUOTE):
                return self._until(QUOTE)
            word = self._word(",]}")
            return WORDS[word] if word in WORDS else json.loads(word)
        except ValueError as error:
            raise NotACall from error
        finally:
            self._depth -= 1

    def _object(self) -> dict[str, Any]:
        found = {}
        while not self._next("}"):
            key = self._until(QUOTE) if self._next(QUOTE) else self._word(":").strip('"')
            self._need(":")
            found[key] = self.value()
            if not self._next(","):
                self._need("}")
                break
        return found

    def _list(self) -> list[Any]:
        found = []
        while not self._next("]"):
            found.append(self.value())
            if not self._next(","):
                self._need("]")
                break
        return found

    def _next(self, mark: str) -> bool:
        rest = self.rest()
        space = len(rest) - len(rest.lstrip())
        if not rest.startswith(mark, space):
            return False
        self._at += space + len(mark)
        return True

    def _need(self, mark: str) -> None:
        if not self._next(mark):
            raise NotACall

    def _until(self, mark: str) -> str:
        end = self._text.find(mark, self._at)
        if end < 0:
            raise NotACall
        found, self._at = self._text[self._at : end], end + len(mark)
        return found

    def _word(self, ends: str) -> str:
        start = self._at
        while self._at < len(self._text) and self._text[self._at] not in ends:
            self._at += 1
        return self._text[start : self._at].strip()


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> GemmaParser:
    return GemmaParser(opened_by(prompt, THINKING), tools)


FORM = CallForm(
    lambda name: quote(f"{BEGIN}call:{name}{{"), quote("}" + END),
    TagArguments(
        lambda key, kind: quote(f"{key}:" + (QUOTE if kind == "text" else "")), QUOTE, "", quote(","), strips=False,
        guard=(END,), flat=True,
    ),
    between="",
)  # fmt: skip

FORMAT = ChatFormat(
    "gemma", 15, lambda template: BEGIN in template, make_parser, tags=TAGS,
    prepare=functools.partial(without_thinking, tags=THINKING), thinking=between_tags(THINKING),
    calls=lambda template: (FORM,),
)  # fmt: skip
