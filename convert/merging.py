"""Byte pair encoding of one piece, and what follows from it for a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T", str, bytes)


def merged(parts: Sequence[T], rank: Callable[[T, T], int | None]) -> list[T]:
    """The parts of a piece, joined two by two: each time those of the lowest rank, the leftmost first.

    rank: of two neighbours, None when they are not joined.
    """
    made = list(parts)
    ranks = [rank(left, right) for left, right in pairwise(made)]
    while any(each is not None for each in ranks):
        at = min((each, i) for i, each in enumerate(ranks) if each is not None)[1]
        made[at : at + 2] = [made[at] + made[at + 1]]
        del ranks[at]
        if at < len(ranks):
            ranks[at] = rank(made[at], made[at + 1])
        if at:
            ranks[at - 1] = rank(made[at - 1], made[at])
    return made


def all_are_merged(tokens: Iterable[str], merges: Sequence[str]) -> bool:
    """Whether each token is what its characters are merged to: then `ignore_merges` changes nothing.

    merges: `a b`, in their order.
    """
    ranks: dict[tuple[str, str], int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault((left, right), number)
    return all(len(merged(list(token), lambda left, right: ranks.get((left, right)))) == 1 for token in tokens)
