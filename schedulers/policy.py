"""The policy interface, and the exact policy: every expert at the level the model has, cached by recency.

Called once for each MoE layer and micro-batch. Pure Python: no I/O, no ctypes; tests drive it without a model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from moe_edge.models.errors import BudgetTooSmall, UnknownName
from moe_edge.schedulers.layout import Layout, StepPlan


class Policy(Protocol):
    name: str

    def plan(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> StepPlan | None:
        """Decide one step: `experts` are distinct, `counts` says how many tokens of the micro-batch go to each.

        None: all are in memory at level 0; compute them. It saves the answer's way through ctypes, which is most of
        what a step without a miss costs (docs/LOG.md).
        """
        ...

    def reset(self, resident: Iterable[int]) -> None:
        """Forget the cache state and start from these units, as after a failed read."""
        ...


class ExactLru:
    """Full precision; evicts the expert used longest ago.

    An expert needed in the present step is evicted only when nothing else is left, and then after it has been
    computed: with a budget below one step's working set the step streams through the arena.
    Source: LRU is within 0-11 % of the best on-line rule on nine models (PAPERS.md, section 8).
    """

    name = "exact"

    def __init__(self, layout: Layout, arena_bytes: int) -> None:
        self._layout = layout
        self._arena_bytes = arena_bytes
        self._resident: OrderedDict[int, int] = OrderedDict()  # unit -> bytes, oldest use first
        self._used_bytes = 0

    @property
    def resident(self) -> tuple[int, ...]:
        """Units in memory, the one used longest ago first."""
        return tuple(self._resident)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def reset(self, resident: Iterable[int]) -> None:
        sizes = self._layout.unit_bytes
        self._resident = OrderedDict((u, sizes[u]) for u in resident)
        self._used_bytes = sum(self._resident.values())

    def plan(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> StepPlan | None:
        first, n_levels = self._layout.first_unit[layer], self._layout.n_levels
        cache = self._resident
        renew = cache.move_to_end
        try:
            for expert in experts:
                renew(first + expert * n_levels)
            return None
        except KeyError:  # a miss: the hits before it are renewed once more below, which changes nothing
            pass
        hits: list[int] = []
        misses: list[int] = []
        for i, expert in enumerate(experts):
            unit = first + expert * n_levels
            if unit in cache:
                cache.move_to_end(unit)
                hits.append(i)
            else:
                misses.append(i)
        # Hits are the newest now, so whatever is popped first is not of this step; hits go only when they are all
        # that is left, and they come before every miss in the order, so they have been computed by then.
        victims: list[Sequence[int]] = [()] * len(hits)
        for i in misses:
            unit = first + experts[i] * n_levels
            victims.append(self._make_room(self._layout.unit_bytes[unit]))
            cache[unit] = self._layout.unit_bytes[unit]
        return StepPlan(hits + misses, [0] * len(experts), victims)

    def _make_room(self, need_bytes: int) -> list[int]:
        evicted: list[int] = []
        if need_bytes > self._arena_bytes:
            raise BudgetTooSmall(
                f"one expert needs {need_bytes} bytes but the expert arena has {self._arena_bytes}", need_bytes
            )
        while self._used_bytes + need_bytes > self._arena_bytes:
            unit, size = self._resident.popitem(last=False)
            self._used_bytes -= size
            evicted.append(unit)
        self._used_bytes += need_bytes
        return evicted


POLICIES = {"exact": ExactLru}


def make_policy(name: str, layout: Layout, arena_bytes: int) -> Policy:
    """A policy by name. Raises UnknownName."""
    if name not in POLICIES:
        raise UnknownName(f"unknown policy '{name}'; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](layout, arena_bytes)
