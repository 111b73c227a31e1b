"""Pieces of GBNF, llama.cpp's notation for grammars, as chat formats put them together. Pure text.

A rule's name has letters, digits and hyphens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

BLANK = "[ \\n]?"
BLANKS = f"{BLANK} {BLANK} {BLANK} {BLANK}"  # few: a model may find nothing likelier than one more
LINE = '"\\n"?'  # between tags that some templates of a family put on lines of their own, and others do not
NUMBER = "[0-9] [0-9]?"  # of a call within a reply
ID = "[a-zA-Z0-9] [a-zA-Z0-9] [a-zA-Z0-9] " * 3  # nine letters and digits, what the strictest template wants
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "[": "\\[", "]": "\\]"}
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|[a-zA-Z0-9-]+', re.DOTALL)


def quote(text: str) -> str:
    """A literal: exactly this text."""
    return '"' + "".join(each if each in "[]" else _ESCAPES.get(each, each) for each in text) + '"'


def sequence(*pieces: str) -> str:
    return " ".join(piece.strip() for piece in pieces if piece.strip())


def optional(*pieces: str) -> str:
    inner = sequence(*pieces)
    return f"( {inner} )?" if inner else ""


def any_but(characters: Iterable[str]) -> str:
    """Any one character but these. `-` and `^` are written by number, since they mean something between brackets."""
    def written(each: str) -> str:
        return f"\\x{ord(each):02X}" if each in "-^" else _ESCAPES.get(each, each)

    found = "".join(written(each) for each in sorted(set(characters)))
    return f"[^{found}]" if found else "."


def until(name: str, mark: str, forbidden: Sequence[str] = ()) -> list[str]:
    """Rules, from `name`-0 on, for any text up to the first `mark`, and the mark; a text with a `forbidden` is none.

    There is a rule for each thing that the text so far may end with, as Aho and Corasick (1975) have it. The rule
    `name`-1 is the one behind the first character of the mark. Where a mark begins with a forbidden text, that text has
    to go on as the mark does.
    """
    begins = _beginnings((mark, *forbidden))
    rules = []
    for state, number in begins.items():
        if any(each in state for each in forbidden):
            text = mark[: len(state) + 1]
            rules.append(f"{name}-{number} ::= {quote(text[-1])}" + (f" {name}-{begins[text]}" if text != mark else ""))
            continue
        ways, known = [], ""
        for character in sorted({*mark, *"".join(forbidden)}):
            text = state + character
            ended = text.endswith(mark)
            to = _longest(text, begins)
            if not ended and (mark.startswith(text) or not text.endswith(tuple(forbidden))):
                if to == "":
                    continue  # like any other character
                ways.append(f"{quote(character)} {name}-{begins[to]}")
            elif ended:
                ways.append(quote(character))
            known += character
        rules.append(f"{name}-{number} ::= {' | '.join([*ways, f'{any_but(known)} {name}-0'])}")
    return rules


def guarded_string(name: str, forbidden: Sequence[str], escapes: str) -> list[str]:
    """Rules, from `name`-0 on, for the inside of a JSON string and the quote that ends it, in which no `forbidden`
    stands; its characters can still be written as escapes.

    forbidden: none begins with a letter or a digit, as an escape ends. escapes: a rule for what may follow `\\`.
    """
    begins = _beginnings(forbidden)
    rules = []
    for state, number in begins.items():
        ways, known = [quote('"'), f"{quote(chr(92))} {escapes} {name}-0"], '"\\'
        for character in sorted(set("".join(forbidden)) - set(known)):
            text = state + character
            to = _longest(text, begins)
            if not text.endswith(tuple(forbidden)):
                if to == "":
                    continue
                ways.append(f"{quote(character)} {name}-{begins[to]}")
            known += character
        plain = any_but(known)[:-1] + "\\x00-\\x1F\\x7F]"
        rules.append(f"{name}-{number} ::= {' | '.join([*ways, f'{plain} {name}-0'])}")
    return rules


def _beginnings(marks: Sequence[str]) -> dict[str, int]:
    """What a text may end with that is the beginning of a mark, the empty one first -> its number."""
    found = {mark[:n]: None for n in range(max(map(len, marks), default=1)) for mark in marks if n < len(mark)}
    return {begin: number for number, begin in enumerate(found or {"": None})}


def _longest(text: str, begins: Mapping[str, int]) -> str:
    return next(text[at:] for at in range(len(text) + 1) if text[at:] in begins)


def renamed(rules: Iterable[str], prefix: str) -> list[str]:
    """The rules under names of their own: the prefix stands in front of each, wherever they name each other."""
    lines = [line for line in rules if line]
    names = {line.partition(" ::= ")[0] for line in lines}

    def new(found: re.Match[str]) -> str:
        return prefix + found[0] if found[0] in names else found[0]

    return [_TOKEN.sub(new, line) for line in lines]
