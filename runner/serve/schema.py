"""JSON schemas as grammars. llama-cpp-python turns them into GBNF; what it gets wrong is put right here. Pure text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.gbnf import quote

MOST_REPEATED = 1000  # of a schema's lengths: each is written out in the grammar
MOST_VALUES, DEEPEST, LONGEST_PATTERN = 5000, 64, 500
LONGEST_GRAMMAR = 200_000  # characters
REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# Theirs lets line ends into texts as they are, and exponents of 16 digits, which is infinity to every reader.
RIGHT = (
    ('char ::= [^"\\\\] |', 'char ::= [^"\\\\\\x00-\\x1F\\x7F] |'),
    ("([eE] [-+]? integral-part)? space", "([eE] [-+]? [0-9] [0-9]?)? space"),
)


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """GBNF of a JSON schema, from the rule `root` on, a rule a line. Raises UsageError."""
    check_schema(schema)
    try:
        text = _convert(_without_empty(schema))
    except Exception as e:  # it meets whatever a client calls a schema, and raises whatever comes of it
        raise UsageError(f"this JSON schema cannot be turned into a grammar: {type(e).__name__}: {e}") from e
    if len(text) > LONGEST_GRAMMAR:
        raise UsageError(f"this JSON schema makes a grammar of {len(text)} characters; {LONGEST_GRAMMAR} are the most")
    return text


def _convert(schema: Any) -> str:
    from llama_cpp.llama_grammar import SchemaConverter

    order = {"name": 0, "arguments": 1}
    converter = SchemaConverter(prop_order=order, allow_fetch=False, dotall=False, raw_pattern=False)
    converter._format_literal = quote  # theirs leaves backslashes as they are
    converter.visit(converter.resolve_refs(json.loads(json.dumps(schema)), "stdin"), "")
    text = str(converter.format_grammar())
    for theirs, ours in RIGHT:
        text = text.replace(theirs, ours)
    return text


def _without_empty(value: Any) -> Any:
    """`properties: {}` says nothing, and the converter makes an object of it that can hold nothing at all."""
    if isinstance(value, Mapping):
        drop = value.get("type") == "object" and value.get("properties") == {}
        return {k: _without_empty(v) for k, v in value.items() if not (drop and k == "properties")}
    return [_without_empty(each) for each in value] if isinstance(value, list) else value


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse schemas whose grammar would not fit into memory. Raises UsageError."""
    n = 0
    for depth, key, value in schema_values(schema):
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


def schema_values(value: Any, depth: int = 0, key: str = "") -> Iterator[tuple[int, str, Any]]:
    """(depth, key, value) of everything in a schema, itself first; nothing below DEEPEST."""
    yield depth, key, value
    if depth > DEEPEST:
        return
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from schema_values(each, depth + 1, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from schema_values(each, depth + 1)
