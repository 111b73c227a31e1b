"""LRU: the unit used longest ago goes first."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from moe_edge.schedulers.eviction.rule import RuleEntry, Units
from moe_edge.schedulers.layout import Step


class Lru:
    """The unit used longest ago."""

    by_recency, learns, first_layer_weight = True, False, 1.0

    def reset(self, resident: Iterable[int]) -> None:
        pass

    def note(self, step: Step) -> None:
        pass

    def added(self, unit: int, victims: Sequence[int]) -> None:
        pass

    def removed(self, unit: int) -> None:
        pass

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        return next((unit for unit in units if unit not in kept), None)

    def release(self) -> None:
        pass

    def learn(self) -> None:
        pass

    def order(self, units: Units) -> list[int]:
        return list(units)

    def new_conversation(self) -> None:
        pass


RULE = RuleEntry("lru", 40, "the one used longest ago", lambda layout, arena_bytes, usage: Lru())
