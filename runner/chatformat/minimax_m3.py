"""MiniMax M3: XML whose tags each stand behind a token of their own, `]<]minimax[>[<city>Paris]<]minimax[>[</city>`.

Objects and lists are tags within tags; an item of a list is `<item>`. The template leaves nulls out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import CallParser, NotACall, Tools, Waiting, typed_value
from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.gbnf import BLANKS, quote, sequence
from moe_edge.runner.chatformat.shapes import between_tags
from moe_edge.runner.chatformat.think import ThinkTags, opened_by, without_thinking

NS = "]<]minimax[>["
BEGIN, END, CALL, CALL_END = f"{NS}<tool_call>", f"{NS}</tool_call>", f'{NS}<invoke name="', f"{NS}</invoke>"
# A reply without thinking begins with the closing tag.
THINKING = ThinkTags("<mm:think>", "</mm:think>", ("</mm:think>",))
DEEPEST = 50


class MiniMaxM3Parser(CallParser):
    """A call is told when it is whole, since a value's kind follows from the tags within it."""

    marks = (BEGIN, CALL)

    def __init__(self, opened: bool, tools: Tools) -> None:
        super().__init__(opened, tools, THINKING)

    def read_calls(self, mark: str) -> Waiting:
        if mark == CALL:  # without the tag around it
            yield from self._call()
            return
        n = 0
        while (yield from self.optional(CALL, END)) == CALL:
            yield from self._call()
            n += 1
        if n == 0:
            raise NotACall

    def _call(self) -> Waiting:
        head, _ = yield from self.until('">')
        name = self.name(head)
        body, _ = yield from self.until(CALL_END)
        pieces = iter(body.split(NS))
        self.stray(next(pieces))
        schema = self.tools.get(name, {}).get("parameters")
        arguments = self._inside(pieces, "", schema, 0)
        yield from self.whole(name, arguments if isinstance(arguments, dict) else {})

    def _inside(self, pieces: Iterator[str], tag: str, schema: Any, depth: int) -> Any:
        """The value between `<tag>` and `</tag>`, as an object, as a list, or None where no tag is within."""
        if depth > DEEPEST:
            raise NotACall
        pairs: list[tuple[str, Any]] = []
        for piece in pieces:
            head, closed, text = piece.partition(">")
            if not closed or not head.startswith("<"):
                raise NotACall
            if head.startswith("</"):
                if head[2:] != tag:
                    raise NotACall
                self.stray(text)
                return _put_together(pairs, schema) if pairs else None
            key = head[1:]
            inner = _schema_of(schema, key)
            value = self._inside(pieces, key, inner, depth + 1)
            if value is None:
                value = _leaf(inner, text)
            else:
                self.stray(text)
            pairs.append((key, value))
        if tag:
            raise NotACall
        return _put_together(pairs, schema) if pairs else {}


def _put_together(pairs: list[tuple[str, Any]], schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    is_list = kind == "array" or (kind != "object" and all(key == "item" for key, _ in pairs))
    return [value for _, value in pairs] if is_list else dict(pairs)


def _schema_of(schema: Any, key: str) -> Any:
    if not isinstance(schema, Mapping):
        return None
    if schema.get("type") == "array":
        return schema.get("items")
    properties = schema.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def _leaf(schema: Any, text: str) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if not text.strip() and kind in ("object", "array"):
        return {} if kind == "object" else []
    return typed_value({"properties": {"": schema}}, "", text)


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> MiniMaxM3Parser:
    return MiniMaxM3Parser(opened_by(prompt, THINKING), tools)


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Its template knows `thinking_mode`."""
    think = told.get("enable_thinking")
    return told if think is None else {"thinking_mode": "enabled" if think else "disabled", **told}


def prepare(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return without_thinking(messages, THINKING)


FORMAT = ChatFormat(
    "minimax_m3", 25, lambda template: NS in template and "toolcall_begin_token" in template, make_parser,
    tags=(NS, *(tag.removeprefix(NS) for tag in (BEGIN, END)), THINKING.open, THINKING.close), prepare=prepare,
    settings=settings,
    thinking=between_tags(THINKING, skipped=sequence(BLANKS, quote(THINKING.close), BLANKS), always=True),
)  # fmt: skip
