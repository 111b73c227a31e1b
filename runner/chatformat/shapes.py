"""The forms of calls that several families share, and what a value between tags can be."""

from __future__ import annotations

from typing import Any

from moe_edge.runner.chatformat.calls import property_types
from moe_edge.runner.chatformat.forms import CallForm, JsonArguments, TagArguments, Thinking
from moe_edge.runner.chatformat.gbnf import LINE, quote, sequence
from moe_edge.runner.chatformat.named_calls import NameTags
from moe_edge.runner.chatformat.tagged_calls import CallTags
from moe_edge.runner.chatformat.think import THINK, ThinkTags


def between_tags(tags: ThinkTags = THINK, **more: Any) -> Thinking:
    """Thinking between two tags. more: of Thinking's fields."""
    return Thinking(tags.open, tags.close, **more)


def kind_of(parameters: Any, key: str) -> str | None:
    """What an argument between tags is: `text`, JSON's name of a type (`object` for one of several), or None where its
    own text does not tell which of its types it has."""
    types = property_types(parameters, key)
    if not types or ("string" in types and types & {"object", "array"}):
        return None
    if "string" in types:
        return "text"
    return next(iter(types)) if len(types) == 1 else "object"


def json_form(
    begin: str, end: str, between: str | None, *, head: str = '{"name": "', middle: str = '", "arguments": ',
    guard: tuple[str, ...] = (),
) -> CallForm:  # fmt: skip
    """Calls that are JSON objects. begin, end, between: as in CallForm. head, middle: before and behind the name."""
    return CallForm(
        lambda name: quote(head + name + middle), quote("}"), JsonArguments(guard), begin, end, between
    )


def named_form(tags: NameTags, *, before: str = "", behind: str = "", each: str = "") -> CallForm:
    """Calls of a NamedCallParser. before, behind: GBNF around the name. each: GBNF between two calls."""

    def head(name: str) -> str:
        return sequence(quote(tags.call), before, quote(name), behind, quote(tags.name_end))

    return CallForm(head, quote(tags.call_end), JsonArguments(), quote(tags.begin), quote(tags.end), each)


def tagged_form(tags: CallTags, *, each: bool = False, guard: tuple[str, ...] = ()) -> CallForm:
    """Calls of a TaggedCallParser. each: the outer tags stand around each call, not around all of them."""
    name_end = tags.name_end[0] if tags.name_end[0] != tags.key else ""
    outer = bool(tags.begin and tags.call)

    def head(name: str) -> str:
        inner = sequence(quote((tags.call or tags.begin) + name + name_end), LINE)
        return sequence(quote(tags.begin), LINE, inner) if outer and each else inner

    def before_value(key: str, kind: str) -> str:
        begin = quote(tags.key + key + tags.key_end)
        return sequence(begin, LINE, quote(tags.value)) if tags.value else begin

    arguments = TagArguments(before_value, tags.value_end, guard=guard)
    end = sequence(LINE, quote(tags.end)) if outer else ""
    if outer and not each:
        return CallForm(head, quote(tags.call_end), arguments, sequence(quote(tags.begin), LINE), end, LINE)
    return CallForm(head, sequence(quote(tags.call_end), end), arguments, between=LINE)
