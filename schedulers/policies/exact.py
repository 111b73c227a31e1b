"""The exact policy: every expert at the level the model has, so that the bits are the same at every budget."""

from __future__ import annotations

from moe_edge.schedulers.layout import Layout, Step, StepPlan
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.levels import HIGH, LevelPolicy


class ExactLru(LevelPolicy):
    """Full precision; evicts the expert used longest ago, or by the rule of use_cache().

    An expert needed in the present step is evicted only when nothing else is left, and then after it has been
    computed: with a budget below one step's working set the step streams through the arena. A low copy that another
    policy left behind goes when its expert is used.
    """

    name = "exact"
    wants_routing = wants_attention = False

    def __init__(self, layout: Layout, arena_bytes: int) -> None:
        super().__init__(layout, arena_bytes)
        self.stats.expected_damage = 0.0

    def plan(self, step: Step) -> StepPlan | None:
        self.stats.wanted_high += len(step.experts)
        if self._all_high(step):
            return None
        return self.serve(step, [HIGH] * len(step.experts))


POLICY = PolicyEntry(
    "exact", 0, "nothing is traded", lambda layout, arena_bytes, options, calibration: ExactLru(layout, arena_bytes)
)
