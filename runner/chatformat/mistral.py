"""Mistral: `[TOOL_CALLS]NAME[ARGS]{...}`, before that `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`; `[THINK]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import NotACall, Tools, Waiting
from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm, JsonArguments
from moe_edge.runner.chatformat.gbnf import ID, quote, sequence
from moe_edge.runner.chatformat.json_calls import JsonCallParser, JsonMarks
from moe_edge.runner.chatformat.shapes import between_tags, json_form
from moe_edge.runner.chatformat.think import ThinkTags, opened_by

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
THINKING = ThinkTags("[THINK]", "[/THINK]")


class MistralParser(JsonCallParser):
    """One mark for both forms: what stands behind it tells them apart."""

    def __init__(self, opened: bool, tools: Tools) -> None:
        super().__init__(opened, tools, JsonMarks(((CALLS, ""),)), THINKING)

    def read_calls(self, mark: str) -> Waiting:
        if (yield from self.character()) in ("[", "{"):
            yield from super().read_calls(mark)
            return
        name, found = yield from self.until(ARGS, CALL_ID, "{")
        if found == CALL_ID:
            yield from self.until(ARGS)
        if found == "{":
            self.scan.text, self._raw = "{" + self.scan.text, self._raw[:-1]
        name = self.name(name)
        if found == "{" and name not in self.tools:  # without a mark behind it, only a known name is one
            raise NotACall
        if (yield from self.character()) != "{":
            raise NotACall
        yield self.start(name)
        yield from self.json_object()
        yield self.end()


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> MistralParser:
    return MistralParser(opened_by(prompt, THINKING), tools)


def forms(template: str) -> tuple[CallForm, ...]:
    """What the template writes: a name, perhaps an id, and arguments; before 2025 a list."""
    if ARGS not in template:
        return (json_form(quote(CALLS + "["), quote("]"), '"," " "?'),)
    identified = sequence(quote(CALL_ID), ID) if CALL_ID in template else ""
    return (
        CallForm(lambda name: sequence(quote(CALLS + name), identified, quote(ARGS)), "", JsonArguments(), between=""),
    )


FORMAT = ChatFormat(
    "mistral", 50, lambda template: CALLS in template, make_parser,
    tags=(CALLS, ARGS, CALL_ID, THINKING.open, THINKING.close), thinking=between_tags(THINKING), calls=forms,
)  # fmt: skip
