"""Which turns a conversation that does not fit goes without: the older half at once, and the same ones next turn."""

from __future__ import annotations

import itertools
from typing import Any

from moe_edge.runner.serve.dialects import all_routes
from moe_edge.runner.truncate import first_kept, turns_of, without_oldest


def message(role: str, n: int = 0) -> dict[str, Any]:
    return {"role": role, "content": f"{role} {n}"}


def test_turns_begin_with_questions_and_the_system_stays() -> None:
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "user"]
    assert turns_of([message(role) for role in roles]) == (1, [1, 5, 7])
    assert turns_of([message("assistant"), message("user")]) == (0, [0, 1])
    assert turns_of([message("system")]) == (1, []) and turns_of([]) == (0, [])


def test_the_older_half_goes_at_once_and_stays_away() -> None:
    room, half, firsts = 100, 60, []
    for n in range(1, 60):
        firsts.append(first_kept([10] * n, 5, room, half))
    assert firsts == sorted(firsts) and firsts[8] == 0 and firsts[9] == 5
    changes = [n for n in range(1, len(firsts)) if firsts[n] != firsts[n - 1]]
    assert all(b - a >= 4 for a, b in itertools.pairwise(changes)), "the beginning changes now and then"
    for n, first in enumerate(firsts, 1):
        assert 5 + 10 * (n - first) <= room
    assert first_kept([10, 500], 0, room, half) == 1, "the last question stays whatever it is"


def test_messages_go_by_whole_turns() -> None:
    messages = [message("system"), *(message(role, n) for n in range(6) for role in ("user", "assistant"))][:-1]
    kept = without_oldest(messages, [10] * len(messages), 0, 100, 50)
    assert kept[0] == messages[0] and kept[1]["role"] == "user" and kept[-1] == messages[-1]
    assert 10 * len(kept) <= 100 and len(kept) < len(messages)
    assert without_oldest(messages, [1] * len(messages), 0, 100, 50) == messages
    assert without_oldest(messages[:1], [900], 0, 100, 50) == messages[:1]


def test_each_dialect_has_its_own_rule() -> None:
    routes = {route.path: route for route in all_routes()}
    user = [{"role": "user", "content": "x"}]
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("/api/chat", {"messages": user}, True), ("/api/chat", {"messages": user, "truncate": False}, False),
        ("/v1/responses", {"input": "x"}, False), ("/v1/responses", {"input": "x", "truncation": "auto"}, True),
        ("/v1/responses", {"input": "x", "truncation": "disabled"}, False),
        ("/v1/chat/completions", {"messages": user}, False),
        ("/v1/messages", {"messages": user, "max_tokens": 5}, False),
    ]  # fmt: skip
    for path, body, truncates in cases:
        assert routes[path].parse({"model": "m", **body}).request.truncate == truncates, (path, body)
