"""Which of the oldest turns a conversation that does not fit goes without. Pure.

A client of the server sends its whole history each time, and the server keeps nothing. So that the beginning of the
prompt stays the same from turn to turn, and the KV cache of the last one is of use, the turns are gone through as they
came: whenever the context was full, the older half went at once, as in `chat`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def turns_of(messages: Sequence[Mapping[str, Any]]) -> tuple[int, list[int]]:
    """(messages at the head that always stay, where each turn begins): a turn is a question with what answers it."""
    head = 0
    while head < len(messages) and messages[head].get("role") in ("system", "developer"):
        head += 1
    starts = [head, *(at for at in range(head + 1, len(messages)) if messages[at].get("role") == "user")]
    return head, starts if head < len(messages) else []


def first_kept(sizes: Sequence[int], fixed: int, room: int, half: int) -> int:
    """The first turn that stays. sizes: tokens of each turn. fixed: tokens of what always stays. The last turn stays.

    room: tokens that a prompt may have. half: what the context is emptied to when it is full.
    """
    first, held = 0, fixed
    for turn, size in enumerate(sizes):
        held += size
        if held > room:
            while held > half and first < turn:
                held -= sizes[first]
                first += 1
    return first


def without_oldest(
    messages: Sequence[Mapping[str, Any]], sizes: Sequence[int], overhead: int, room: int, half: int
) -> list[Mapping[str, Any]]:
    """The messages that stay. sizes: tokens of each message. overhead: of tools and the template's own words."""
    head, starts = turns_of(messages)
    if not starts:
        return list(messages)
    ends = [*starts[1:], len(messages)]
    turns = [sum(sizes[start:end]) for start, end in zip(starts, ends, strict=True)]
    first = first_kept(turns, overhead + sum(sizes[:head]), room, half)
    return [*messages[:head], *messages[starts[first] :]]
