"""DeepSeek R1, V3 and V3.1: calls between tags with letters of their own, arguments as JSON."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.named_calls import NameTags, named_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

# R1 and V3 write `function` before the separator and the name on the line behind it; V3.1 the name before.
STYLE = NameTags(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
)

FORMAT = ChatFormat(
    "deepseek", 30, lambda template: STYLE.begin in template, named_parser(STYLE),
    tags=(OPEN, CLOSE, *STYLE.tokens), prepare=without_thinking,
)  # fmt: skip
