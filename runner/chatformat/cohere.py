"""Cohere's Command models: thinking, a list of actions, or a response, each between tags of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm, JsonArguments
from moe_edge.runner.chatformat.gbnf import BLANK, BLANKS, NUMBER, optional, quote, sequence
from moe_edge.runner.chatformat.json_calls import JsonCallParser, JsonMarks
from moe_edge.runner.chatformat.shapes import between_tags
from moe_edge.runner.chatformat.think import ThinkTags, opened_by

ACTION, ACTION_END = "<|START_ACTION|>", "<|END_ACTION|>"
RESPONSE, RESPONSE_END = "<|START_RESPONSE|>", "<|END_RESPONSE|>"
TEXT, TEXT_END = "<|START_TEXT|>", "<|END_TEXT|>"
THINKING = ThinkTags("<|START_THINKING|>", "<|END_THINKING|>", (RESPONSE, TEXT))
TAGS = (ACTION, ACTION_END, RESPONSE, RESPONSE_END, TEXT, TEXT_END, THINKING.open, THINKING.close)


class CohereParser(JsonCallParser):
    """The tags around the response are no part of it."""

    silent = (RESPONSE, RESPONSE_END, TEXT, TEXT_END)


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> CohereParser:
    style = JsonMarks(((ACTION, ACTION_END),))
    return CohereParser(opened_by(prompt, THINKING), tools, style, THINKING)


def settings(told: dict[str, Any]) -> dict[str, Any]:
    """Its template knows `reasoning`."""
    think = told.get("enable_thinking")
    return told if think is None else {"reasoning": think, **told}


def _head(name: str) -> str:
    identified = sequence(quote('{"tool_call_id": "'), NUMBER, quote('", '))
    return sequence(identified, quote(f'"tool_name": "{name}", "parameters": '))


FORM = CallForm(
    _head, quote("}"), JsonArguments(), sequence(quote(ACTION + "["), BLANKS, BLANK),
    sequence(BLANK, quote("]" + ACTION_END)), sequence(quote(","), BLANKS, BLANK),
)  # fmt: skip

FORMAT = ChatFormat(
    "cohere", 70, lambda template: ACTION in template, make_parser, tags=TAGS, settings=settings,
    thinking=between_tags(THINKING, answer=optional(quote(RESPONSE)), answer_end=optional(quote(RESPONSE_END))),
    calls=lambda template: (FORM,),
)  # fmt: skip
