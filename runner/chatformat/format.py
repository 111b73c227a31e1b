"""What a chat format is, and the streaming scanner that its parsers are made of. Pure: no llama.cpp, no templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_edge.runner.chatformat.forms import NO_THINKING, CallForm, Thinking, no_forms
from moe_edge.runner.chatformat.parts import Part, Text

Message = dict[str, Any]


class Parser(Protocol):
    """Raw text of a reply in, as it comes; its parts out. Never half a tag; what does not parse comes back as text."""

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """The reply is over: what was held back."""
        ...


@dataclass(frozen=True)
class ChatFormat:
    """A family's way to write a reply.

    order: formats are asked in this order, lowest first. recognises: the model's template -> whether it is this format.
    parser: (the end of the prompt, the tools) -> a parser for one reply; a prompt may have opened the thinking already.
    tags: control tokens whose names the parser needs to see in the text.
    prepare: messages -> messages as this family's templates want them.
    settings: what every template is told (runner/thinking.py) -> the names and values that this family's understand.
    thinking: what stands around its thinking and its answer. calls: the model's template -> the forms in which a
    grammar may write a call; none of them: a call that is forced is plain JSON.
    """

    name: str
    order: int
    recognises: Callable[[str], bool]
    parser: Callable[[str, Sequence[Mapping[str, Any]]], Parser]
    tags: tuple[str, ...] = ()
    prepare: Callable[[list[Message]], list[Message]] = lambda messages: messages
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings
    thinking: Thinking = NO_THINKING
    calls: Callable[[str], tuple[CallForm, ...]] = no_forms


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of a text might be the beginning of one of the marks."""
    most = 0
    for mark in marks:
        for n in range(min(len(mark) - 1, len(text)), most, -1):
            if mark.startswith(text[-n:]):
                most = n
                break
    return most


class Scanner:
    """A buffer that is read up to marks, of which only a part may have come yet."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def until(self, marks: Sequence[str]) -> tuple[str, str | None]:
        """(text before the first mark, the mark), both taken out; (what surely is none, None) when none has come."""
        found = min(
            ((at, -len(mark), mark) for mark in marks if (at := self.text.find(mark)) >= 0), default=None
        )
        if found is not None:
            at, _, mark = found
            before, self.text = self.text[:at], self.text[at + len(mark) :]
            return before, mark
        keep = 0 if self.ended else held_back(self.text, marks)
        before, self.text = self.text[: len(self.text) - keep], self.text[len(self.text) - keep :]
        return before, None

    def starts_with(self, marks: Sequence[str]) -> str | bool | None:
        """The mark that the text begins with; False: with none of them; None: it is too short to tell."""
        for mark in sorted(marks, key=len, reverse=True):
            if self.text.startswith(mark):
                return mark
        if not self.ended and any(mark.startswith(self.text) for mark in marks):
            return None
        return False


class JsonEnd:
    """Finds where a JSON value that comes piece by piece ends. A number or a word ends before what cannot be of it."""

    def __init__(self) -> None:
        self.is_over = self.is_scalar = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str) -> int:
        """How many of these characters belong to the value."""
        for at, character in enumerate(text):
            if self.is_over:
                return at
            if self._in_string:
                self._inside_string(character)
            elif self.is_scalar and character in ",]} \t\r\n":
                self.is_over = True
                return at
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self.is_over = self._depth <= 0
            elif self._depth == 0 and not character.isspace():
                self.is_scalar = True
        return len(text)

    def _inside_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self.is_over = self._depth == 0


class StreamParser:
    """Base of the parsers: `_parts` is a generator that yields parts, and None when it needs more text."""

    def __init__(self) -> None:
        self.scan = Scanner()
        self._running = self._parts()

    def _parts(self) -> Iterator[Part | None]:
        raise NotImplementedError

    def feed(self, text: str) -> list[Part]:
        self.scan.text += text
        return self._advance()

    def finish(self) -> list[Part]:
        self.scan.ended = True
        return self._advance()

    def _advance(self) -> list[Part]:
        parts: list[Part] = []
        for part in self._running:
            if part is None:
                break
            parts.append(part)
        return parts

    def _rest(self) -> Iterator[Part | None]:
        """Everything that is still to come, as text."""
        while True:
            if self.scan.text:
                text, self.scan.text = self.scan.text, ""
                yield Text(text)
            if self.scan.ended:
                return
            yield None
