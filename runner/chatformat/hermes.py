"""Qwen 2.5 and 3, Hermes, Granite 4, MiMo and many more: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`."""

from __future__ import annotations

from dataclasses import replace

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.gbnf import LINE, quote, sequence
from moe_edge.runner.chatformat.json_calls import JsonMarks, json_parser
from moe_edge.runner.chatformat.shapes import between_tags, json_form
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

BEGIN, END = "<tool_call>", "</tool_call>"
_CALL = json_form("", "", LINE)
FORM = replace(
    _CALL, head=lambda name: sequence(quote(BEGIN), LINE, _CALL.head(name)), tail=sequence(_CALL.tail, LINE, quote(END))
)  # each call between tags of its own

FORMAT = ChatFormat(
    "hermes", 500, lambda template: BEGIN in template, json_parser(JsonMarks(((BEGIN, END),), bare=True)),
    tags=(OPEN, CLOSE, BEGIN, END), prepare=without_thinking, thinking=between_tags(), calls=lambda template: (FORM,),
)  # fmt: skip
