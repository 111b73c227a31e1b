"""Seed-OSS: Qwen3-Coder's calls in a tag of its own, and thinking in `<seed:think>`."""

from __future__ import annotations

import functools

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.qwen_coder import SEED
from moe_edge.runner.chatformat.tagged_calls import tagged_parser
from moe_edge.runner.chatformat.think import ThinkTags, without_thinking

THINKING = ThinkTags("<seed:think>", "</seed:think>")

FORMAT = ChatFormat(
    "seed", 105, lambda template: SEED.begin in template, tagged_parser(SEED, tags=THINKING),
    tags=(THINKING.open, THINKING.close, *SEED.tokens), prepare=functools.partial(without_thinking, tags=THINKING),
)  # fmt: skip
