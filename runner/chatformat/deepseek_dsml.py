"""DeepSeek V3.2 and V4: DSML, which says of each argument whether it is a string."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.tagged_calls import CallTags, tagged_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

D = "｜DSML｜"


def style(group: str) -> CallTags:
    return CallTags(
        begin=f"<{D}{group}>", call=f'<{D}invoke name="', name_end=('">',), key=f'<{D}parameter name="', key_end='">',
        value="", value_end=f"</{D}parameter>", call_end=f"</{D}invoke>", end=f"</{D}{group}>",
    )  # fmt: skip


STYLES = (style("function_calls"), style("tool_calls"))

FORMAT = ChatFormat(
    "deepseek_dsml", 20, lambda template: D in template, tagged_parser(*STYLES), tags=(OPEN, CLOSE, D),
    prepare=without_thinking,
)  # fmt: skip
