"""Apertus: `<|tools_prefix|>[{"NAME": {...}}]<|tools_suffix|>`; thinking between `<|inner_prefix|>` and its end."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.gbnf import quote
from moe_edge.runner.chatformat.json_calls import JsonMarks, json_parser
from moe_edge.runner.chatformat.shapes import between_tags, json_form
from moe_edge.runner.chatformat.think import ThinkTags

BEGIN, END = "<|tools_prefix|>", "<|tools_suffix|>"
THINKING = ThinkTags("<|inner_prefix|>", "<|inner_suffix|>")
FORM = json_form(quote(BEGIN + "["), quote("]" + END), '"," " "?', head='{"', middle='": ')

FORMAT = ChatFormat(
    "apertus", 60, lambda template: BEGIN in template,
    json_parser(JsonMarks(((BEGIN, END),), name_is_key=True), THINKING),
    tags=(BEGIN, END, THINKING.open, THINKING.close), thinking=between_tags(THINKING), calls=lambda template: (FORM,),
)  # fmt: skip
