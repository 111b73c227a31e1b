"""Solar Open: an id, a name and arguments as JSON, each behind a tag; thinking and answer have tags too."""

from __future__ import annotations

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.gbnf import ID, quote, sequence
from moe_edge.runner.chatformat.named_calls import NameTags, named_parser
from moe_edge.runner.chatformat.shapes import between_tags, named_form
from moe_edge.runner.chatformat.think import ThinkTags, least_effort

THINKING = ThinkTags("<|think|>", "<|end|><|begin|>assistant", ("<|content|>",))
STYLE = NameTags(
    begin="<|tool_calls|>", call="<|tool_call:begin|>", before_name="<|tool_call:name|>",
    name_end="<|tool_call:args|>", call_end="<|tool_call:end|>", end="<|calls|>",
)  # fmt: skip

FORM = named_form(STYLE, before=sequence(ID, quote(STYLE.before_name)))

FORMAT = ChatFormat(
    "solar", 55, lambda template: STYLE.call in template, named_parser(STYLE, tags=THINKING),
    tags=(*STYLE.tokens, THINKING.open, "<|content|>", "<|begin|>", "<|end|>"), settings=least_effort,
    thinking=between_tags(THINKING, after="", answer=quote("<|content|>"), always=True, bare=False),
    calls=lambda template: (FORM,),
)  # fmt: skip
