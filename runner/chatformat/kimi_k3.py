"""Kimi K3: `<|open|>TAG name="value"<|sep|> ... <|close|>TAG<|sep|>`, for thinking, the answer and calls alike.

A reply begins inside `think`, or inside `response` when the model is not to think; the prompt has opened it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import Tools, as_json, new_call_id, without_a_begun_word
from moe_edge.runner.chatformat.format import ChatFormat, StreamParser, held_back
from moe_edge.runner.chatformat.forms import THOUGHT, CallForm, Lead, TagArguments, Thinking
from moe_edge.runner.chatformat.gbnf import NUMBER, optional, quote, sequence
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart

OPEN, CLOSE, SEP, END = "<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"
TAGS = (OPEN, CLOSE, SEP, END)
KNOWN = ("message", "think", "response", "tools", "call", "argument", "json")
_ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')


class KimiK3Parser(StreamParser):
    """opened: the tag that the prompt leaves open. Arguments are told as they come."""

    def __init__(self, opened: str, tools: Tools) -> None:
        self._inside = [opened] if opened else []  # tags that are open
        self._calls = bool(tools)
        self._blank = ""  # white space between tags
        self._n_calls = self._n_arguments = 0
        self._in_call = self._is_string = False
        super().__init__()

    def _parts(self) -> Iterator[Part | None]:
        while True:
            text, mark = self.scan.until([OPEN, CLOSE, END])
            if mark is None and self.scan.ended and self._in_call:
                text = text[: len(text) - held_back(text, TAGS)]
            yield from self._words(text)
            if mark is None and self.scan.ended:
                yield from self._end_call()
                return
            if mark in (OPEN, CLOSE):
                yield from self._tag(mark)
            elif mark is None:
                yield None

    def _tag(self, mark: str) -> Iterator[Part | None]:
        """What stands between OPEN or CLOSE and SEP; words, if SEP does not follow."""
        head = ""
        while True:
            text, found = self.scan.until([SEP, OPEN, CLOSE])
            head += text
            if found == SEP:
                break
            if found is not None:
                self.scan.text = found + self.scan.text
                yield from self._words(mark + head)
                return
            if self.scan.ended:
                yield from self._words(without_a_begun_word(mark + head))
                return
            yield None
        self._blank = ""
        name, _, rest = head.partition(" ")
        if name not in KNOWN or (mark == CLOSE and rest):
            yield from self._words(mark + head + SEP)
        elif mark == OPEN:
            self._inside.append(name)
            yield from self._begin(name, {key: _unescaped(value) for key, value in _ATTRIBUTE.findall(rest)})
        else:
            yield from self._close(name)

    def _begin(self, name: str, attributes: Mapping[str, str]) -> Iterator[Part]:
        if name == "call" and self._calls:
            yield from self._end_call()
            self._in_call, self._n_arguments = True, 0
            self._n_calls += 1
            yield ToolStart(self._n_calls - 1, new_call_id(), attributes.get("tool", ""))
        elif name == "argument" and self._in_call:
            self._is_string = attributes.get("type") == "string"
            begin = f"{', ' if self._n_arguments else '{'}{json.dumps(attributes.get('key', ''))}: "
            self._n_arguments += 1
            yield self._arguments(begin + '"' * self._is_string)

    def _close(self, name: str) -> Iterator[Part]:
        if name == "argument" and self._in_call and self._is_string:
            yield self._arguments('"')
        elif name == "json" and self._in_call:
            self._n_arguments = -1  # it was an object of its own
        elif name == "call" and self._in_call:
            if self._n_arguments >= 0:
                yield self._arguments("}" if self._n_arguments else "{}")
            yield from self._end_call()
        if name in self._inside:
            while self._inside.pop() != name:
                pass

    def _words(self, text: str) -> Iterator[Part]:
        where = self._inside[-1] if self._inside else ""
        if not text:
            return
        if where == "think":
            yield Reasoning(text)
        elif where == "response":
            yield Text(text)
        elif self._in_call and where == "argument":
            yield self._arguments(as_json(text)[1:-1] if self._is_string else text)
        elif self._in_call and where == "json":
            yield self._arguments(text)
        else:  # where nothing should be; white space is nothing
            text = self._blank + text
            said = text.rstrip()
            self._blank = text[len(said) :]
            if said:
                yield Text(said)

    def _arguments(self, text: str) -> ToolArguments:
        return ToolArguments(self._n_calls - 1, text)

    def _end_call(self) -> Iterator[Part]:
        if self._in_call:
            self._in_call = False
            yield ToolEnd(self._n_calls - 1)


def _unescaped(value: str) -> str:
    return value.replace("&quot;", '"').replace("&amp;", "&")


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> KimiK3Parser:
    opened = re.search(r"<\|open\|>(think|response)<\|sep\|>\s*$", prompt)
    return KimiK3Parser(opened[1] if opened else "", tools)


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Its template knows `thinking_effort`: low, high or max."""
    effort = told.get("reasoning_effort")
    return told if effort is None else {"thinking_effort": "low" if effort == "low" else "high", **told}


def _open(tag: str) -> str:
    return f"{OPEN}{tag}{SEP}"


def _close(tag: str) -> str:
    return f"{CLOSE}{tag}{SEP}"


class InTags(Thinking):
    """A reply begins inside `think` or inside `response`, which the prompt has opened, and calls follow both."""

    def can_go_on(self, prompt: str) -> bool:
        return prompt.endswith(_open("response"))

    def lead(self, prompt: str, template: str, is_call: bool) -> Lead:
        end = "" if is_call else optional(quote(_close("response")), optional(quote(_close("message"))))
        if self.can_go_on(prompt):
            return Lead(quote(_close("response")) if is_call else "", "", end)
        response = optional(quote(_open("response") + _close("response"))) if is_call else quote(_open("response"))
        return Lead(sequence(f"{THOUGHT}-0", response), self.close, end)


_TYPES = {"text": "string", "integer": "number"}
FORM = CallForm(
    lambda name: sequence(quote(f'{OPEN}call tool="{name}" index="'), NUMBER, quote(f'"{SEP}')), quote(_close("call")),
    TagArguments(
        lambda key, kind: quote(f'{OPEN}argument key="{key}" type="{_TYPES.get(kind, kind)}"{SEP}'),
        _close("argument"), "", strips=False, guard=TAGS,
    ),
    quote(_open("tools")), sequence(quote(_close("tools")), optional(quote(_close("message")))), "",
)  # fmt: skip

FORMAT = ChatFormat(
    "kimi_k3", 35, lambda template: OPEN in template and CLOSE in template and SEP in template, make_parser, tags=TAGS,
    settings=settings, thinking=InTags(_open("think"), _close("think")), calls=lambda template: (FORM,),
)  # fmt: skip
