"""DeepSeek V3.2 and V4: DSML, which says of each argument whether it is a string."""

from __future__ import annotations

from dataclasses import replace

from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import CallForm, TagArguments
from moe_edge.runner.chatformat.gbnf import quote
from moe_edge.runner.chatformat.shapes import between_tags, tagged_form
from moe_edge.runner.chatformat.tagged_calls import CallTags, tagged_parser
from moe_edge.runner.chatformat.think import CLOSE, OPEN, without_thinking

D = "｜DSML｜"


def style(group: str) -> CallTags:
    return CallTags(
        begin=f"<{D}{group}>", call=f'<{D}invoke name="', name_end=('">',), key=f'<{D}parameter name="', key_end='">',
        value="", value_end=f"</{D}parameter>", call_end=f"</{D}invoke>", end=f"</{D}{group}>",
    )  # fmt: skip


STYLES = (style("function_calls"), style("tool_calls"))


def _form(tags: CallTags) -> CallForm:
    def before_value(key: str, kind: str) -> str:
        return quote(f'{tags.key}{key}" string="{str(kind == "text").lower()}">')

    return replace(tagged_form(tags), arguments=TagArguments(before_value, tags.value_end))


def forms(template: str) -> tuple[CallForm, ...]:
    """V3.2 has its calls in `function_calls`, V4 in `tool_calls`."""
    return (_form(STYLES[0] if "function_calls" in template else STYLES[1]),)


FORMAT = ChatFormat(
    "deepseek_dsml", 20, lambda template: D in template, tagged_parser(*STYLES), tags=(OPEN, CLOSE, D),
    prepare=without_thinking, thinking=between_tags(), calls=forms,
)  # fmt: skip
