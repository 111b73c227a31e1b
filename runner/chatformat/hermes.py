"""Qwen 2.5 and 3, Hermes, Granite 4, MiMo and many more: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.json_calls import JsonMarks, json_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

BEGIN, END = "<tool_call>", "</tool_call>"

FORMAT = ChatFormat(
    "hermes", 500, lambda template: BEGIN in template, json_parser(JsonMarks(((BEGIN, END),))),
    tags=(OPEN, CLOSE, BEGIN, END), prepare=without_thinking,
)  # fmt: skip
