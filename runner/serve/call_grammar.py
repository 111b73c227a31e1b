"""GBNF of tool calls in the words of a model's family, so that a forced call is one as the model was taught. Pure text.

A tool that a family's words cannot carry safely makes the call plain JSON: see docs/CHAT_FORMATS.md. The names of the
rules say what they mean, F being the form and N the tool: `call-F-N`, `arguments-F-N-root` for JSON, `text-F-N-M` for
the Mth argument as a text, and `json-F-N-M-root` for one as JSON.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.forms import CallForm, JsonArguments, TagArguments
from moe_edge.runner.chatformat.gbnf import LINE, any_but, guarded_string, quote, renamed, sequence, until
from moe_edge.runner.chatformat.shapes import kind_of
from moe_edge.runner.serve.schema import LONGEST_GRAMMAR, schema_grammar, schema_values

MOST_CALLS = 16  # in one reply
_NAME = re.compile(r"(?!functions\.)[\w.:-]{1,200}")  # no space, no quote, and nothing of a tag
_KEY = re.compile(r"[\w.$:-]{1,200}")
_PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPE = '(["\\\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F])'
_PYTHON_ESCAPE = '["\\\\bfnrt]'  # of JSON's, those that Python reads alike
_KEPT_FORMATS = re.compile(r"date|time|date-time|uuid[1-5]?")  # by schema_grammar
_LISTED = ("type", "properties", "required", "additionalProperties", "title", "description", "$schema", "$defs",
          "definitions", "strict")  # fmt: skip


_ANY_TEXT = '"\\"" char* "\\"" space'  # as schema_grammar writes it
EMPTY = '""'


class _CannotCarry(Exception):
    """The family's words have no place for this tool."""


def calls_grammar(forms: Sequence[CallForm], tools: Sequence[Mapping[str, Any]], several: bool) -> str | None:
    """The GBNF, from the rule `root` on, of a call of one of the tools, or of several; None where no form can carry it.

    tools: their functions as OpenAI has them. Raises UsageError for a schema that is none.
    """
    try:
        written = [_Written(form, number, tools) for number, form in enumerate(forms)]
    except _CannotCarry:
        return None
    if not written:
        return None
    root = " | ".join(each.calls(several) for each in written)
    text = "\n".join([f"root ::= {root}", *(rule for each in written for rule in each.rules)])
    return text if len(text) <= LONGEST_GRAMMAR else None


def plain_call_grammar(tools: Sequence[Mapping[str, Any]]) -> str:
    """The GBNF, from the rule `root` on, of one call as `{"name": ..., "arguments": {...}}`; any tool can be said so.

    Raises UsageError for a schema that is none, and when there are too many.
    """
    written = _Written(PLAIN, 0, tools)
    text = "\n".join([f"root ::= {written.calls(False)}", *written.rules])
    if len(text) > LONGEST_GRAMMAR:
        raise UsageError(f"the tools make a grammar of {len(text)} characters; {LONGEST_GRAMMAR} are the most")
    return text


PLAIN = CallForm(
    lambda name: quote(f'{{"name": {json.dumps(name)}, "arguments": '), quote("}"), JsonArguments(), between=None
)


class _Written:
    """The rules of one form. Raises _CannotCarry."""

    def __init__(self, form: CallForm, number: int, tools: Sequence[Mapping[str, Any]]) -> None:
        self._form, self._number, self.rules = form, number, list[str]()
        a = form.arguments
        self._end = a.end if isinstance(a, TagArguments) else ""
        self._guard = (*a.guard, self._end) if self._end else a.guard
        self._python = isinstance(a, TagArguments) and a.python
        self._names = [self._call(f"{number}-{n}", tool) for n, tool in enumerate(tools)]

    def calls(self, several: bool) -> str:
        """GBNF of one call, or of up to MOST_CALLS."""
        form, one = self._form, f"any-{self._number}"
        self.rules.append(f"{one} ::= {' | '.join(self._names)}")
        more = ""
        if several and form.between is not None:
            self.rules.append(f"more-{self._number} ::= {sequence(form.between, one)}")
            more = f"more-{self._number}{{0,{MOST_CALLS - 1}}}"
        return sequence(form.begin, one, more, form.end)

    def _call(self, number: str, tool: Mapping[str, Any]) -> str:
        name, parameters, form = str(tool["name"]), tool.get("parameters"), self._form
        if form is not PLAIN and not _NAME.fullmatch(name):
            raise _CannotCarry
        if self._python and not _is_python(*re.split("[.-]", name)):
            raise _CannotCarry
        if isinstance(form.arguments, JsonArguments):
            inner = self._json(f"arguments-{number}", parameters or {"type": "object"})
        else:
            inner = self._tags(form.arguments, number, {"properties": {}} if parameters is None else parameters)
        self.rules.append(f"call-{number} ::= {sequence(form.head(name), inner, form.tail)}")
        return f"call-{number}"

    # ---- JSON

    def _json(self, name: str, schema: Mapping[str, Any]) -> str:
        """A rule for JSON of this schema, whose texts hold no mark that a parser would take for its own."""
        if self._guard or self._python:
            check_guard(schema, self._guard)
        lines = schema_grammar(schema).splitlines()
        if self._guard or self._python:
            lines = self._guarded(lines)
        self.rules += renamed(lines, f"{name}-")
        return f"{name}-root"

    def _guarded(self, lines: Sequence[str]) -> list[str]:
        escapes = _PYTHON_ESCAPE if self._python else _ESCAPE
        plain = any_but({'"', "\\", *(mark[0] for mark in self._guard)})[:-1] + "\\x00-\\x1F\\x7F]"
        found = []
        for line in lines:
            if line.startswith("char ::= "):  # of texts whose length is limited
                line = f"char ::= {plain} | {quote(chr(92))} {escapes}"
            found.append(line.replace(_ANY_TEXT, f"{quote(chr(34))} inside-0 space"))
        return [*found, *guarded_string("inside", self._guard, escapes)] if found != list(lines) else found

    # ---- between tags

    def _tags(self, a: TagArguments, number: str, parameters: Any) -> str:
        """A rule for the arguments in the order of the schema, those that are not required or not."""
        check_plain_object(parameters)
        required, keys = set(parameters.get("required") or ()), list(parameters["properties"])
        if not required <= set(keys):
            raise _CannotCarry
        values = [self._argument(a, f"{number}-{m}", parameters, key) for m, key in enumerate(keys)]
        for m in reversed(range(len(keys))):
            name, behind = f"{number}-{m}", f"next-{number}-{m + 1}" if m + 1 < len(keys) else ""
            later, first = sequence(a.separator, values[m], behind), sequence(values[m], behind)
            if keys[m] not in required:
                skip = f"first-{number}-{m + 1}" if m + 1 < len(keys) else EMPTY
                later, first = f"{sequence(a.separator, values[m], behind)} | {behind or EMPTY}", f"{first} | {skip}"
            self.rules += [f"next-{name} ::= {later}", f"first-{name} ::= {first}"]
        return f"first-{number}-0" if keys else ""

    def _argument(self, a: TagArguments, number: str, parameters: Mapping[str, Any], key: str) -> str:
        kind = kind_of(parameters, key)
        if not _KEY.fullmatch(key) or (self._python and not _is_python(key)) or (kind is None and not a.python):
            raise _CannotCarry
        if a.flat and (kind in ("object", "array") or ":" in key):
            raise _CannotCarry
        spec = parameters["properties"][key]
        if kind == "text" and not a.python:
            value = self._text(a, number, spec)
        else:
            shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
            line = LINE if a.strips else ""
            whole = {**shared, **spec} if isinstance(spec, Mapping) else {}
            end = "" if a.flat else quote(a.end)
            value = sequence(line, self._json(f"json-{number}", whole), line, end)
        self.rules.append(f"value-{number} ::= {sequence(a.head(key, kind or 'object'), value, a.tail)}")
        return f"value-{number}"

    def _text(self, a: TagArguments, number: str, spec: Mapping[str, Any]) -> str:
        """A rule for a text and the tag behind it."""
        check_text(spec)
        name, line = f"text-{number}", LINE if a.strips else ""
        choice = spec.get("enum") or ([spec["const"]] if "const" in spec else None)
        if choice is not None:
            texts = [each for each in choice if isinstance(each, str)]
            if not texts or any(mark in each for each in texts for mark in self._guard):
                raise _CannotCarry
            if a.strips and any(each != each.strip("\n") for each in texts):
                raise _CannotCarry
            either = f"( {' | '.join(map(quote, texts))} )"
            self.rules.append(f"{name} ::= {sequence(line, either, line, quote(a.end))}")
            return name
        least, most = spec.get("minLength", 0), spec.get("maxLength")
        if most is None:
            self._shared_text(a)
            rest = f"tag-{self._number}-0"
            self.rules.append(f"{name} ::= {sequence(line, self._first(a, least), rest) if least else rest}")
        else:
            self.rules.append(f"{name} ::= {sequence(line, _bounded(a.end[0], least, most), line, quote(a.end))}")
        return name

    def _first(self, a: TagArguments, least: int) -> str:
        """GBNF of the first characters of a text: none of the tag behind it, and no line end, which is the format's."""
        plain = any_but("\n" + a.end[0])
        bracket = sequence(quote(a.end[0]), any_but({"\n", *(mark[n] for mark in self._guard for n in (0, 1))}))
        return sequence(f"{plain}{{{least - 1}}}" if least > 1 else "", f"( {plain} | {bracket} )")

    def _shared_text(self, a: TagArguments) -> None:
        """The rules for any text up to the tag that ends it, once."""
        if not any(rule.startswith(f"tag-{self._number}-0 ") for rule in self.rules):
            self.rules += until(f"tag-{self._number}", a.end, a.guard)


def _bounded(mark: str, least: int, most: int) -> str:
    """GBNF of a text of so many characters, none of them `mark`, no line end at its sides: those are the format's."""
    side, inside = any_but("\n" + mark), any_but(mark)
    if most < max(least, 1):
        if most < least:
            raise _CannotCarry
        return ""
    one = side if most == 1 else f"{side} ( {inside}{{0,{most - 2}}} {side} )?"
    if least <= 1:
        return one if least else f"( {one} )?"
    return f"{side} {inside}{{{least - 2},{most - 2}}} {side}"


def check_guard(schema: Any, guard: Sequence[str]) -> None:
    """Raises _CannotCarry for a schema that could put one of the marks into a text."""
    for _, key, value in schema_values(schema):
        if any(mark in text for mark in guard for text in (key, value) if isinstance(text, str)):
            raise _CannotCarry
        if key == "pattern" and isinstance(value, str):
            spans = re.findall(r"(.)-(.)", value)
            if re.search(r"[.<\\]|\[\^", value) or any(low <= mark[0] <= high for low, high in spans for mark in guard):
                raise _CannotCarry


def check_plain_object(parameters: Any) -> None:
    """Raises _CannotCarry for parameters that are not a list of named ones."""
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties"), Mapping):
        raise _CannotCarry
    if set(parameters) - set(_LISTED) or parameters.get("type", "object") != "object":
        raise _CannotCarry
    if not parameters["properties"] and parameters.get("additionalProperties"):
        raise _CannotCarry  # any names at all


def check_text(spec: Mapping[str, Any]) -> None:
    """Raises _CannotCarry for what the schema wants of a text and a grammar of texts between tags does not keep to."""
    for depth, key, value in schema_values(spec):
        if key == "pattern" or (key == "format" and isinstance(value, str) and _KEPT_FORMATS.fullmatch(value)):
            raise _CannotCarry
        if depth > 1 and key in ("const", "enum", "minLength", "maxLength"):
            raise _CannotCarry


def _is_python(*names: str) -> bool:
    return all(_PYTHON_NAME.fullmatch(name) and not keyword.iskeyword(name) for name in names)
