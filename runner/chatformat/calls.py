"""What the parsers of tool calls share: thinking first, text up to a mark, a call behind it, text again.

A format gives the marks that begin calls and a generator that reads one. Whatever turns out to be no call comes back as
text, as it was written, if no part of it has been told as a call.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import string
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.format import JsonEnd
from moe_edge.runner.chatformat.parts import Part, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.chatformat.think import THINK, ThinkParser, ThinkTags

Tools = Sequence[Mapping[str, Any]]
Waiting = Iterator[Part | None]
_NAME = re.compile(r"[^\s<>{}\[\]\"'\ud800-\udfff]{1,200}")  # surrogates are no characters: they cannot be sent
_LETTERS = string.ascii_lowercase + string.digits


class NotACall(Exception):
    """What stands behind a mark is none after all."""


def new_call_id() -> str:
    """Nine letters and digits, which is what the strictest template (Mistral's) wants of an id."""
    return "call" + "".join(secrets.choice(_LETTERS) for _ in range(5))


class CallParser(ThinkParser):
    """Base. marks: what begins a call. read_calls(mark): parts of the calls behind one, up to and with their end.

    silent: tags that stand in the answer and are no part of it.
    """

    marks: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    def __init__(self, opened: bool, tools: Tools, tags: ThinkTags = THINK) -> None:
        self.tools = {str(t.get("function", t).get("name")): t.get("function", t) for t in tools}
        self._raw = ""  # taken since the mark
        self._n_told = 0  # characters of it that have been told as a call
        self._strays: list[str] = []  # words between the tags of a call that belong to none
        self._n_calls = 0
        self._open = False  # a call has been begun and not ended
        super().__init__(opened, tags)

    def read_calls(self, mark: str) -> Waiting:
        raise NotImplementedError

    def _parts(self) -> Waiting:
        yield from self.thinking()
        yield from self.answer()

    def answer(self) -> Waiting:
        """What follows the thinking: text and calls."""
        marks = (*self.marks, *self.silent) if self.tools else self.silent
        if not marks:  # nobody can call anything: tags are words
            yield from self._rest()
            return
        held = ""  # white space that belongs to a call, if one follows
        while True:
            text, mark = self.scan.until(marks)
            text = held + text
            held = text[len(text.rstrip()) :]
            if self._n_calls and not text.strip() and mark is None and not self.scan.ended:
                held = text  # between two calls, perhaps
            elif text.rstrip():
                yield Text(text[: len(text) - len(held)])
            if mark is not None and mark not in self.silent:
                yield from self._attempt(mark, held)
                held = ""
            elif mark is not None:
                continue
            elif self.scan.ended:
                if held and not self._n_calls:
                    yield Text(held)
                return
            else:
                yield None

    def _attempt(self, mark: str, space: str) -> Waiting:
        self._raw, self._n_told = mark, 0
        told = self._n_calls
        try:
            yield from self.read_calls(mark)
        except NotACall:
            if self._n_calls == told:
                yield Text(space + self._raw)
                return
            self._strays.append(without_a_begun_word(self._raw[self._n_told :]))
        if self._open:  # cut off within its arguments
            yield self.end()
        strays, self._strays = "".join(self._strays), []
        if strays:
            yield Text(strays)

    # ---- for read_calls

    def start(self, name: str) -> ToolStart:
        self._open, self._n_told = True, len(self._raw)
        self._n_calls += 1
        return ToolStart(self._n_calls - 1, new_call_id(), name)

    def name(self, text: str) -> str:
        """A tool's name without the space around it. Raises NotACall for what can be none.

        A name that was offered is one, whatever it is made of.
        """
        name = text.strip()
        if name not in self.tools and not _NAME.fullmatch(name):
            raise NotACall
        return name

    def arguments(self, text: str) -> ToolArguments:
        self._n_told = len(self._raw)
        return ToolArguments(self._n_calls - 1, text)

    def end(self) -> ToolEnd:
        self._open, self._n_told = False, len(self._raw)
        return ToolEnd(self._n_calls - 1)

    def stray(self, text: str) -> None:
        """Words where there should be none: they are shown behind the call."""
        if text.strip():
            self._strays.append(text)

    def whole(self, name: str, arguments: Mapping[str, Any]) -> Iterator[Part]:
        """A call that is known in one piece. Raises NotACall for arguments that JSON cannot say."""
        text = as_json(arguments)
        yield self.start(name)
        yield self.arguments(text)
        yield self.end()

    def took(self, text: str) -> None:
        """To be told of text that was read from `scan` itself."""
        self._raw += text

    def take(self, n: int) -> str:
        text, self.scan.text = self.scan.text[:n], self.scan.text[n:]
        self._raw += text
        return text

    def until(self, *marks: str) -> Generator[Part | None, None, tuple[str, str]]:
        """(text before the first of the marks, the mark), waiting for one. Raises NotACall when the reply ends."""
        before = ""
        while True:
            text, mark = self.scan.until(marks)
            self._raw += text + (mark or "")
            before += text
            if mark is not None:
                return before, mark
            if self.scan.ended:
                raise NotACall
            yield None

    def optional(self, *marks: str) -> Generator[Part | None, None, str | None]:
        """The one of the marks that comes next, behind white space, taken; None when something else does.

        White space in front of something else is taken too.
        """
        while True:
            self.take(len(self.scan.text) - len(self.scan.text.lstrip()))
            found = self.scan.starts_with(marks) if self.scan.text else None
            if isinstance(found, str):
                self.take(len(found))
                return found
            if found is False or self.scan.ended:
                return None
            yield None

    def expect(self, *marks: str) -> Generator[Part | None, None, str]:
        """As optional(); raises NotACall when something else comes."""
        found = yield from self.optional(*marks)
        if found is None:
            raise NotACall
        return found

    def character(self) -> Generator[Part | None, None, str]:
        """The next character that is not white space, not taken; empty when the reply ends."""
        yield from self.optional("\0")
        return self.scan.text[:1]

    def json_object(self) -> Generator[Part | None, None, None]:
        """Arguments that are a JSON object, told as they come. Raises NotACall when the reply ends within it."""
        yield from self._json_value(True)

    def json_text(self) -> Generator[Part | None, None, str]:
        """One JSON value of any kind, when it is whole. Raises NotACall when the reply ends before."""
        return (yield from self._json_value(False))

    def _json_value(self, tell: bool) -> Generator[Part | None, None, str]:
        yield from self.character()
        end, found = JsonEnd(), ""
        while True:
            n = end.feed(self.scan.text)
            piece = self.take(n)
            found += piece
            if piece and tell:
                yield self.arguments(piece)
            if end.is_over or (self.scan.ended and end.is_scalar and found):
                return found
            if self.scan.ended:
                raise NotACall
            yield None

    def value(self, tool: str, key: str, text: str) -> Any:
        """A value that a tag holds as text, in the type that the tool's schema gives it; a string where it is one."""
        return typed_value(self.tools.get(tool, {}).get("parameters"), key, text)

    def is_string(self, tool: str, key: str) -> bool:
        """Whether the tool's schema says that this can be nothing but a string."""
        return property_types(self.tools.get(tool, {}).get("parameters"), key) == {"string"}


def without_a_begun_word(rest: str) -> str:
    """What is left of a call that was cut off: one word is the beginning of a tag or a key, and tells nobody
    anything."""
    words = re.sub(r"<[^<>]*>?", " ", rest).split()
    return rest if len(words) > 1 else ""


def typed_value(schema: Any, key: str, text: str) -> Any:
    """text as the type of schema's property `key`: JSON, or what Python writes for it; itself where neither fits."""
    types = property_types(schema, key)
    if types and types <= {"string"}:
        return text
    found = _read_value(text)
    if found is _NOTHING:
        return text
    if "string" in types and not (isinstance(found, dict | list) and types & {"object", "array"}):
        return text
    return text if not types and isinstance(found, str) else found


_NOTHING = object()


def _read_value(text: str) -> Any:
    for read in (json.loads, python_value):
        try:
            found = read(text)
            as_json(found)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, NotACall):
            continue
        return found
    return _NOTHING


def python_value(text: str) -> Any:
    """What a literal of Python means. Raises ValueError, SyntaxError, MemoryError or RecursionError."""
    return ast.literal_eval(python_expression(text))


def python_expression(text: str) -> ast.expr:
    """The syntax of one expression; as python_value(). Python's advice on a model's spelling goes to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text.strip(), mode="eval").body


def as_json(value: Any) -> str:
    """A value as JSON that every client reads. Raises NotACall for NaN, for infinity and for what is no JSON.

    Letters stay as they are, but for half a pair of UTF-16, which no encoding can send: that one is escaped.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if _is_sendable(text) else json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise NotACall from error


def _is_sendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def property_types(schema: Any, key: str) -> set[str]:
    """The JSON types that a property may have; empty when the schema does not say."""
    try:
        spec = schema["properties"][key]
    except (KeyError, TypeError):
        return set()
    found: set[str] = set()
    for each in [spec, *(alt for name in ("anyOf", "oneOf") for alt in _list(spec, name))]:
        kind = each.get("type") if isinstance(each, Mapping) else None
        found |= {kind} if isinstance(kind, str) else {str(k) for k in kind} if isinstance(kind, list) else set()
    if not found and isinstance(spec, Mapping):
        values = _list(spec, "enum") or ([spec["const"]] if "const" in spec else [])
        found = {_JSON_TYPES[type(value)] for value in values}
    return found


_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object",
               list: "array"}  # fmt: skip


def _list(spec: Any, name: str) -> list[Any]:
    found = spec.get(name) if isinstance(spec, Mapping) else None
    return found if isinstance(found, list) else []


def without_line_ends(text: str) -> str:
    """What stands between tags on lines of their own: one line end at each side is the format's."""
    return text.removeprefix("\n").removesuffix("\n")
