"""Marks before the names of control tokens in what people write, so that no text can forge a token.

A mark goes through the template with the name behind it; the rendered prompt is read as letters there.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.format import Message


def new_mark() -> str:
    """A mark that nobody can have written. Letters and digits alone, which come through every way that a template has
    to write a value: as text, as JSON with escapes, as Python writes a list."""
    return f"mark{secrets.token_hex(8)}"


def marked_message(message: Message, names: Sequence[str], mark: str) -> Message:
    """The message with a mark before each control token's name in what somebody wrote; its role stays."""
    return {key: value if key == "role" else marked(value, names, mark) for key, value in message.items()}


def marked(value: Any, names: Sequence[str], mark: str) -> Any:
    """Any value, as a message or a tool's definition has them, with marks in all its texts and keys."""
    if isinstance(value, str):
        return mark_names(value, names, mark)
    if isinstance(value, Mapping):
        return {
            marked(key, names, mark): _marked_arguments(each, names, mark) if key == "arguments"
            else marked(each, names, mark)
            for key, each in value.items()
        }  # fmt: skip
    if isinstance(value, list | tuple):
        return [marked(each, names, mark) for each in value]
    return value


def _marked_arguments(value: Any, names: Sequence[str], mark: str) -> Any:
    """Arguments of a call, which may be JSON that spells a name with escapes and shows it once a template reads it."""
    if not isinstance(value, str) or "\\" not in value:
        return marked(value, names, mark)
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return mark_names(value, names, mark)
    safe = marked(found, names, mark)
    return safe if safe != found else mark_names(value, names, mark)


def mark_names(text: str, names: Sequence[str], mark: str) -> str:
    """names: the longest first, so that one within another is not marked as well."""
    return _pattern(tuple(names)).sub(lambda found: mark + found[0], text) if names else text


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the names. Vocabularies have up to a thousand; trying each at each character would take seconds."""
    return re.compile("|".join(map(re.escape, names)))


def tokenize_marked(
    prompt: str, mark: str, names: Sequence[str], tokenize: Callable[[str, bool], list[int]]
) -> list[int]:
    """Tokens of a rendered prompt: a name behind a mark is letters, all else as the template meant it.

    A name is given to the tokenizer in two parts, since added tokens are found in letters too. A mark whose name the
    template cut off marks nothing.
    """
    head, *rest = prompt.split(mark)
    tokens = tokenize(head, True) if head else []
    for part in rest:
        name = next((name for name in names if part.startswith(name)), "")
        if name:
            tokens += tokenize(name[0], False) + tokenize(name[1:], False)
        if part[len(name) :]:
            tokens += tokenize(part[len(name) :], True)
    return tokens
