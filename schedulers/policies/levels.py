"""What a wish for a level becomes, given what is in memory: the cache rules that DyMoE and HOBBIT share, and counts.

A wish is HIGH (level 0), LOW (level 1) or SKIP. Memory never holds two levels of one expert. Level 0 and level 1 are
used, further ones are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt
from moe_edge.models.calibration import Calibration
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.layout import SKIP, Layout, Prefetch, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.lookahead.prompt_window import PromptSums
from moe_edge.schedulers.packed import PackedCache, PackedSplit
from moe_edge.schedulers.usage import Usage

HIGH, LOW = 0, 1
IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class PolicyStats:
    """Counts since the policy was made. A use is one distinct expert of one step, as in the native counters.

    uses = high_uses + low_uses + skipped_uses, by the level computed. wanted_*: by the level the policy asked for,
    whatever the cache made of it; hobbit asks about misses only and counts only those.
    substituted: uses, of all tokens, that the policy gave to another expert for less damage than a read would save.
    expected_damage: nats, sum over low, skipped and substituted uses of the squared gate weight times the calibrated
    damage of a use; None without a calibration.
    """

    uses: int = 0
    high_uses: int = 0
    low_uses: int = 0
    skipped_uses: int = 0
    wanted_high: int = 0
    wanted_low: int = 0
    wanted_skip: int = 0
    substituted: int = 0
    expected_damage: float | None = None

    def copy(self) -> PolicyStats:
        return replace(self)

    def since(self, earlier: PolicyStats) -> PolicyStats:
        """The counts between an earlier copy and now."""
        counts = (a - b for a, b in zip(astuple(self)[:-1], astuple(earlier)[:-1], strict=True))
        between = PolicyStats(*counts)
        if self.expected_damage is not None:
            between.expected_damage = self.expected_damage - (earlier.expected_damage or 0.0)
        return between


class LevelPolicy:
    """Base of the policies: a cache, the rules below, and the counts.

    Rules, the first three from DyMoE (PAPERS.md, section 1):
    high in memory, high or low wanted: use it (without `reuse`, a low wish reads the low copy and drops the high one);
    low in memory, low wanted: use it;
    low in memory, high wanted: promotion, the low copy goes before the high one is read;
    absent: read what is wanted;
    skip wanted, any level in memory: use it, as it costs nothing; without `reuse`, skip.
    """

    selects = False  # whether select() and select_many() are to be asked before each step

    def __init__(
        self, layout: Layout, arena_bytes: int, calibration: Calibration | None = None, reuse: bool = True
    ) -> None:
        self._layout = layout
        self._reuse = reuse
        self.cache = ExpertCache(layout, arena_bytes)
        self.packed: PackedCache | None = None
        self.stats = PolicyStats()
        # [L][E] nats of one use with gate weight 1, as lists: numpy scalars would triple the time of a decode step
        self._low_damage = self._skip_damage = None
        if calibration:
            self.stats.expected_damage = 0.0
            self._low_damage = calibration.unit_damage(LOW if layout.n_levels > 1 else SKIP).tolist()
            self._skip_damage = calibration.unit_damage(SKIP).tolist()

    def use_cache(
        self, rule: str, usage: Usage | None = None, count: Usage | None = None, packed: PackedSplit | None = None
    ) -> None:
        """Evict by another rule of schedulers.eviction.RULES than LRU; before the first step.

        usage, count: see ExpertCache. packed: keep packed experts beside the arena, those by this rule and the arena's
        by PackedCache's own.
        """
        arena_bytes = self.cache.arena_bytes
        if packed is not None:
            self.packed = PackedCache(self._layout, arena_bytes, packed, rule, usage)
        self.cache = ExpertCache(self._layout, arena_bytes, self.packed or rule, usage=usage, count=count)

    @property
    def resident(self) -> tuple[int, ...]:
        """Units in memory, the one used longest ago first."""
        return self.cache.resident

    @property
    def used_bytes(self) -> int:
        return self.cache.used_bytes

    def reset(self, resident: Iterable[int]) -> None:
        """Forget the cache state and start from these units. The counts go on."""
        self.cache.reset(resident)

    def measure_prompts(self, measure: Callable[[], PromptSums] | None) -> None:
        """Let what is read ahead for a prompt follow the engine's sums, or not. Nothing is, but by the exact policy."""

    def meanwhile(self, step: Step) -> Sequence[Prefetch]:
        """Let the eviction rule learn. Nothing is fetched ahead: what level the next layer gets is not known yet."""
        self.cache.learn()
        return ()

    def new_conversation(self) -> None:
        """A text begins that has nothing to do with the last one: an eviction rule that counts by conversation, hobbit,
        starts again; what is in memory, the counts and the usage of a warm start go on."""
        self.cache.new_conversation()

    def select(self, selection: Selection) -> Sequence[int] | None:
        """The experts of a token, as many as it uses, in any order; None: those that the model chose."""
        return None

    def select_many(self, selections: Selections) -> IntArray | None:
        """The experts of each token of a micro-batch, [T, n_used]; None: those that the model chose."""
        return None

    def wishes(self, step: Step) -> Sequence[int]:
        """The level this policy would ask for, for each expert; changes nothing. For steps that are only predicted."""
        return [HIGH] * len(step.experts)

    def _all_high(self, step: Step) -> bool:
        """Whether every expert is in memory at the high level: then the step is noted and counted, and needs no plan.

        Otherwise those before the first that is not are renewed, and serve() does the rest.
        """
        first, n_levels = self._layout.first_unit[step.layer], self._layout.n_levels
        renew = self.cache.renew
        try:
            for expert in step.experts:
                renew(first + expert * n_levels)
        except KeyError:
            return False
        self.cache.note(step)
        self.stats.uses += len(step.experts)
        self.stats.high_uses += len(step.experts)
        return True

    def serve(self, step: Step, wishes: Sequence[int]) -> StepPlan | None:
        """The plan for one wish an expert; None when it is all of them at the high level, from memory.

        Order: what is in memory, what is read, what is skipped. Raises BudgetTooSmall.
        """
        self.cache.note(step)
        cache, reuse, n_levels = self.cache, self._reuse, self._layout.n_levels
        first = self._layout.first_unit[step.layer]
        hits: list[int] = []
        hit_levels: list[int] = []
        misses: list[int] = []
        skips: list[int] = []
        for i, (expert, wish) in enumerate(zip(step.experts, wishes, strict=True)):
            unit = first + expert * n_levels
            if unit in cache:
                level = HIGH if reuse or wish == HIGH else None
            elif n_levels > 1 and unit + LOW in cache:
                level = LOW if wish == LOW or (wish == SKIP and reuse) else None
            else:
                level = None
            if level is not None:
                cache.renew(unit + level)
                hits.append(i)
                hit_levels.append(level)
            elif wish == SKIP:
                skips.append(i)
            else:
                misses.append(i)
        if self.packed is not None and len(misses) > 1:
            units = [first + step.experts[i] * n_levels + wishes[i] for i in misses]
            misses = [misses[at] for at in self.packed.schedule(units, [step.counts[i] for i in misses])]
        self._count(step, hits + misses + skips, levels := hit_levels + [wishes[i] for i in misses + skips])
        if not any(levels) and not misses:
            return None
        victims: list[Sequence[int]] = [()] * len(hits)
        for i in misses:
            unit = first + step.experts[i] * n_levels
            replaced = []
            if n_levels > 1 and (other := unit + LOW - wishes[i]) in cache:
                cache.remove(other)
                replaced.append(other)
            victims.append(replaced + cache.add(unit + wishes[i]))
        victims += [()] * len(skips)
        step.later = cache.learns
        return StepPlan(hits + misses + skips, levels, victims)

    def _count(self, step: Step, order: Sequence[int], levels: Sequence[int]) -> None:
        stats = self.stats
        low, skipped = levels.count(LOW), levels.count(SKIP)
        stats.uses += len(levels)
        stats.high_uses += len(levels) - low - skipped
        stats.low_uses += low
        stats.skipped_uses += skipped
        if self._low_damage and self._skip_damage and stats.expected_damage is not None and low + skipped:
            of_low, of_skip = self._low_damage[step.layer], self._skip_damage[step.layer]
            for i, level in zip(order, levels, strict=True):
                if level != HIGH:
                    unit_damage = of_low if level == LOW else of_skip
                    stats.expected_damage += step.squares[i] * unit_damage[step.experts[i]]
