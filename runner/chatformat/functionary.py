"""Functionary 3.1: `<function=NAME>{...}</function>`."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.named_calls import NameTags, named_parser
from moe_edge.runner.chatformat.shapes import named_form

STYLE = NameTags(begin="", call="<function=", name_end=">", call_end="</function>", end="")

FORM = named_form(STYLE)

FORMAT = ChatFormat(
    "functionary", 130, lambda template: STYLE.call in template, named_parser(STYLE), calls=lambda template: (FORM,)
)
