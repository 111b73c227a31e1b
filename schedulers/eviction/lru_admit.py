"""LRU with admission: what was loaded though it is used less often than what it displaced goes first."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from moe_edge.schedulers.eviction.lru import Lru
from moe_edge.schedulers.eviction.rule import RuleEntry, Units
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import DecayedUses


class LruAdmit(Lru):
    """LRU that refuses one-off experts: every expert used must be loaded, so refused means first to go after its step.

    Refused: loaded while its decayed frequency is below that of a unit it displaced, until it is used again.
    Source: TinyLFU's comparison (Einziger et al. 2017); ZipMoE's ranks (PAPERS.md, section 4) refused too many.
    """

    by_recency = False

    def __init__(self, layout: Layout, half_life: float = 64.0) -> None:
        self._uses = DecayedUses(layout, half_life)
        self._n_levels = layout.n_levels
        self.reset(())

    def reset(self, resident: Iterable[int]) -> None:
        self._uses.reset()
        self._refused: dict[int, None] = {}

    def note(self, step: Step) -> None:
        self._uses.note(step)
        if self._refused:
            first = self._uses.first_expert[step.layer] * self._n_levels
            for expert in step.experts:
                for unit in range(first + expert * self._n_levels, first + (expert + 1) * self._n_levels):
                    self._refused.pop(unit, None)

    def added(self, unit: int, victims: Sequence[int]) -> None:
        rate, n_levels = self._uses.rate, self._n_levels
        if any(rate(unit // n_levels) < rate(victim // n_levels) for victim in victims):
            self._refused[unit] = None

    def removed(self, unit: int) -> None:
        self._refused.pop(unit, None)

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        unit = next((unit for unit in self._refused if unit not in kept), None)
        if unit is None:
            return super().choose(units, kept)
        del self._refused[unit]
        return unit

    def order(self, units: Units) -> list[int]:
        return [*self._refused, *(unit for unit in units if unit not in self._refused)]


RULE = RuleEntry(
    "lru-admit", 50, "LRU that lets one-off experts go first", lambda layout, arena_bytes, usage: LruAdmit(layout)
)
