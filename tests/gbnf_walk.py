"""Texts that a GBNF grammar allows, drawn by walking it; and which of its rules wrote what."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

_TOKENS = re.compile(
    r'\s*("(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\{\d*,?\d*\}|[a-zA-Z0-9-]+|[()|?*+.])', re.DOTALL
)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}
POOL = "aAbZ019 _-.:,;<>/|\\\"'[]{}()=\n\t｜▁é漢=x"  # characters of tags, and of texts
MANY = 6  # of what may be repeated without end


@dataclass(frozen=True)
class Span:
    """What a rule wrote: text[start:end]."""

    rule: str
    start: int
    end: int


class Walk:
    """One grammar. Node: ("text", str) | ("set", negated, [(low, high)]) | ("rule", name) | ("or", [seq]) |
    ("times", node, least, most); a seq is a list of nodes."""

    def __init__(self, grammar: str) -> None:
        self.rules: dict[str, Any] = {}
        for line in grammar.splitlines():
            name, found, body = line.partition(" ::= ")
            assert found and name not in self.rules, line
            self._line, self._tokens, self._at = line, _TOKENS.findall(body), 0
            self.rules[name] = self._alternatives()
            assert self._at == len(self._tokens), line
        self._least: dict[str, float] = dict.fromkeys(self.rules, float("inf"))
        while True:
            now = {name: self._shortest(node) for name, node in self.rules.items()}
            if now == self._least:
                break
            self._least = now
        assert all(n < float("inf") for n in self._least.values()), "a rule that never ends"

    def _alternatives(self) -> Any:
        ways: list[list[Any]] = []
        way: list[Any] = []
        while self._at < len(self._tokens) and self._tokens[self._at] != ")":
            token = self._tokens[self._at]
            self._at += 1
            if token == "|":
                ways.append(way)
                way = []
            else:
                way.append(self._repeated(self._atom(token)))
        return ("or", [*ways, way])

    def _atom(self, token: str) -> Any:
        if token == "(":
            inner = self._alternatives()
            assert self._tokens[self._at] == ")", self._line
            self._at += 1
            return inner
        if token[0] == '"':
            return ("text", "".join(_characters(token[1:-1])))
        if token[0] == "[":
            negated = token[1] == "^"
            found, at, spans = list(_characters(token[1 + negated : -1])), 0, []
            raw = token[1 + negated : -1]
            while at < len(found):
                if at + 2 < len(found) and found[at + 1] == "-" and "-" in raw:
                    spans.append((found[at], found[at + 2]))
                    at += 3
                else:
                    spans.append((found[at], found[at]))
                    at += 1
            return ("set", negated, spans)
        if token == ".":
            return ("set", True, [])
        return ("rule", token)

    def _repeated(self, node: Any) -> Any:
        token = self._tokens[self._at] if self._at < len(self._tokens) else ""
        if token in ("?", "*", "+"):
            self._at += 1
            return ("times", node, int(token == "+"), 1 if token == "?" else None)
        if token.startswith("{"):
            self._at += 1
            low, comma, high = token[1:-1].partition(",")
            return ("times", node, int(low or 0), int(high) if high else None if comma else int(low))
        return node

    def _shortest(self, node: Any) -> float:
        kind = node[0]
        if kind == "text":
            return len(node[1])
        if kind == "set":
            return 1
        if kind == "rule":
            return self._least[node[1]]
        if kind == "times":
            return 0 if node[2] == 0 else node[2] * self._shortest(node[1])
        return min(sum(map(self._shortest, way)) for way in node[1])

    def text(self, root: str, rng: random.Random, length: int) -> tuple[str, list[Span]]:
        """A text of about so many characters, and what its rules wrote, in the order of their beginnings."""
        out: list[str] = []
        spans: list[Span] = []

        def write(node: Any) -> None:
            kind = node[0]
            if kind == "text":
                out.extend(node[1])
            elif kind == "set":
                allowed = [c for c in POOL if any(a <= c <= b for a, b in node[2]) != node[1]]
                out.append(rng.choice(allowed or [node[2][0][0]]))
            elif kind == "rule":
                start, at = len(out), len(spans)
                spans.append(Span(node[1], start, start))
                write(self.rules[node[1]])
                spans[at] = Span(node[1], start, len(out))
            elif kind == "times":
                most = node[2] + MANY if node[3] is None else node[3]
                n = rng.randint(node[2], min(most, node[2] + MANY)) if len(out) < length else node[2]
                for _ in range(n):
                    write(node[1])
            else:
                ways = node[1]
                if len(out) >= length:
                    least = min(sum(map(self._shortest, way)) for way in ways)
                    ways = [way for way in ways if sum(map(self._shortest, way)) == least]
                for each in rng.choice(ways):
                    write(each)

        write(("rule", root))
        return "".join(out), spans


def _characters(body: str) -> Any:
    for found in re.finditer(r"\\x([0-9A-Fa-f]{2})|\\(.)|([^\\])", body, re.DOTALL):
        number, named, plain = found.groups()
        yield chr(int(number, 16)) if number else _NAMED.get(named, named) if named else plain
