"""GLM 4.5 to 4.7, Ling, Spark, Laguna: `<tool_call>NAME<arg_key>..</arg_key><arg_value>..</arg_value></tool_call>`."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.shapes import between_tags, tagged_form
from moe_edge.runner.chatformat.tagged_calls import CallTags, tagged_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

STYLE = CallTags(
    begin="<tool_call>", call="", name_end=("<arg_key>",), key="<arg_key>", key_end="</arg_key>", value="<arg_value>",
    value_end="</arg_value>", call_end="</tool_call>", end="",
)  # fmt: skip
FORM = tagged_form(STYLE)

FORMAT = ChatFormat(
    "glm", 100, lambda template: "<arg_key>" in template, tagged_parser(STYLE),
    tags=(OPEN, CLOSE, *STYLE.tokens), prepare=without_thinking,
    thinking=between_tags(), calls=lambda template: (FORM,),
)  # fmt: skip
