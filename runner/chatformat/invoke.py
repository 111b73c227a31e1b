"""MiniMax M2: `<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>`; MiniCPM 5: its relative."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm
from moe_edge.runner.chatformat.shapes import between_tags, tagged_form
from moe_edge.runner.chatformat.tagged_calls import CallTags, tagged_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking


def style(begin: str, prefix: str, end: str) -> CallTags:
    return CallTags(
        begin=begin, call=f'<{prefix}invoke name="', name_end=('">',), key=f'<{prefix}parameter name="', key_end='">',
        value="", value_end=f"</{prefix}parameter>", call_end=f"</{prefix}invoke>", end=end,
    )  # fmt: skip


STYLES = (
    style("<minimax:tool_call>", "", "</minimax:tool_call>"),
    CallTags(  # MiniCPM 5
        begin="", call='<function name="', name_end=('">',), key='<param name="', key_end='">', value="",
        value_end="</param>", call_end="</function>", end="",
    ),
)  # fmt: skip


def forms(template: str) -> tuple[CallForm, ...]:
    return (tagged_form(next(style for style in STYLES if style.mark in template)),)


FORMAT = ChatFormat(
    "invoke", 120, lambda template: any(style.mark in template for style in STYLES), tagged_parser(*STYLES),
    tags=(OPEN, CLOSE, *(tag for style in STYLES for tag in style.tokens)), prepare=without_thinking,
    thinking=between_tags(), calls=forms,
)  # fmt: skip
