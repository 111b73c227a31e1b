"""The exact policy: every expert at the level the model has, so that the bits are the same at every budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_edge.schedulers.layout import Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.lookahead.prompt import PromptAhead
from moe_edge.schedulers.lookahead.prompt_window import PromptSums
from moe_edge.schedulers.packed import PackedSplit
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.levels import HIGH, LevelPolicy
from moe_edge.schedulers.usage import Usage


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
        self._ahead = PromptAhead(layout, self.cache)
        self.stats.expected_damage = 0.0

    def use_cache(
        self, rule: str, usage: Usage | None = None, count: Usage | None = None, packed: PackedSplit | None = None
    ) -> None:
        super().use_cache(rule, usage, count, packed)
        measure, self._ahead = self._ahead.measure, PromptAhead(self._layout, self.cache)
        self._ahead.measure = measure

    def measure_prompts(self, measure: Callable[[], PromptSums] | None) -> None:
        self._ahead.measure = measure

    def plan(self, step: Step) -> StepPlan | None:
        self.stats.wanted_high += len(step.experts)
        plan = None if self._all_high(step) else self.serve(step, [HIGH] * len(step.experts))
        if step.n_tokens != 1 or step.layer + 1 == self._layout.n_layers:
            self._ahead.note(step)
        if step.n_tokens > 1 and self._reads_ahead(step):
            step.later = True
        return plan

    def meanwhile(self, step: Step) -> Sequence[Prefetch]:
        """Let the eviction rule learn, and read for the next layer of a prompt."""
        super().meanwhile(step)
        return self._ahead.fetch(step) if self._reads_ahead(step) else ()

    def _reads_ahead(self, step: Step) -> bool:
        """Not beside a packed cache, whose experts pass through the arena as it is and mostly need no read."""
        return self.packed is None and self._ahead.wants(step)


POLICY = PolicyEntry(
    "exact", 0, "nothing is traded", lambda layout, arena_bytes, options, calibration: ExactLru(layout, arena_bytes)
)
