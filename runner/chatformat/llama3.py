"""Llama 3.1 to 3.3: a reply that is all `{"name": ..., "parameters": {...}}`, or that behind `<|python_tag|>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.calls import Tools, Waiting
from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.json_calls import JsonCallParser, JsonMarks
from moe_edge.runner.chatformat.shapes import json_form

TAG = "<|python_tag|>"


class Llama3Parser(JsonCallParser):
    """A bracket begins a call only at the head of a reply; elsewhere it is text."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(False, tools, JsonMarks(((TAG, ""), ("{", ""))))

    def _parts(self) -> Waiting:
        if self.tools:
            space = yield from self.blank()
            if self.scan.text.startswith(("{", TAG[0])):
                yield from super()._parts()
                return
            self.scan.text = space + self.scan.text
        yield from self._rest()


def make_parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> Llama3Parser:
    return Llama3Parser(tools)


FORM = json_form("", "", None, middle='", "parameters": ')  # its template knows one call a turn

FORMAT = ChatFormat(
    "llama3", 800, lambda template: "<|start_header_id|>" in template and '"parameters"' in template, make_parser,
    tags=(TAG,), calls=lambda template: (FORM,),
)  # fmt: skip
