"""A policy around another one that fetches early what the next layers are expected to use.

Rules: see rules/; auto: stacked, as far and as wide as controller.py finds to pay, and not at all where it does
not. The level that a predicted expert is fetched at is what the policy's own rule wishes for at the predicted weights.
What was fetched and not used makes room for the next guess before anything else does, so wrong guesses displace little.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.layout import SKIP, Ahead, Layout, Prefetch, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.lookahead.controller import Controller, Measured
from moe_edge.schedulers.lookahead.prompt_window import PromptSums
from moe_edge.schedulers.lookahead.rules import make_rule
from moe_edge.schedulers.lookahead.rules.rule import MOST_DEPTH, Predicted, Rule
from moe_edge.schedulers.packed import PackedCache
from moe_edge.schedulers.policies.levels import LOW, IntArray, PolicyStats

MOST_TOKENS = 4  # of a step that is looked ahead from (native/router.h)
ARENA_SHARE = 0.25  # of the arena that guesses may hold
FIRST_LAYER_WEIGHT = 2.0  # of its chances, while look-ahead is on


class Inner(Protocol):
    """What of a LevelPolicy with a plan() look-ahead needs."""

    cache: ExpertCache
    packed: PackedCache | None

    @property
    def name(self) -> str: ...

    @property
    def wants_routing(self) -> bool: ...

    @property
    def wants_attention(self) -> bool: ...

    @property
    def stats(self) -> PolicyStats: ...

    @property
    def resident(self) -> tuple[int, ...]: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def selects(self) -> bool: ...

    def select(self, selection: Selection) -> Sequence[int] | None: ...

    def select_many(self, selections: Selections) -> IntArray | None: ...

    def plan(self, step: Step) -> StepPlan | None: ...

    def meanwhile(self, step: Step) -> Sequence[Prefetch]: ...

    def wishes(self, step: Step) -> Sequence[int]: ...

    def reset(self, resident: Iterable[int]) -> None: ...

    def new_conversation(self) -> None: ...

    def measure_prompts(self, measure: Callable[[], PromptSums] | None) -> None: ...


AnyPolicy = TypeVar("AnyPolicy", bound=Inner)


class LookAheadPolicy:
    """`inner` with look-ahead; the answer to each step is inner's own, plus what to fetch ahead.

    measure: gives the engine's sums, asked once a token; set by whoever runs it, `auto` stays off without. Made by
    with_lookahead(). Look-ahead is for steps of few tokens: others go to inner as they are.
    """

    def __init__(self, inner: Inner, layout: Layout, name: str, rule: Rule | None = None) -> None:
        self.inner = inner
        self.lookahead = name
        self.measure: Callable[[], Measured] | None = None
        self.controller: Controller | None = None
        self.prefetched = 0
        self._layout, self._rule, self._auto = layout, rule or make_rule(name), name == "auto"
        self._guesses: dict[int, int] = {}  # unit fetched ahead and not used yet -> its layer
        self._protected: set[int] = set()
        self._stale: list[int] = []  # guesses whose layer has passed, the oldest first
        self._looking = False  # in the present step
        self._resting = False  # nothing to look for or to count in the present token
        self._wanted_bytes = 0  # see controller.Measured
        self._last_layer = -1
        if not self._auto:
            inner.cache.favour_first_layer(FIRST_LAYER_WEIGHT)

    wants_ahead = True  # steps should carry ask_ahead

    @property
    def depth(self) -> int:
        """Layers to let steps ask ahead."""
        return min(MOST_DEPTH if self._auto else self._rule.depth, max(1, self._layout.n_layers - 1))

    # ---- the policy's own

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def wants_routing(self) -> bool:
        return self.inner.wants_routing

    @property
    def wants_attention(self) -> bool:
        return self.inner.wants_attention

    @property
    def selects(self) -> bool:
        return self.inner.selects

    def select(self, selection: Selection) -> Sequence[int] | None:
        return self.inner.select(selection)

    def select_many(self, selections: Selections) -> IntArray | None:
        return self.inner.select_many(selections)

    @property
    def stats(self) -> PolicyStats:
        return self.inner.stats

    @property
    def cache(self) -> ExpertCache:
        return self.inner.cache

    @property
    def packed(self) -> PackedCache | None:
        return self.inner.packed

    @property
    def resident(self) -> tuple[int, ...]:
        return self.inner.resident

    @property
    def used_bytes(self) -> int:
        return self.inner.used_bytes

    def __getattr__(self, name: str) -> object:
        """What else the policy inside has to tell."""
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def reset(self, resident: Iterable[int]) -> None:
        self.inner.reset(resident)
        self._guesses.clear()
        self._stale.clear()
        self._protected = set()

    def new_conversation(self) -> None:
        self.inner.new_conversation()

    def measure_prompts(self, measure: Callable[[], PromptSums] | None) -> None:
        self.inner.measure_prompts(measure)

    # ---- each step

    def plan(self, step: Step) -> StepPlan | None:
        if self._resting and step.layer > self._last_layer:  # `auto` is off for this token: cost next to nothing
            self._last_layer = step.layer
            return self.inner.plan(step)
        return self._plan(step)

    def _plan(self, step: Step) -> StepPlan | None:
        few = step.n_tokens <= MOST_TOKENS
        if self._auto and few and step.layer <= self._last_layer:
            self._token_done(step)
        self._last_layer = step.layer
        self._looking = few and step.ask_ahead is not None and self._on
        before = self.inner.cache.added_bytes
        plan = self.inner.plan(step)
        if plan is not None:
            self._missed(step.layer, self.inner.cache.added_bytes - before)
        if self._looking or self._guesses or self._protected:
            step.later = True
        return plan

    def meanwhile(self, step: Step) -> Sequence[Prefetch]:
        certain = self.inner.meanwhile(step)
        if self._guesses:
            self._settle(step)
        if not self._looking or step.ask_ahead is None:
            if self._protected:
                self._protect(set())
            return certain
        n_used, depth, width = max(1, len(step.experts) // step.n_tokens), self.depth, len(step.experts)
        if self._auto and self.controller:
            setting = self.controller.setting(step.layer)
            depth, width = setting.depth, setting.width
        ahead = step.ask_ahead(depth)
        wanted = self._wanted(self._rule.predict(step.layer, ahead, width, n_used, self._served))
        kept = self._predicted(step, ahead, n_used)
        prefetch = self._prefetch(step, wanted, kept, n_used) if wanted else []
        self._protect(kept.union(self._guesses))
        return prefetch

    @property
    def _on(self) -> bool:
        return not self._auto or (self.controller is not None and self.controller.on)

    def plan_ahead(self, step: Step) -> list[Prefetch]:
        """What to fetch between two steps for the next one, whose experts are known.

        step: as it will come, but its weights are router probabilities, those of each token 1 together. Its experts go
        last when room is made, those of the step before as any other. Nothing where the levels depend on what is only
        known with the step, nor while `auto` does not find look-ahead to pay: reading costs time on the processor too.
        """
        if not self._on or (step.n_tokens > 1 and self.wants_routing):
            return []
        first, n_levels, sizes = self._layout.first_unit[step.layer], self._layout.n_levels, self._layout.unit_bytes
        wanted = self._absent(step.layer, step.experts, self.inner.wishes(step))
        if not wanted:
            return []
        own = {first + e * n_levels + level for e in step.experts for level in range(n_levels)}
        self.inner.cache.step_done()
        self._protected = own
        return self._fetch(wanted, own, sum(sizes[unit] for unit, _ in wanted))

    def _served(self, layer: int, expert: int) -> bool:
        n_levels = self._layout.n_levels
        unit = self._layout.first_unit[layer] + expert * n_levels
        return unit in self.inner.cache or (n_levels > 1 and unit + LOW in self.inner.cache)

    def _settle(self, step: Step) -> None:
        """Guesses for this layer: used now, or stale."""
        first, n_levels, sizes = self._layout.first_unit[step.layer], self._layout.n_levels, self._layout.unit_bytes
        used = {first + e * n_levels + level for e in step.experts for level in range(n_levels)}
        for unit in [u for u, layer in self._guesses.items() if layer == step.layer]:
            del self._guesses[unit]
            kept = unit in self.inner.cache
            if unit in used:
                self._wanted_bytes += sizes[unit] if kept else 0
                continue
            if self.controller:
                self.controller.ledgers[self.controller.group(step.layer)].wasted += sizes[unit]
            if kept:
                self._stale.append(unit)

    def _missed(self, layer: int, nbytes: int) -> None:
        self._wanted_bytes += nbytes
        if self.controller:
            self.controller.ledgers[self.controller.group(layer)].missed += nbytes

    def _predicted(self, step: Step, ahead: Sequence[Ahead], n_used: int) -> set[int]:
        """Units of the experts that are predicted or on their way."""
        n_levels = self._layout.n_levels
        units = set(self._guesses)
        for a in ahead:
            first = self._layout.first_unit[step.layer + a.distance]
            if n_levels == 1:
                units.update([first + e for e in a.experts[:n_used]])
            else:
                units.update(first + e * n_levels + level for e in a.experts[:n_used] for level in range(n_levels))
        return units

    def _protect(self, units: set[int]) -> None:
        """Evict these only when nothing but the step's own is left."""
        self._protected = units
        self.inner.cache.protect(units)

    def _wanted(self, predicted: list[Predicted]) -> list[tuple[int, list[int]]]:
        """(unit, other levels of that expert in memory) of the predicted experts that the cache does not serve."""
        cache, first = self.inner.cache, self._layout.first_unit
        if self._layout.n_levels == 1:
            units = [first[p.layer] + p.expert for p in predicted]
            return [(unit, []) for unit in units if unit not in cache]
        wanted: list[tuple[int, list[int]]] = []
        at = 0
        while at < len(predicted):
            layer, end = predicted[at].layer, at
            while end < len(predicted) and predicted[end].layer == layer:
                end += 1
            some, at = predicted[at:end], end
            wanted += self._absent(layer, [p.expert for p in some], self._wishes(layer, some))
        return wanted

    def _absent(self, layer: int, experts: Sequence[int], wishes: Sequence[int]) -> list[tuple[int, list[int]]]:
        cache, first, n_levels = self.inner.cache, self._layout.first_unit[layer], self._layout.n_levels
        wanted: list[tuple[int, list[int]]] = []
        for expert, wish in zip(experts, wishes, strict=True):
            high = first + expert * n_levels
            has_low = n_levels > 1 and high + LOW in cache
            if wish == SKIP or high in cache or (wish == LOW and has_low):
                continue
            wanted.append((high + wish, [high + LOW] if has_low else []))
        return wanted

    def _wishes(self, layer: int, predicted: list[Predicted]) -> Sequence[int]:
        total = sum(p.score for p in predicted) or 1.0
        weights = [p.score / total for p in predicted]
        ones = [1] * len(weights)
        return self.inner.wishes(Step(layer, [p.expert for p in predicted], ones, weights, [w * w for w in weights]))

    def _prefetch(
        self, step: Step, wanted: list[tuple[int, list[int]]], predicted: set[int], n_used: int
    ) -> list[Prefetch]:
        """Take wanted units into the cache as far as the allowance and what may be evicted go."""
        sizes = self._layout.unit_bytes
        allowance = self._allowance(sizes[wanted[0][0]], n_used)
        if sizes[wanted[0][0]] > allowance:
            return []
        first, n_levels = self._layout.first_unit[step.layer], self._layout.n_levels
        own = {first + e * n_levels + level for e in step.experts for level in range(n_levels)}
        return self._fetch(wanted, predicted | own, allowance)  # another guess is not evicted for a guess either

    def _fetch(self, wanted: list[tuple[int, list[int]]], kept: set[int], allowance: float) -> list[Prefetch]:
        """Take wanted units into the cache in this order, within the allowance and what is not to be kept."""
        cache, sizes = self.inner.cache, self._layout.unit_bytes
        kept_bytes = sum(sizes[u] for u in kept if u in cache)
        replaced = {u for _, others in wanted for u in others}
        cache.protect(kept.union(unit for unit, _ in wanted) - replaced)
        prefetch: list[Prefetch] = []
        for unit, others in wanted:
            size = sizes[unit]
            if size > allowance or kept_bytes + size > cache.arena_bytes:
                break
            victims = []
            for u in others:
                cache.remove(u)
                victims.append(u)
                kept_bytes -= sizes[u] if u in kept else 0
            while self._stale and cache.used_bytes + size > cache.arena_bytes:
                stale = self._stale.pop(0)
                if stale in cache and stale not in kept:
                    cache.remove(stale)
                    victims.append(stale)
            victims += cache.add(unit)
            prefetch.append(Prefetch(unit, victims))
            self._guesses[unit] = self._layer_of(unit)
            allowance -= size
            kept_bytes += size
        self.prefetched += len(prefetch)
        return prefetch

    def _allowance(self, unit_bytes: int, n_used: int) -> float:
        """Bytes that this step may ask for: of the spare disk time, and of a share of the arena, together with what is
        out already."""
        cache, sizes = self.inner.cache, self._layout.unit_bytes
        out = sum(sizes[u] for u in self._guesses)
        most = max(ARENA_SHARE * cache.arena_bytes, unit_bytes) - out
        if self._auto and self.controller:
            return min(most, self.controller.allowance_bytes)
        return min(most, n_used * unit_bytes)

    def _layer_of(self, unit: int) -> int:
        return bisect_right(self._layout.first_unit, unit) - 1

    def _token_done(self, step: Step) -> None:
        if self.measure is None:
            return
        if self.controller is None:
            n_units = len(self._layout.unit_bytes)
            mean = sum(self._layout.unit_bytes) / n_units
            n_used = max(1, len(step.experts) // step.n_tokens)
            self.controller = Controller(self._layout.n_layers, n_used, mean, most_depth=self.depth)
        self.controller.token(replace(self.measure(), wanted_bytes=self._wanted_bytes))
        self.inner.cache.favour_first_layer(FIRST_LAYER_WEIGHT if self.controller.pays else 1.0)
        self._resting = not (self.controller.on or self.controller.comparing or self._guesses or self._protected)


def with_lookahead(policy: AnyPolicy, layout: Layout, name: str) -> AnyPolicy | LookAheadPolicy:
    """The policy itself when look-ahead is off or there is one MoE layer only. Raises UnknownName."""
    if name == "off":
        return policy
    make_rule(name)
    return LookAheadPolicy(policy, layout, name) if layout.n_layers > 1 else policy
