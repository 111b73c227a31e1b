"""Eviction rules: which of the units in memory goes next. State in, decision out; bytes are counted in cache.py.

Here are lru, lru-admit (what was loaded though it is used less often than what it displaced goes first), decayed (the
decayed frequency), next-use (the unit whose next use is expected last) and hobbit (HOBBIT's weighted score). The
default is in learned.py.

A layer's experts below one token's working set LRU never hits, and up to it seldom (tests/test_counts.py); the
frequency rules keep what is used most and do. Nothing made for that case alone did better: pinning by counts, random
and most-recent-first read 3 to 20 % more (docs/LOG.md, 2026-11-22), so there is no second rule to switch to.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from operator import add
from typing import Protocol

from moe_edge.schedulers.eviction.usage import DecayedUses, Usage
from moe_edge.schedulers.layout import Layout, Step

Units = OrderedDict[int, int]  # unit in memory -> its bytes, the one used longest ago first

HALF_LIFE_TOKENS = 16.0


class EvictionRule(Protocol):
    """What the cache asks. Shared checks of every rule: tests/test_eviction.py."""

    by_recency: bool  # whether the victim is always the oldest of Units, so that nobody has to ask
    learns: bool  # whether learn() does anything
    first_layer_weight: float  # see ExpertCache.favour_first_layer

    def reset(self, resident: Iterable[int]) -> None:
        """Start again; of equal units the one named first goes first."""

    def note(self, step: Step) -> None:
        """A step begins: its experts are in use until the next one."""

    def added(self, unit: int, victims: Sequence[int]) -> None:
        """A unit was put in, and these were evicted for it."""

    def removed(self, unit: int) -> None:
        """A unit was taken out, and not by choose()."""

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        """The unit to evict; None when only `kept` ones are in memory. It is no longer in memory afterwards."""

    def release(self) -> None:
        """`kept` is another set from now on."""

    def learn(self) -> None:
        """The reads of a step that missed have started: time for what can wait."""

    def order(self, units: Units) -> list[int]:
        """Units in memory, the one to evict first coming first."""

    def new_conversation(self) -> None:
        """A text begins that has nothing to do with the last one."""


class Lru:
    """The unit used longest ago."""

    by_recency, learns, first_layer_weight = True, False, 1.0

    def reset(self, resident: Iterable[int]) -> None:
        pass

    def note(self, step: Step) -> None:
        pass

    def added(self, unit: int, victims: Sequence[int]) -> None:
        pass

    def removed(self, unit: int) -> None:
        pass

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        return next((unit for unit in units if unit not in kept), None)

    def release(self) -> None:
        pass

    def learn(self) -> None:
        pass

    def order(self, units: Units) -> list[int]:
        return list(units)

    def new_conversation(self) -> None:
        pass


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
        score, n_levels = self._uses.score, self._n_levels
        if any(score[unit // n_levels] < score[victim // n_levels] for victim in victims):
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


class Ranked:
    """Base of the rules by score: a heap for each layer, and the layer whose least unit is worth least gives it.

    A unit's score is that of its expert, and grows only when the expert is used. So a use costs an addition, and a unit
    moves in its heap when it comes to the head with an old score. What may not go is set aside until the next step.
    How readily a unit goes is _readiness(its score) + offset[present layer][its layer]; the first changes with the
    token and falls with the score. A rule gives both, _restart and _note.
    """

    by_recency, learns, first_layer_weight = False, False, 1.0
    score: array[float]  # of each expert

    def __init__(self, layout: Layout, offset: list[list[float]]) -> None:
        self._n_levels = layout.n_levels
        self._n_layers = layout.n_layers
        self._layer_of = [layer for layer in range(layout.n_layers) for _ in layout.layer_units(layer)]
        self._longest = [4 * len(layout.layer_units(layer)) for layer in range(layout.n_layers)]
        self._offset = offset

    def reset(self, resident: Iterable[int]) -> None:
        self._restart()
        self.layer = self._n_layers  # of the present step
        self._serial = 0
        self._entry = [0] * len(self._layer_of)  # of each unit in memory, the serial number of its entry; else 0
        self._heaps: list[list[tuple[float, int, int]]] = [[] for _ in range(self._n_layers)]
        self._aside: list[tuple[float, int, int]] = []
        self._least = [inf] * self._n_layers  # at most the least score of each layer
        self._ready: list[float] | None = None  # the readiness of those; None: to be worked out for this token
        self._worst: list[float] | None = None  # with the offsets of this step; None: to be worked out
        for unit in resident:
            self.added(unit, ())

    def note(self, step: Step) -> None:
        self._note(step)
        if step.layer <= self.layer:
            self._ready = None
        self.layer = step.layer
        self._worst = None
        if self._aside:
            self.release()

    def added(self, unit: int, victims: Sequence[int]) -> None:
        layer = self._layer_of[unit]
        heap, score = self._heaps[layer], self.score[unit // self._n_levels]
        self._serial += 1
        self._entry[unit] = self._serial
        heappush(heap, (score, self._serial, unit))
        if len(heap) > self._longest[layer]:
            heap[:] = [entry for entry in heap if self._entry[entry[2]] == entry[1]]
            heapify(heap)
        if score < self._least[layer]:
            self._set_least(layer, score)

    def removed(self, unit: int) -> None:
        self._entry[unit] = 0

    def release(self) -> None:
        for entry in self._aside:
            if self._entry[entry[2]] == entry[1]:
                layer = self._layer_of[entry[2]]
                heappush(self._heaps[layer], entry)
                if entry[0] < self._least[layer]:
                    self._set_least(layer, entry[0])
        self._aside.clear()

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        worst = self._worst
        if worst is None:
            if self._ready is None:
                self._ready = self._readiness(self._least)
            worst = self._worst = list(map(add, self._offset[self._at], self._ready))
        while True:
            highest = max(worst)
            layer = worst.index(highest)
            least = self._find_least(layer, kept)
            if least is None:
                if highest == -inf:
                    return None
                self._set_least(layer, inf)
            elif least > self._least[layer]:
                self._set_least(layer, least)
            if worst[layer] == highest:
                unit = heappop(self._heaps[layer])[2]
                self._entry[unit] = 0
                return unit

    def learn(self) -> None:
        pass

    @property
    def _at(self) -> int:
        """The present layer; before the first step, the last one."""
        return min(self.layer, self._n_layers - 1)

    def _set_least(self, layer: int, score: float) -> None:
        self._least[layer] = score
        if self._ready is not None:
            ready = self._ready[layer] = -inf if score == inf else self._readiness((score,))[0]
            if self._worst is not None:
                self._worst[layer] = ready + self._offset[self._at][layer]

    def _find_least(self, layer: int, kept: Container[int]) -> float | None:
        """Bring the least unit that may go to the head of its heap; its score. None when the layer has none."""
        heap, entry, score, n_levels = self._heaps[layer], self._entry, self.score, self._n_levels
        while heap:
            known, serial, unit = heap[0]
            if entry[unit] != serial:
                heappop(heap)
            elif score[unit // n_levels] > known:
                heapreplace(heap, (score[unit // n_levels], serial, unit))
            elif unit in kept:
                self._aside.append(heappop(heap))
            else:
                return known
        return None

    def order(self, units: Units) -> list[int]:
        offset, of = self._offset[self._at], self._layer_of
        ready = self._readiness([self.score[unit // self._n_levels] for unit in units])
        by = [(-value - offset[of[u]], self._entry[u], u) for value, u in zip(ready, units, strict=True)]
        return [unit for _, _, unit in sorted(by)]

    def new_conversation(self) -> None:
        pass

    def _rebuild(self) -> None:
        """Scores were replaced: sort again."""
        self.release()
        for layer, heap in enumerate(self._heaps):
            units = [(serial, unit) for _, serial, unit in heap if self._entry[unit] == serial]
            heap[:] = [(self.score[unit // self._n_levels], serial, unit) for serial, unit in units]
            heapify(heap)
            self._least[layer] = heap[0][0] if heap else inf
        self._ready = self._worst = None

    def _restart(self) -> None:
        raise NotImplementedError

    def _note(self, step: Step) -> None:
        raise NotImplementedError

    def _readiness(self, scores: Sequence[float]) -> list[float]:
        raise NotImplementedError


def distances(n_layers: int) -> list[list[float]]:
    """[at][layer]: tokens from the step of one layer to the next step of another: 1/L for the next layer, 1 for at."""
    layers = range(n_layers)
    return [[((layer - at - 1) % n_layers + 1) / n_layers for layer in layers] for at in layers]


class Decayed(Ranked):
    """The lowest decayed frequency, half_life in tokens."""

    def __init__(self, layout: Layout, half_life: float = HALF_LIFE_TOKENS, usage: Usage | None = None) -> None:
        super().__init__(layout, [[0.0] * layout.n_layers] * layout.n_layers)
        self._uses = DecayedUses(layout, half_life, usage)
        self._uses.rescaled = self._take_scaled
        self.reset(())

    def _restart(self) -> None:
        self._uses.reset()
        self.score = self._uses.score

    def _take_scaled(self) -> None:
        self.score = self._uses.score
        self._rebuild()

    def _note(self, step: Step) -> None:
        self._uses.note(step)

    def _readiness(self, scores: Sequence[float]) -> list[float]:
        return [-score for score in scores]


def fitting_half_life(arena_share: float) -> float:
    """Tokens, for an arena that holds this share of all experts: 8 below a fifth, 32 from four fifths on.

    The larger the arena, the rarer the experts between which the choice is, and the longer it takes to tell them apart.
    Measured on the trained model (8 reads 6 % more than 24 at 60 %) and on made-up routing of 128 experts with short
    memory (16 reads 7 to 12 % more than 8 at 13 and 25 %); docs/LOG.md, 2026-11-22.
    """
    return min(32.0, max(8.0, 40.0 * arena_share))


class NextUse(Decayed):
    """The unit whose next use is expected last: its layer comes in `distance` tokens, then it waits for its turn.

    Source: ours. Belady's rule on estimates: decayed frequency gives the chance of a use by each token, and the wait
    is WAIT / (chance + LEAST_CHANCE) tokens. WAIT below 1, as uses come in bursts. Both chosen by reads on a trace of
    the trained model; 1 to 4 % fewer than with the decayed frequency alone (docs/LOG.md, 2026-11-22).
    """

    WAIT, LEAST_CHANCE = 0.25, 0.05

    def __init__(self, layout: Layout, arena_bytes: int, usage: Usage | None = None) -> None:
        super().__init__(layout, fitting_half_life(arena_bytes / layout.total_bytes), usage)
        self._offset = distances(layout.n_layers)

    def _readiness(self, scores: Sequence[float]) -> list[float]:
        wait, least, scale = self.WAIT, self.LEAST_CHANCE, self._uses.rate_scale
        return [wait / (score * scale + least) for score in scores]


class Hobbit(Ranked):
    """The lowest w1 R/T + w2 F/T + w3 H/T + w4 (1 - layers until it is computed / L).

    T tokens of the conversation, R the one that used it last, F its uses, H those at the high level. One pool for both
    levels, as in the arena; H counts the level in memory when the step is over.
    Source: HOBBIT, PAPERS.md, section 2. The weights are not published: ours are fitted on a trace of the trained model
    on its calibration text, conversations of 256 tokens (docs/LOG.md, 2026-11-22).
    """

    def __init__(self, layout: Layout, weights: Sequence[float] = (0.7, 0.14, 0.14, 0.02)) -> None:
        self._w1, self._w2, self._w3, w4 = weights
        super().__init__(layout, [[w4 * (d % 1 - 1) for d in row] for row in distances(layout.n_layers)])
        self._n_experts = sum(layout.n_experts)
        self._first = [unit // layout.n_levels for unit in layout.first_unit]
        self.reset(())

    def new_conversation(self) -> None:
        self._restart()
        self._rebuild()

    def _restart(self) -> None:
        self.score = array("d", bytes(8 * self._n_experts))  # w1 R + w2 F + w3 H
        self._last = [0] * self._n_experts  # R
        self._token, self._noted = 0, -1
        self._before: list[int] = []  # experts of the step before, whose H is not counted yet

    def _note(self, step: Step) -> None:
        score, last, entry, n_levels = self.score, self._last, self._entry, self._n_levels
        for expert in self._before:
            if entry[expert * n_levels]:
                score[expert] += self._w3
        if step.layer <= self._noted or self._token == 0:
            self._token += step.n_tokens
        self._noted = step.layer
        first, token, w1 = self._first[step.layer], self._token, self._w1
        self._before = [first + expert for expert in step.experts]
        for expert, count in zip(self._before, step.counts, strict=True):
            score[expert] += w1 * (token - last[expert]) + self._w2 * count
            last[expert] = token

    def _readiness(self, scores: Sequence[float]) -> list[float]:
        token = max(1, self._token)
        return [-score / token for score in scores]
