"""Muse: messages to recipients, `to=self` for thinking, `to=user` for the answer, `to=TOOL` for a call in XML.

`<|start|>assistant to=self<|message|>...<|eom|><|start|>assistant to=f<|message|><atem:function_calls>...<|eot|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moe_edge.runner.chatformat.format import ChatFormat, StreamParser, held_back
from moe_edge.runner.chatformat.forms import Thinking
from moe_edge.runner.chatformat.gbnf import optional, quote, sequence
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text
from moe_edge.runner.chatformat.shapes import tagged_form
from moe_edge.runner.chatformat.tagged_calls import CallTags, TaggedCallParser
from moe_edge.runner.chatformat.think import ThinkTags

START, MESSAGE, END, LAST = "<|start|>", "<|message|>", "<|eom|>", "<|eot|>"
TAGS = (START, MESSAGE, END, LAST)
STYLE = CallTags(
    begin="<atem:function_calls>", call='<atem:invoke name="', name_end=('">',), key='<atem:parameter name="',
    key_end='">', value="", value_end="</atem:parameter>", call_end="</atem:invoke>", end="</atem:function_calls>",
)  # fmt: skip
NO_TAGS = ThinkTags("\0", "\0")  # thinking is a message here
_HEADER = re.compile(r"<\|start\|>\s*\w*|\bto=\S*")


class MuseParser(StreamParser):
    """Messages to anybody but itself go to a parser of calls."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._said = TaggedCallParser(False, tools, [STYLE], NO_TAGS)
        super().__init__()

    def _parts(self) -> Iterator[Part | None]:
        while True:
            header, mark = "", None
            while mark is None:
                text, mark = self.scan.until([MESSAGE, END, LAST])
                header += text
                if mark is None and self.scan.ended:
                    break
                if mark is None:
                    yield None
            words = _HEADER.sub("", header[: len(header) - held_back(header, TAGS)] if mark is None else header)
            if words.strip():
                yield Text(words)
            if mark is None:
                yield from self._said.finish()
                return
            if mark == MESSAGE:
                yield from self._message(is_thinking="to=self" in header)

    def _message(self, is_thinking: bool) -> Iterator[Part | None]:
        while True:
            text, mark = self.scan.until([END, LAST, START])
            if text and is_thinking:
                yield Reasoning(text)
            elif text:
                yield from self._said.feed(text)
            if mark == START:
                self.scan.text = mark + self.scan.text
            if mark is not None or self.scan.ended:
                return
            yield None


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> MuseParser:
    return MuseParser(tools)


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Its template knows `reasoning_strength`; it cannot be kept from thinking."""
    effort = "low" if told.get("enable_thinking") is False else told.get("reasoning_effort")
    return told if effort is None else {"reasoning_strength": effort, **told}


THINKING = Thinking(
    f" to=self{MESSAGE}", END, after=quote(f"{START}assistant"), answer=quote(f" to=user{MESSAGE}"), always=True,
    bare=False,
)  # fmt: skip
_CALL = tagged_form(STYLE, each=True, guard=TAGS)
FORM = replace(
    _CALL, head=lambda name: sequence(quote(f" to={name}{MESSAGE}"), _CALL.head(name)),
    between=quote(f"{END}{START}assistant"), end=optional(quote(LAST)),
)  # fmt: skip

FORMAT = ChatFormat(
    "muse", 12, lambda template: STYLE.begin in template, make_parser, tags=(*TAGS, *STYLE.tokens), settings=settings,
    thinking=THINKING, calls=lambda template: (FORM,),
)  # fmt: skip
