"""Hunyuan 3 (Hy3): GLM's form, with a suffix in every tag."""

from __future__ import annotations

import functools
from typing import Any

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.shapes import between_tags, tagged_form
from moe_edge.runner.chatformat.tagged_calls import CallTags, tagged_parser
from moe_edge.runner.chatformat.think import ThinkTags, without_thinking

S = ":opensource>"
THINKING = ThinkTags(f"<think{S}", f"</think{S}")
STYLE = CallTags(
    begin=f"<tool_calls{S}", call=f"<tool_call{S}", name_end=(f"<tool_sep{S}", f"<arg_key{S}"), key=f"<arg_key{S}",
    key_end=f"</arg_key{S}", value=f"<arg_value{S}", value_end=f"</arg_value{S}", call_end=f"</tool_call{S}",
    end=f"</tool_calls{S}",
)  # fmt: skip
FORM = tagged_form(STYLE)


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Its template knows no other efforts than no_think, low and high, and refuses the rest."""
    effort = told.get("reasoning_effort")
    if told.get("enable_thinking") is False:
        effort = "no_think"
    elif effort == "medium" or (effort is None and told.get("enable_thinking")):
        effort = "high"
    return told if effort is None else {**told, "reasoning_effort": effort}


FORMAT = ChatFormat(
    "hunyuan", 90, lambda template: "hy_" in template and "tool_sep" in template, tagged_parser(STYLE, tags=THINKING),
    tags=(THINKING.open, THINKING.close, *STYLE.tokens), prepare=functools.partial(without_thinking, tags=THINKING),
    settings=settings, thinking=between_tags(THINKING, always=True), calls=lambda template: (FORM,),
)  # fmt: skip
