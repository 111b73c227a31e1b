"""Seed-OSS: Qwen3-Coder's calls in a tag of its own, and thinking in `<seed:think>`."""

from __future__ import annotations

import functools
from typing import Any

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.qwen_coder import SEED
from moe_edge.runner.chatformat.shapes import between_tags, tagged_form
from moe_edge.runner.chatformat.tagged_calls import tagged_parser
from moe_edge.runner.chatformat.think import ThinkTags, without_thinking

THINKING = ThinkTags("<seed:think>", "</seed:think>")
FORM = tagged_form(SEED, each=True)


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Its template knows a budget of tokens; with none it does not think."""
    return {"thinking_budget": 0, **told} if told.get("enable_thinking") is False else told


FORMAT = ChatFormat(
    "seed", 105, lambda template: SEED.begin in template, tagged_parser(SEED, tags=THINKING),
    tags=(THINKING.open, THINKING.close, *SEED.tokens), prepare=functools.partial(without_thinking, tags=THINKING),
    settings=settings, thinking=between_tags(THINKING), calls=lambda template: (FORM,),
)  # fmt: skip
