"""Grammars that hold a reply to a form: a JSON schema, any JSON object, or tool calls. Pure text.

A model that thinks may do so first: the form begins where its answer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.format import ChatFormat
from moe_edge.runner.chatformat.forms import THOUGHT
from moe_edge.runner.chatformat.gbnf import sequence, until
from moe_edge.runner.protocol import Request
from moe_edge.runner.serve.call_grammar import calls_grammar, plain_call_grammar
from moe_edge.runner.serve.schema import LONGEST_GRAMMAR, schema_grammar

ROOT = "moe-edge-reply"  # of what is made here; the form's own rule stays `root`
DEEPEST_GRAMMAR = 200  # llama.cpp reads a grammar's brackets by recursion


@dataclass(frozen=True)
class Form:
    """What holds a reply. grammar: GBNF, from the rule `root` on. root: that rule's name. is_call: it forces calls; in
    the family's own words, or in plain JSON."""

    grammar: str
    root: str = "root"
    is_call: bool = False
    in_own_words: bool = False


def reply_form(request: Request, chat: ChatFormat | None, template: str, prompt: str) -> Form | None:
    """The form that a request asks for, behind the thinking of a model with this chat format; None when it asks for
    none. chat None: a text is gone on with. template: the model's own. prompt: the rendered one.

    Raises UsageError for a schema that cannot be turned into a grammar, and for two forms at a time.
    """
    own = own_words(request, chat, template)
    text = own if own is not None else form_of(request)
    if text is None:
        return None
    is_call = forces_call(request)
    if chat is None:
        return Form(text, is_call=is_call)
    return Form(behind_thinking(text, chat, template, prompt, own is not None), ROOT, is_call, own is not None)


def own_words(request: Request, chat: ChatFormat | None, template: str) -> str | None:
    """The GBNF of forced calls as the model's family writes them; None where it does not, or cannot."""
    if chat is None or not forces_call(request) or len(_forms_asked_for(request)) > 1:
        return None
    several = not request.one_tool and request.tool_choice.name is None
    return calls_grammar(chat.calls(template), wanted_tools(request), several)


def form_of(request: Request) -> str | None:
    """The GBNF of the form that a request asks for, from the rule `root`; None when it asks for none. A call is plain
    JSON. As reply_form()."""
    forms = _forms_asked_for(request)
    if len(forms) > 1:
        raise UsageError(f"{forms[0]} and {forms[1]} cannot both be kept to; give one of them")
    if request.grammar is not None:
        return checked_grammar(request.grammar)
    if request.schema is not None:
        return schema_grammar(request.schema)
    if request.json_object:
        return schema_grammar({"type": "object"})
    return plain_call_grammar(wanted_tools(request)) if forces_call(request) else None


def _forms_asked_for(request: Request) -> list[str]:
    return [
        name
        for name, there in (
            ("a JSON schema", request.schema is not None), ("json_object", request.json_object),
            ("grammar", request.grammar is not None), ("a forced tool call", forces_call(request)),
        )
        if there
    ]  # fmt: skip


def forces_call(request: Request) -> bool:
    return request.tool_choice.mode == "required" and bool(request.tools)


def wanted_tools(request: Request) -> list[Mapping[str, Any]]:
    """The functions of the tools that may be called."""
    functions = [tool["function"] for tool in request.tools]
    return [each for each in functions if request.tool_choice.name in (None, each["name"])]


def checked_grammar(text: str) -> str:
    """A client's own GBNF. Raises UsageError when its size or its brackets could bring llama.cpp down."""
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if len(text) > LONGEST_GRAMMAR or deepest > DEEPEST_GRAMMAR:
        raise UsageError(
            f"the grammar has {len(text)} characters and {deepest} open brackets; {LONGEST_GRAMMAR} and "
            f"{DEEPEST_GRAMMAR} are the most"
        )
    if "\0" in text:
        raise UsageError("the grammar has a zero byte in it")
    return text


def behind_thinking(form: str, chat: ChatFormat, template: str, prompt: str, is_call: bool) -> str:
    """The form's grammar from the rule ROOT on, behind the thinking of a model with this format. is_call: in the
    family's own words, so that no tag of an answer stands before it."""
    lead = chat.thinking.lead(prompt, template, is_call)
    thought = until(THOUGHT, lead.close) if lead.close else []
    return "\n".join([f"{ROOT} ::= {sequence(lead.before, 'root', lead.behind)}", *thought, form])
