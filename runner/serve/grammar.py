"""Grammars that hold a reply to a form: a JSON schema, any JSON object, or one tool call. Pure text.

A model that thinks may do so first: the form begins where its answer does. llama-cpp-python turns schemas into GBNF.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.protocol import Request

ROOT = "moe-edge-reply"  # of what is made here; the form's own rule stays `root`
THINK = "moe-edge-think"
BLANKS = "[ \\n]? [ \\n]? [ \\n]? [ \\n]?"  # few: a model may find nothing likelier than one more
MOST_REPEATED = 1000  # of a schema's lengths: each is written out in the grammar
MOST_VALUES, DEEPEST, LONGEST_PATTERN = 5000, 64, 500
LONGEST_GRAMMAR, DEEPEST_GRAMMAR = 200_000, 200  # llama.cpp reads a grammar's brackets by recursion
REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def form_of(request: Request) -> str | None:
    """The GBNF of the form that a request asks for, from the rule `root`; None when it asks for none.

    Raises UsageError for a schema that cannot be turned into a grammar, and for two forms at a time.
    """
    forms = [
        name
        for name, there in (
            ("a JSON schema", request.schema is not None), ("json_object", request.json_object),
            ("grammar", request.grammar is not None), ("a forced tool call", forces_call(request)),
        )
        if there
    ]  # fmt: skip
    if len(forms) > 1:
        raise UsageError(f"{forms[0]} and {forms[1]} cannot both be kept to; give one of them")
    if request.grammar is not None:
        return checked_grammar(request.grammar)
    if request.schema is not None:
        return schema_grammar(request.schema)
    if request.json_object:
        return schema_grammar({"type": "object"})
    return schema_grammar(call_schema(request)) if forces_call(request) else None


def forces_call(request: Request) -> bool:
    return request.tool_choice.mode == "required" and bool(request.tools)


def call_schema(request: Request) -> dict[str, Any]:
    """One call of one of the tools: {"name": ..., "arguments": {...}}."""
    functions = [tool["function"] for tool in request.tools]
    wanted = [each for each in functions if request.tool_choice.name in (None, each["name"])]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": each["name"]}, "arguments": each.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in wanted
    ]
    return calls[0] if len(calls) == 1 else {"oneOf": calls}


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """GBNF of a JSON schema. Raises UsageError."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    check_schema(schema)
    try:
        text = json_schema_to_gbnf(json.dumps(_without_empty(schema)), prop_order=["name", "arguments"])
    except Exception as e:  # it meets whatever a client calls a schema, and raises whatever comes of it
        raise UsageError(f"this JSON schema cannot be turned into a grammar: {type(e).__name__}: {e}") from e
    if len(text) > LONGEST_GRAMMAR:
        raise UsageError(f"this JSON schema makes a grammar of {len(text)} characters; {LONGEST_GRAMMAR} are the most")
    return str(text)


def _without_empty(value: Any) -> Any:
    """`properties: {}` says nothing, and the converter makes an object of it that can hold nothing at all."""
    if isinstance(value, Mapping):
        drop = value.get("type") == "object" and value.get("properties") == {}
        return {k: _without_empty(v) for k, v in value.items() if not (drop and k == "properties")}
    return [_without_empty(each) for each in value] if isinstance(value, list) else value


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse schemas whose grammar would not fit into memory. Raises UsageError."""
    n = 0
    for depth, key, value in _values(schema):
        n += 1
        if n > MOST_VALUES or depth > DEEPEST:
            raise UsageError(f"this JSON schema is too large: {MOST_VALUES} values and {DEEPEST} levels are the most")
        if key in REPETITIONS and isinstance(value, int | float) and not 0 <= value <= MOST_REPEATED:
            raise UsageError(f"the JSON schema has {key} {value}; 0 to {MOST_REPEATED} can be kept to")
        if key == "pattern" and isinstance(value, str):
            _check_pattern(value)


def _check_pattern(pattern: str) -> None:
    counts = [int(count) for count in re.findall(r"\d+", "".join(re.findall(r"\{[\d,\s]*\}", pattern)))]
    if len(pattern) > LONGEST_PATTERN or any(count > MOST_REPEATED for count in counts):
        raise UsageError(f"a pattern of the JSON schema is too long, or repeats more than {MOST_REPEATED} times")


def _values(value: Any, depth: int = 0, key: str = "") -> Iterator[tuple[int, str, Any]]:
    yield depth, key, value
    if depth > DEEPEST:
        return
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _values(each, depth + 1, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _values(each, depth + 1)


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


# ---- thinking before the form


def after_thinking(form: str, tags: Sequence[str], opened: bool) -> str:
    """The form's grammar from the rule ROOT, behind the thinking of a model with these tags.

    opened: the prompt has begun the thinking already.
    """
    if "<|channel|>" in tags:  # harmony: an analysis, and then the final channel
        think = until("<|end|>")
        thought = f'( "<|channel|>analysis<|message|>" {THINK}-0 "<|start|>assistant" )?'
        start = f'{thought} "<|channel|>final<|message|>"'
    elif "</think>" in tags:
        think = until("</think>")
        begun = f"{THINK}-0 {BLANKS}"
        start = begun if opened else f'( {BLANKS} "<think>" {begun} )?'
    else:
        return f"{ROOT} ::= root\n{form}"
    return f"{ROOT} ::= {start} root\n{think}\n{form}"


def until(mark: str) -> str:
    """GBNF rules, from THINK-0, for any text up to the first `mark`, and the mark: a state for each character of it.

    mark: of characters that mean nothing to GBNF.
    """
    rules = []
    for state in range(len(mark)):
        # after each next character: how much of the mark the text ends with then
        leads = {character: _matched(mark, mark[:state] + character) for character in set(mark)}
        ways = [
            f'"{character}"' + ("" if to == len(mark) else f" {THINK}-{to}")
            for character, to in sorted(leads.items())
            if to > 0
        ]
        on = "".join(character for character, to in sorted(leads.items()) if to > 0)
        rules.append(f"{THINK}-{state} ::= {' | '.join(ways)} | [^{on}] {THINK}-0")
    return "\n".join(rules)


def _matched(mark: str, text: str) -> int:
    return next(n for n in range(len(mark), -1, -1) if text.endswith(mark[:n]))
