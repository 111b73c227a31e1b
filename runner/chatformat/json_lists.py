"""Calls as a list of JSON objects, between tags of their own: Nemotron Nano 2, Apriel, MiniMax M1, Granite 3."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm
from moe_edge.runner.chatformat.gbnf import LINE, quote, sequence
from moe_edge.runner.chatformat.json_calls import JsonMarks, json_parser
from moe_edge.runner.chatformat.shapes import between_tags, json_form
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

PAIRS = (
    ("<TOOLCALL>", "</TOOLCALL>"),  # Nemotron Nano 2
    ("<tool_calls>", "</tool_calls>"),  # Apriel, MiniMax M1
    ("<|tool_call|>", ""),  # Granite 3
    ("<|function_call|>", ""),  # GigaChat 3.1
)


def forms(template: str) -> tuple[CallForm, ...]:
    """A list between the marks of this template. MiniMax M1 writes its calls on lines, without the brackets."""
    begin, end = next(pair for pair in PAIRS if pair[0] in template)
    if begin == "<tool_calls>" and f"{begin}[" not in template:
        return (json_form(sequence(quote(begin), LINE), sequence(LINE, quote(end)), LINE),)
    return (json_form(quote(begin + "["), quote("]" + end), '"," " "?'),)


FORMAT = ChatFormat(
    "json_lists", 450, lambda template: any(begin in template for begin, _ in PAIRS), json_parser(JsonMarks(PAIRS)),
    tags=(OPEN, CLOSE, *(tag for pair in PAIRS for tag in pair if tag)), prepare=without_thinking,
    thinking=between_tags(), calls=forms,
)  # fmt: skip
