"""The policy interface, and the exact policy: every expert at the level the model has, cached by recency.

Called once for each MoE layer and micro-batch. Pure Python: no I/O, no ctypes; tests drive it without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from moe_edge.models.calibration import Calibration
from moe_edge.schedulers.layout import Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.lookahead.around import with_lookahead
from moe_edge.schedulers.policies.damage import DamagePolicy
from moe_edge.schedulers.policies.dymoe import DyMoE
from moe_edge.schedulers.policies.hobbit import Hobbit
from moe_edge.schedulers.policies.levels import HIGH, LevelPolicy, PolicyStats
from moe_edge.schedulers.policies.options import PolicyOptions
from moe_edge.schedulers.policies.settings import check_options, resolve_options
from moe_edge.schedulers.usage import Usage


class Policy(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def wants_routing(self) -> bool:
        """Whether steps of several tokens should carry their Routing."""
        ...

    @property
    def wants_attention(self) -> bool:
        """Whether the Routing should carry the attention each token received."""
        ...

    @property
    def stats(self) -> PolicyStats:
        """Counts since the policy was made; copy() them to keep them."""
        ...

    @property
    def resident(self) -> tuple[int, ...]:
        """Units in memory, the one used longest ago first."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes of the units in memory."""
        ...

    def plan(self, step: Step) -> StepPlan | None:
        """Decide one step.

        None: all are in memory at level 0; compute them. It saves the answer's way through ctypes, which is most of
        what a step without a miss costs (docs/LOG.md).
        """
        ...

    def meanwhile(self, step: Step) -> Sequence[Prefetch]:
        """After a step whose plan() set `later`, once its reads have started: what can wait till then is done now.

        The time is the disk's: what it costs is seldom waited for. Returns what to fetch ahead, in this order.
        """
        ...

    def reset(self, resident: Iterable[int]) -> None:
        """Forget the cache state and start from these units, as after a failed read."""
        ...

    def new_conversation(self) -> None:
        """A text begins that has nothing to do with the last one; what is in memory stays."""
        ...


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


def make_policy(
    options: PolicyOptions,
    layout: Layout,
    arena_bytes: int,
    calibration: Calibration | None = None,
    usage: Usage | None = None,
) -> Policy:
    """The policy that `options` ask for. Raises UnknownName, and UsageError for knobs that do not go together.

    usage: what earlier runs used, where eviction rules that count start (cache.make_rule); this run is counted in it.
    """
    options = resolve_options(options, calibration)
    check_options(options, layout, calibration)
    policy = _make_inner(options, layout, arena_bytes, calibration)
    policy.use_cache(options.cache, usage, usage)
    return with_lookahead(policy, layout, options.lookahead)


def _make_inner(
    options: PolicyOptions, layout: Layout, arena_bytes: int, calibration: Calibration | None
) -> DyMoE | Hobbit | DamagePolicy | ExactLru:
    if options.name == "dymoe":
        return DyMoE(layout, arena_bytes, options, calibration)
    if options.name == "hobbit":
        return Hobbit(layout, arena_bytes, options, calibration)
    if options.name == "damage":
        return DamagePolicy(layout, arena_bytes, options, calibration)
    return ExactLru(layout, arena_bytes)
