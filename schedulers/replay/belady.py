"""The fewest expert reads on a trace: Belady's rule, which knows the future, as a planner for simulate().

The variant: demand fetching with mandatory load. Nothing is read before its step; every absent expert of a step is read
into the arena, where it stays until a later read takes its place (no bypass); the experts of a step are served in the
order that suits best, those in memory first. Every expert at the high level.

With units of one size and one expert a step it is exact. With more it is exact but for ties, experts next used in the
same step: which of them is evicted decides which is read last and has to stay. Against all choices there are, 5 of some
23,000 random small cases were 1 read above the best and none more. On a made-up trace of 48 x 128 experts, an eighth or
more of them in memory, it was 0.01 % above the fewest loads of policies that may drop an expert right after its step.

The event-atomic variant takes a step for one event: all its experts are in memory together when it ends, so none makes
room for another of it. With units of one size it is exact, ties included: what is next used in the same step is wanted
there together, whichever of it was evicted (tests/test_atomic_replay.py, against all choices there are).

Reads are fewest, not stall: it may evict an expert that its step still computes, and the read waits for that.
With units of different sizes it evicts the farthest next use until the bytes fit: close to the best, but a heuristic,
which a policy can beat by evicting one large unit for two small ones; the best choice is NP-hard.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from heapq import heapify, heappop, heappush

import numpy as np
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.schedulers.layout import Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.replay.simulate import Costs, SimResult, simulate
from moe_edge.schedulers.replay.trace import Ints, Trace


def simulate_belady(
    trace: Trace, arena_bytes: int, costs: Costs | None = None, resident: Iterable[int] = (), *, atomic: bool = False
) -> SimResult:
    """The trace under Belady's rule. Raises BudgetTooSmall when one expert does not fit, or with `atomic` one step."""
    return simulate(
        trace, lambda layout, arena: Belady(trace, layout, arena, atomic=atomic), arena_bytes, costs, resident,
        atomic=atomic,
    )  # fmt: skip


def has_one_size(trace: Trace) -> bool:
    """Whether the high-level units have one size, so that the bound is one."""
    sizes = trace.unit_bytes[:: trace.n_levels]
    return bool((sizes == sizes[0]).all())


class Belady:
    """Evicts the unit whose next use is farthest. Its steps must be those of the trace, from the first on.

    A request is one expert of one step, numbered in order, after one of every unit before the first step. Each has a
    rank, 0 for the one to be forgotten first: farthest next use; among units that are next used in the same step, the
    one that is used again soonest after that, because it will be read last and stay.
    A unit in memory stands in the heap with the rank of its last request; older entries of it are stale.
    atomic: a step is one event, whose units are not evicted for each other.
    """

    def __init__(self, trace: Trace, layout: Layout, arena_bytes: int, *, atomic: bool = False) -> None:
        self._layout, self._atomic = layout, atomic
        self._arena_bytes = arena_bytes
        units, steps = _requests(trace, layout)
        order = _forget_first(units, steps)
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        self._ranks: list[int] = ranks.tolist()
        self._unit_of_rank: list[int] = units[order].tolist()
        self.reset(())

    def reset(self, resident: Iterable[int]) -> None:
        """Start from these units, before the first step."""
        self._request = len(self._layout.unit_bytes)  # those before the first step have their unit's number
        self._rank_of = {unit: self._ranks[unit] for unit in resident}  # of each unit in memory
        self._used_bytes = sum(self._layout.unit_bytes[unit] for unit in self._rank_of)
        self._heap = list(self._rank_of.values())
        heapify(self._heap)

    def meanwhile(self, step: Step) -> tuple[Prefetch, ...]:
        return ()

    def plan(self, step: Step) -> StepPlan | None:
        n_levels, first, n = self._layout.n_levels, self._layout.first_unit[step.layer], len(step.experts)
        ranks = self._ranks[self._request : self._request + n]
        self._request += n
        hits, misses = [], []
        for i, expert in enumerate(step.experts):
            unit = first + expert * n_levels
            if unit in self._rank_of:
                self._note(unit, ranks[i])
                hits.append(i)
            else:
                misses.append(i)
        if not misses:
            return None
        misses.sort(key=ranks.__getitem__)  # nearest next use last: what is read last cannot be evicted for the others
        kept = {first + expert * n_levels for expert in step.experts} if self._atomic else set()
        victims: list[list[int]] = [[] for _ in hits]
        for i in misses:
            unit = first + step.experts[i] * n_levels
            victims.append(self._make_room(self._layout.unit_bytes[unit], kept))
            self._used_bytes += self._layout.unit_bytes[unit]
            self._note(unit, ranks[i])
        return StepPlan(hits + misses, [0] * n, victims)

    def _note(self, unit: int, rank: int) -> None:
        self._rank_of[unit] = rank
        heappush(self._heap, rank)

    def _make_room(self, need_bytes: int, kept: Container[int]) -> list[int]:
        if need_bytes > self._arena_bytes:
            raise BudgetTooSmall(
                f"one expert needs {need_bytes} bytes but the expert arena has {self._arena_bytes}", need_bytes
            )
        victims, aside = [], []
        while self._used_bytes + need_bytes > self._arena_bytes:
            rank = heappop(self._heap)
            unit = self._unit_of_rank[rank]
            if self._rank_of.get(unit) != rank:
                continue
            if unit in kept:
                aside.append(rank)
                continue
            del self._rank_of[unit]
            self._used_bytes -= self._layout.unit_bytes[unit]
            victims.append(unit)
        for rank in aside:
            heappush(self._heap, rank)
        return victims


def _requests(trace: Trace, layout: Layout) -> tuple[Ints, Ints]:
    """(unit, step number) of each request: every unit once before the first step, then the trace's."""
    units, steps = list(range(len(layout.unit_bytes))), [-1] * len(layout.unit_bytes)
    for number, (_, step) in enumerate(trace.steps()):
        first = layout.first_unit[step.layer]
        units += [first + expert * layout.n_levels for expert in step.experts]
        steps += [number] * len(step.experts)
    return np.array(units, np.int64), np.array(steps, np.int64)


def _forget_first(units: Ints, steps: Ints) -> Ints:
    """The requests in the order in which their units are to be forgotten: see Belady."""
    n = len(units)
    by_unit = np.argsort(units, kind="stable")
    following = np.full(n + 1, n, np.int64)  # the unit's next request; n: none
    same = units[by_unit[1:]] == units[by_unit[:-1]]
    following[by_unit[:-1][same]] = by_unit[1:][same]
    never = int(steps[-1]) + 1
    step_of = np.append(steps, never)
    next_step = step_of[following]
    second_step = next_step[following[:n]]
    return np.lexsort((second_step, -next_step[:n]))
