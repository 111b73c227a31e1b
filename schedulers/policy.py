"""What a policy is to the engine, and how one is made from what the user asked for.

A policy is called once for each MoE layer and micro-batch. Pure Python: no I/O, no ctypes; tests drive it without a
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from moe_edge.models.calibration import Calibration
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.layout import Layout, Prefetch, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.lookahead.around import with_lookahead
from moe_edge.schedulers.lookahead.prompt_window import PromptSums
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import PackedCache, PackedSplit
from moe_edge.schedulers.policies import find_policy
from moe_edge.schedulers.policies.levels import IntArray, PolicyStats
from moe_edge.schedulers.settings import check_options, resolve_options
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
    def selects(self) -> bool:
        """Whether it takes part in the choice of experts: then select() or select_many() is asked before each step."""
        ...

    @property
    def stats(self) -> PolicyStats:
        """Counts since the policy was made; copy() them to keep them."""
        ...

    @property
    def cache(self) -> ExpertCache: ...

    @property
    def packed(self) -> PackedCache | None:
        """Which experts are packed in memory; None without a packed cache."""
        ...

    @property
    def resident(self) -> tuple[int, ...]:
        """Units in memory, the one used longest ago first."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes of the units in memory."""
        ...

    def select(self, selection: Selection) -> Sequence[int] | None:
        """The experts of one token, as many as it uses, in any order; None: those that the model chose."""
        ...

    def select_many(self, selections: Selections) -> IntArray | None:
        """The experts of each token of a micro-batch, [T, n_used]; None: those that the model chose."""
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

    def measure_prompts(self, measure: Callable[[], PromptSums] | None) -> None:
        """Give what says how long a prompt's layers waited, by the clock; None: nothing does, as in a replay."""
        ...

    def reset(self, resident: Iterable[int]) -> None:
        """Forget the cache state and start from these units, as after a failed read."""
        ...

    def new_conversation(self) -> None:
        """A text begins that has nothing to do with the last one; what is in memory stays."""
        ...


def make_policy(
    options: PolicyOptions,
    layout: Layout,
    arena_bytes: int,
    calibration: Calibration | None = None,
    usage: Usage | None = None,
    packed: PackedSplit | None = None,
) -> Policy:
    """The policy that `options` ask for. Raises UnknownName, and UsageError for knobs that do not go together.

    usage: what earlier runs used, where eviction rules that count start (eviction.make_rule). This run is counted in
    it too. packed: keep packed experts too, in memory beside the arena.
    """
    options = resolve_options(options, calibration)
    check_options(options, layout, calibration)
    policy = find_policy(options.name).make(layout, arena_bytes, options, calibration)
    policy.use_cache(options.cache, usage, usage, packed)
    made: Policy = with_lookahead(policy, layout, options.lookahead)
    return made
