"""In which form a family writes: what stands around its thinking and its answer, and how it writes a call.

The parsers read a reply; these forms are for a grammar that forces one, see runner/serve/call_grammar.py. They are
made of pieces of GBNF, see gbnf.py. tests/test_forced_calls.py walks the grammar of each format and reads what it wrote
back with the parser of the same format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_edge.runner.chatformat.gbnf import BLANKS, LINE, optional, quote, sequence

THOUGHT = "moe-edge-think"  # from the rule THOUGHT-0 on: the thinking, up to and with what closes it


@dataclass(frozen=True)
class Lead:
    """What stands around a form. before: GBNF, which may use the rule THOUGHT-0. close: what that one ends with; empty
    where it is not used. behind: GBNF behind the form."""

    before: str = ""
    close: str = ""
    behind: str = ""


@dataclass(frozen=True)
class Thinking:
    """open, close: what stands around the thinking, exactly. after: GBNF between it and what follows. skipped: GBNF at
    the head of a reply that does not think. answer, answer_end: GBNF around an answer; calls have none.

    always: a model may think even where its template does not spell the tags. bare: an answer may begin without a tag.
    """

    open: str
    close: str
    after: str = BLANKS
    skipped: str = ""
    answer: str = ""
    answer_end: str = ""
    always: bool = False
    bare: bool = True

    def is_open(self, prompt: str) -> bool:
        """Whether the prompt leaves the thinking open."""
        return bool(self.open) and prompt.rstrip().endswith(self.open.rstrip())

    def can_go_on(self, prompt: str) -> bool:
        """Whether words of the answer may follow this prompt at once."""
        return self.bare and not self.is_open(prompt)

    def lead(self, prompt: str, template: str, is_call: bool) -> Lead:
        """What a reply to this prompt has around a form: around calls, or around an answer in a form."""
        answer, behind = ("", "") if is_call else (self.answer, self.answer_end)
        if self.is_open(prompt):
            return Lead(sequence(f"{THOUGHT}-0", self.after, answer), self.close, behind)
        if not (self.open and (self.always or self.close in template)):
            return Lead(answer, "", behind)
        thought = sequence("" if self.always else BLANKS, quote(self.open), f"{THOUGHT}-0", self.after)
        either = f"( {thought} | {self.skipped} )?" if self.skipped else optional(thought)
        return Lead(sequence(either, answer), self.close, behind)


NO_THINKING = Thinking("", "")


@dataclass(frozen=True)
class JsonArguments:
    """Arguments that are one JSON object. guard: marks that may not stand in its texts, since a parser would see them
    there; none begins with a letter."""

    guard: tuple[str, ...] = ()


@dataclass(frozen=True)
class TagArguments:
    """Arguments one by one. head: (key, kind) -> GBNF before a value; kind is `text`, or JSON's name of a type. end:
    what ends a value, as it is written; empty where a value ends by itself. tail: GBNF behind that. separator: GBNF
    between two arguments.

    strips: one line end at each side of a value is the format's. guard: as in JsonArguments, and in texts. python: a
    text is a string as Python reads it; else it is written as it is, up to `end`. flat: `end` is of texts alone, and
    there are no lists and objects.
    """

    head: Callable[[str, str], str]
    end: str
    tail: str = LINE
    separator: str = ""
    strips: bool = True
    guard: tuple[str, ...] = ()
    python: bool = False
    flat: bool = False


@dataclass(frozen=True)
class CallForm:
    """How a family writes its calls. head: a tool's name -> GBNF before the arguments. tail: GBNF behind them.

    begin, end: GBNF around all calls. between: GBNF between two calls; None: a reply has one call.
    """

    head: Callable[[str], str]
    tail: str
    arguments: JsonArguments | TagArguments
    begin: str = ""
    end: str = ""
    between: str | None = None


def no_forms(template: str) -> tuple[CallForm, ...]:
    """Of a format whose calls a grammar does not write."""
    return ()
