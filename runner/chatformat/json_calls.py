"""Calls that are JSON: `{"name": ..., "arguments": {...}}`, one or a list of them, between marks."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting
from moe_edge.runner.chatformat.parts import Part
from moe_edge.runner.chatformat.think import THINK, ThinkTags, opened_by

NAMES, ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")


@dataclass(frozen=True)
class JsonMarks:
    """pairs: (what begins calls, what ends them; empty: they end by themselves). name_is_key: `{"NAME": {...}}`.

    bare: an answer that begins with `{"name": TOOL, "arguments":` is a call too, where TOOL was offered.
    """

    pairs: tuple[tuple[str, str], ...]
    name_is_key: bool = False
    bare: bool = False


class JsonCallParser(CallParser):
    """Arguments are told as they come when the name stands before them, as all models write it."""

    def __init__(self, opened: bool, tools: Tools, style: JsonMarks, tags: ThinkTags = THINK) -> None:
        self._style, self._is_bare = style, False
        self.marks = tuple(begin for begin, _ in style.pairs)
        super().__init__(opened, tools, tags)

    def answer(self) -> Waiting:
        if self._style.bare and self.tools:
            yield from self._bare_calls()
        yield from super().answer()

    def _bare_calls(self) -> Waiting:
        """Those at the head of the answer, one after the other; what is none comes back whole."""
        self._is_bare = True
        while True:
            before, space = self._n_calls, (yield from self.blank())
            if not self.scan.text.startswith("{"):
                self.scan.text = space + self.scan.text
                break
            self.scan.text = self.scan.text[1:]
            yield from self._attempt("{", space)
            if self._n_calls == before:
                break
        self._is_bare = False

    def read_calls(self, mark: str) -> Iterator[Part | None]:
        if mark[-1] in "[{":  # part of the JSON
            self.scan.text, self._raw = mark[-1] + self.scan.text, mark[:-1]
        is_list = (yield from self.character()) == "["
        if is_list:
            self.take(1)
        while True:
            yield from self._call()
            following = yield from self.character()
            if is_list and following == ",":
                self.take(1)
            elif is_list or following != "{" or self._is_bare:
                break
        if is_list:
            yield from self.optional("]")
        end = dict(self._style.pairs).get(mark)
        if end:
            yield from self.optional(end)

    def _call(self) -> Generator[Part | None, None, None]:
        yield from self.expect("{")
        name: str | None = None
        later: str | None = None  # arguments that came before the name
        told = False
        while (yield from self.character()) != "}":
            yield from self.optional(",")
            key = _text(_loads((yield from self._string())))
            if self._is_bare and not told and key != (NAMES if name is None else ARGUMENTS)[0]:
                raise NotACall
            yield from self.expect(":")
            if self._style.name_is_key and name is None:
                name, key = self.name(key), ARGUMENTS[0]
            if key in ARGUMENTS and name and not told and (yield from self.character()) == "{":
                told = True
                yield self.start(name)
                yield from self.json_object()
                continue
            value = yield from self.json_text()
            if key in NAMES:
                name = self.name(_text(_loads(value)))
                if self._is_bare and name not in self.tools:
                    raise NotACall
            elif key in ARGUMENTS:
                later = value
        self.take(1)
        if not name or (self._is_bare and not told and later is None):
            raise NotACall
        if told:
            yield self.end()
        else:
            yield from self.whole(name, _object(later))

    def _string(self) -> Generator[Part | None, None, str]:
        if (yield from self.character()) != '"':
            raise NotACall
        return (yield from self.json_text())


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotACall from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise NotACall
    return value


def _object(text: str | None) -> dict[str, Any]:
    """Arguments as an object; some models write it as a string, or leave out an empty one."""
    value = {} if text is None else _loads(text)
    if isinstance(value, str):
        value = _loads(value) if value.strip() else {}
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise NotACall
    return value


def json_parser(style: JsonMarks, tags: ThinkTags = THINK) -> Any:
    """What ChatFormat.parser is: (prompt, tools) -> a parser for this style."""

    def make(prompt: str, tools: Sequence[Mapping[str, Any]]) -> JsonCallParser:
        return JsonCallParser(opened_by(prompt, tags), tools, style, tags)

    return make
