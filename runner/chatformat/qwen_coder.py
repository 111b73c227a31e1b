"""Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5, Seed: `<function=NAME><parameter=KEY>VALUE</parameter></function>`."""

from __future__ import annotations

from dataclasses import replace

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.shapes import between_tags, tagged_form
from moe_edge.runner.chatformat.tagged_calls import CallTags, tagged_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

STYLE = CallTags(
    begin="<tool_call>", call="<function=", name_end=(">",), key="<parameter=", key_end=">", value="",
    value_end="</parameter>", call_end="</function>", end="</tool_call>",
)  # fmt: skip
SEED = replace(STYLE, begin="<seed:tool_call>", end="</seed:tool_call>")
BARE = replace(STYLE, begin="", end="")  # Qwen3-Coder forgets the outer tag now and then
FORM = tagged_form(STYLE, each=True)

FORMAT = ChatFormat(
    "qwen_coder", 110, lambda template: "<function=" in template and "<parameter=" in template,
    tagged_parser(STYLE, SEED, BARE), tags=(OPEN, CLOSE, *STYLE.tokens, *SEED.tokens), prepare=without_thinking,
    thinking=between_tags(), calls=lambda template: (FORM,),
)  # fmt: skip
