"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`, in a section."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.gbnf import NUMBER, quote, sequence
from moe_edge.runner.chatformat.named_calls import NameTags, named_parser
from moe_edge.runner.chatformat.shapes import between_tags, named_form
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking


def tool_name(text: str) -> str:
    """`get_weather` of `functions.get_weather:0`."""
    name = text.strip()
    head, colon, number = name.rpartition(":")
    return (head if colon and number.isdigit() else name).removeprefix("functions.")


STYLE = NameTags(
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|tool_calls_section_end|>", clean=tool_name,
)  # fmt: skip

FORM = named_form(STYLE, before=quote("functions."), behind=sequence(quote(":"), NUMBER))

FORMAT = ChatFormat(
    "kimi", 40, lambda template: STYLE.begin in template, named_parser(STYLE),
    tags=(OPEN, CLOSE, *STYLE.tokens), prepare=without_thinking,
    thinking=between_tags(), calls=lambda template: (FORM,),
)  # fmt: skip
