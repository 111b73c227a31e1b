"""What happens while a reply is made, before its text is parsed: how far the prompt is, and each token drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """So many tokens of the prompt are in the KV cache. done counts those that were there already."""

    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was drawn: its id, its bytes, and the natural logarithm of its probability.

    The probability is the model's own, before temperature, penalties, bias and grammar. top: the most likely tokens at
    this place in the same form, the likeliest first.
    """

    token: int
    data: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A token was drawn. text: what can be shown now, whole characters, often empty. logprob: None unless asked for."""

    text: str
    token: int
    logprob: TokenLogprob | None = None
