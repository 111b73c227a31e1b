"""What dymoe and hobbit must beat at equal bytes: simple ways to read less, as policies. Not part of the product.

All stand on the product's own cache and counts (schedulers/policies/levels.py), so only the choice of what to leave out
differs. Gate weights are used in steps of one token; micro-batches of several tokens are served in full, but for
`cold`, which needs no weights. A token keeps its strongest expert whatever the rule says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UnknownName
from moe_edge.schedulers.layout import SKIP, Layout, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.importance import gate_mass, most_important
from moe_edge.schedulers.policies.levels import HIGH, IntArray, LevelPolicy
from moe_edge.schedulers.policies.reroute import Reroute
from moe_edge.schedulers.policy import Policy

SMALLEST = 1e-30  # of a probability, for its logarithm


@dataclass(frozen=True)
class Rival:
    """A rule by name (see RULES) and its one number."""

    name: str
    value: float = 0.0


class SkipPolicy(LevelPolicy):
    """Base: each expert HIGH or SKIP. on_miss: only experts that are not in memory are skipped."""

    name = "rival"
    wants_routing = wants_attention = False

    def __init__(
        self, layout: Layout, arena_bytes: int, calibration: Calibration | None, value: float, on_miss: bool
    ) -> None:
        super().__init__(layout, arena_bytes, calibration, reuse=on_miss)
        self.value = value

    def plan(self, step: Step) -> StepPlan | None:
        wishes = [HIGH if wanted else SKIP for wanted in self.wanted(step)]
        if HIGH not in wishes:
            wishes[most_important(gate_mass(step), 1)[0]] = HIGH
        self.stats.wanted_high += wishes.count(HIGH)
        self.stats.wanted_skip += wishes.count(SKIP)
        return self.serve(step, wishes)

    def wanted(self, step: Step) -> Sequence[bool]:
        raise NotImplementedError


class FewerExperts(SkipPolicy):
    """The k - value experts with the largest gate weights: top-(k-1), top-(k-2), ..."""

    def wanted(self, step: Step) -> Sequence[bool]:
        n = len(step.experts)
        if step.n_tokens > 1:
            return [True] * n
        chosen = set(most_important(gate_mass(step), max(1, n - int(self.value))))
        return [i in chosen for i in range(n)]


class BelowThreshold(SkipPolicy):
    """Those whose gate weight is at least `value` of the token's sum."""

    def wanted(self, step: Step) -> Sequence[bool]:
        if step.n_tokens > 1:
            return [True] * len(step.experts)
        mass = gate_mass(step)
        least = self.value * sum(mass)
        return [g >= least for g in mass]


class NoCold(SkipPolicy):
    """All but the `value` share of each layer's experts that the calibration text used least; ties: the lower index."""

    def __init__(
        self, layout: Layout, arena_bytes: int, calibration: Calibration | None, value: float, on_miss: bool
    ) -> None:
        super().__init__(layout, arena_bytes, calibration, value, on_miss)
        assert calibration is not None, "the counts are the calibration's"
        self.cold = [
            frozenset(sorted(range(n), key=row.__getitem__)[: int(value * n)])
            for n, row in zip(layout.n_experts, calibration.counts.tolist(), strict=True)
        ]

    def wanted(self, step: Step) -> Sequence[bool]:
        cold = self.cold[step.layer]
        return [expert not in cold for expert in step.experts]


class CachePrior(Reroute):
    """Cache-Prior as it is published: the logits get the bonus, by the running mean of their range; the first stays.

    For routers that rank by a softmax: its logarithm is the logits but for a number that all of a token's share.
    """

    name = "rival"

    def __init__(self, layout: Layout, arena_bytes: int, strength: float) -> None:
        super().__init__(layout, arena_bytes, PolicyOptions("reroute", strength=strength, keep_top=1))

    def select(self, selection: Selection) -> Sequence[int] | None:
        logits = [math.log(max(p, SMALLEST)) for p in selection.scores]
        return super().select(selection._replace(scores=logits))

    def select_many(self, selections: Selections) -> IntArray | None:
        return super().select_many(selections._replace(scores=np.log(np.maximum(selections.scores, SMALLEST))))


class OnDemand(LevelPolicy):
    """Everything at the high level and no cache: a step's experts leave before the next step's are read."""

    name = "on demand"
    wants_routing = wants_attention = False

    def plan(self, step: Step) -> StepPlan | None:
        self.stats.wanted_high += len(step.experts)
        first, n_levels = self._layout.first_unit[step.layer], self._layout.n_levels
        needed = {first + expert * n_levels for expert in step.experts}
        gone = [unit for unit in self.cache.resident if unit not in needed]
        n_hits = sum(unit in self.cache for unit in needed)
        if n_hits == len(needed):  # a model of one layer, the same experts again
            return self.serve(step, [HIGH] * len(step.experts))
        for unit in gone:
            self.cache.remove(unit)
        plan = self.serve(step, [HIGH] * len(step.experts))
        assert plan is not None, "there is a miss"
        victims = list(plan.victims)
        victims[n_hits] = [*gone, *victims[n_hits]]  # the first that is read
        return plan._replace(victims=victims)


Make = Callable[[Layout, int, Calibration | None, float], Policy]

RULES: dict[str, Make] = {
    "top-k less": lambda la, a, c, v: FewerExperts(la, a, c, v, on_miss=False),
    "top-k less on miss": lambda la, a, c, v: FewerExperts(la, a, c, v, on_miss=True),
    "weight below": lambda la, a, c, v: BelowThreshold(la, a, c, v, on_miss=False),
    "weight below on miss": lambda la, a, c, v: BelowThreshold(la, a, c, v, on_miss=True),
    "cold dropped": lambda la, a, c, v: NoCold(la, a, c, v, on_miss=False),
    "cache-prior": lambda la, a, c, v: CachePrior(la, a, v),
    "on demand": lambda la, a, c, v: OnDemand(la, a, c),
}


def make_rival(rival: Rival, layout: Layout, arena_bytes: int, calibration: Calibration | None) -> Policy:
    """The policy of a rival. Raises UnknownName."""
    if rival.name not in RULES:
        raise UnknownName(f"unknown rival '{rival.name}'; known: {', '.join(RULES)}")
    return RULES[rival.name](layout, arena_bytes, calibration, rival.value)
