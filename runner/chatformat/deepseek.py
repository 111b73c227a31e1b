"""DeepSeek R1, V3 and V3.1: calls between tags with letters of their own, arguments as JSON."""

from __future__ import annotations

from dataclasses import replace

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm
from moe_edge.runner.chatformat.gbnf import LINE, quote, sequence
from moe_edge.runner.chatformat.named_calls import NameTags, named_parser
from moe_edge.runner.chatformat.shapes import between_tags, named_form
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

# R1 and V3 write `function` before the separator and the name on the line behind it; V3.1 the name before.
STYLE = NameTags(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
)

PLAIN = named_form(STYLE)
_FENCED = named_form(STYLE, each=LINE)
FENCED = replace(
    _FENCED, head=lambda name: quote(f"{STYLE.call}function{STYLE.name_end}{name}\n```json\n"),
    tail=sequence(LINE, quote("```" + STYLE.call_end)),
)  # R1 and V3


def forms(template: str) -> tuple[CallForm, ...]:
    return (FENCED if "```json" in template else PLAIN,)


FORMAT = ChatFormat(
    "deepseek", 30, lambda template: STYLE.begin in template, named_parser(STYLE),
    tags=(OPEN, CLOSE, *STYLE.tokens), prepare=without_thinking, thinking=between_tags(), calls=forms,
)  # fmt: skip
