"""The default eviction rule: next-use, with chances that learn which experts follow which in a layer.

Tokens call on experts in company: after experts 3 and 7 of a layer, 12 may be three times as likely as its frequency
says. A linear predictor for each layer, taught by its own errors, knows it after some hundred tokens.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from math import inf
from operator import add
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from moe_edge.schedulers.eviction.next_use import NextUse
from moe_edge.schedulers.eviction.ranked import distances
from moe_edge.schedulers.eviction.rule import RuleEntry, Units
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import DecayedUses, Usage

Floats: TypeAlias = npt.NDArray[Any]  # float64; the table is float32

LARGEST_TABLE_BYTES = 16 << 20  # 48 layers of 128 experts take 3 MiB


def table_bytes(layout: Layout) -> int:
    """Bytes of the predictor's weights: what a model must not have too much of to be given this rule."""
    return 4 * sum(n * n for n in layout.n_experts)


def learned_half_life(arena_share: float) -> float:
    """As eviction.fitting_half_life, longer: what is short-lived is the predictor's."""
    return min(32.0, max(8.0, 64.0 * arena_share))


class Learned:
    """NextUse with a learned chance: (q + decayed frequency) / 2, where q predicts the layer's next token.

    q[e] = SHARE * decayed frequency of e + sum of W[f, e] over the experts f of the layer's last token. After the next
    token each W[f] takes a step towards what it should have been (least mean squares, normalised by the number of f).
    Steps of several tokens teach nothing and are followed by the frequency alone.
    A layer is worked out when a victim is needed after its step, so a step without a miss costs two lists and an
    addition for each expert; tokens between are not learned from. To predict cannot wait; to learn can, until the
    reads have started (learn()).
    Source: ours. On the trained model 2 to 4 % fewer reads than next-use from a cold start (docs/LOG.md, 2026-11-22).
    first_layer_weight: by how much to overrate the chances of the first layer's experts, see cache.py.
    """

    by_recency, learns = False, True
    SHARE, RATE = 0.7, 0.05

    def __init__(self, layout: Layout, arena_bytes: int, usage: Usage | None = None) -> None:
        self._n_levels, self._n_experts = layout.n_levels, layout.n_experts
        self._first_unit = layout.first_unit
        self._layer_of = [layer for layer in range(layout.n_layers) for _ in layout.layer_units(layer)]
        self._offset = distances(layout.n_layers)
        self._uses = DecayedUses(layout, learned_half_life(arena_bytes / layout.total_bytes), usage)
        self.first_layer_weight = 1.0
        self.reset(())

    def reset(self, resident: Iterable[int]) -> None:
        self._uses.reset()
        self._look_at_scores()
        n_layers = len(self._n_experts)
        self.layer = n_layers
        self._weights: list[Floats] = [np.zeros((n, n), np.float32) for n in self._n_experts]
        self._predicted: list[Floats] = [np.zeros(n) for n in self._n_experts]
        self._last: list[npt.NDArray[np.int64] | None] = [None] * n_layers  # experts that the prediction is from
        self._waiting: list[Step | None] = [None] * n_layers  # steps that are to be worked out
        self._layers_waiting: list[int] = []
        self._lessons: dict[int, tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.int64]]] = {}
        # of each unit: the chance of a use by the next token; and 0 in memory, else infinite
        self._chance: list[Floats] = [self._of_units(self._frequency(layer)) for layer in range(n_layers)]
        self._absent: list[Floats] = [np.full(n * self._n_levels, np.inf) for n in self._n_experts]
        self._least = [inf] * n_layers  # at most the least chance of each layer
        self._ready = [-inf] * n_layers
        self._worst: list[float] | None = None
        self._aside: dict[int, float] = {}  # kept units that came up, and what made them present
        for order, unit in enumerate(resident):
            self._put(unit, order * 1e-9)  # of equals the first named goes first

    def note(self, step: Step) -> None:
        self._uses.note(step)
        self.layer = layer = step.layer
        self._worst = None
        if self._waiting[layer] is None:
            self._layers_waiting.append(layer)
        else:
            self._last[layer] = None
        self._waiting[layer] = step
        if self._aside:
            self.release()

    def added(self, unit: int, victims: Sequence[int]) -> None:
        self._put(unit, 0.0)

    def removed(self, unit: int) -> None:
        self._aside.pop(unit, None)
        self._put(unit, inf)

    def release(self) -> None:
        for unit, absent in self._aside.items():
            self._put(unit, absent)
        self._aside.clear()

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        for layer in self._layers_waiting:
            self._predict(layer)
        self._layers_waiting.clear()
        worst = self._worst
        if worst is None:
            worst = self._worst = list(map(add, self._offset[self._at], self._ready))
        while True:
            highest = max(worst)
            layer = worst.index(highest)
            if highest == -inf:
                return None
            values: Any = self._chance[layer] + self._absent[layer]
            at = int(values.argmin())
            least = float(values.item(at))
            if least > self._least[layer]:
                self._set_least(layer, least)
                if worst[layer] != highest:
                    continue
            unit = self._first_unit[layer] + at
            absent = self._absent[layer]
            if unit not in kept:
                absent[at] = inf
                return unit
            self._aside[unit] = absent.item(at)
            absent[at] = inf

    def order(self, units: Units) -> list[int]:
        """By what is worked out so far: to look changes nothing."""
        return sorted(units, key=lambda unit: (-self._readiness_of(unit), unit))

    def new_conversation(self) -> None:
        pass

    @property
    def _at(self) -> int:
        return min(self.layer, len(self._n_experts) - 1)

    def _put(self, unit: int, absent: float) -> None:
        layer = self._layer_of[unit]
        at = unit - self._first_unit[layer]
        self._absent[layer][at] = absent
        least = float(self._chance[layer].item(at) + absent)
        if least < self._least[layer]:
            self._set_least(layer, least)

    def _set_least(self, layer: int, least: float) -> None:
        self._least[layer] = least
        self._ready[layer] = ready = -inf if least == inf else NextUse.WAIT / (least + NextUse.LEAST_CHANCE)
        if self._worst is not None:
            self._worst[layer] = ready + self._offset[self._at][layer]

    def _readiness_of(self, unit: int) -> float:
        layer = self._layer_of[unit]
        at = unit - self._first_unit[layer]
        chance = float((self._chance[layer] + self._absent[layer]).item(at))
        return NextUse.WAIT / (chance + NextUse.LEAST_CHANCE) + self._offset[self._at][layer]

    def _look_at_scores(self) -> None:
        scores = np.frombuffer(self._uses.score)
        first = self._uses.first_expert
        self._scores = [scores[at : at + n] for at, n in zip(first, self._n_experts, strict=True)]

    def _frequency(self, layer: int) -> Floats:
        return self._scores[layer] * self._uses.scale[layer]

    def _of_units(self, of_experts: Floats) -> Floats:
        return of_experts if self._n_levels == 1 else of_experts.repeat(self._n_levels)

    def learn(self) -> None:
        for layer in self._lessons:
            self._learn(layer)
        self._lessons.clear()

    def _learn(self, layer: int) -> None:
        """The experts that were used, against what had been predicted from those before them."""
        last, predicted, experts = self._lessons[layer]
        rate = self.RATE / len(last)
        error = predicted * -rate
        error[experts] += rate
        weights = self._weights[layer]
        rows = weights.take(last, 0)
        rows += error
        weights[last] = rows

    def _predict(self, layer: int) -> None:
        """The layer's next token, from its last step."""
        step, self._waiting[layer] = self._waiting[layer], None
        assert step is not None
        frequency, last = self._frequency(layer), self._last[layer]
        if layer in self._lessons:  # nobody had time for it
            self._learn(layer)
            del self._lessons[layer]
        if step.n_tokens == 1:
            experts = np.array(step.experts)
            if last is not None:
                self._lessons[layer] = last, self._predicted[layer], experts
            predicted = np.add.reduce(self._weights[layer].take(experts, 0))
            predicted += self.SHARE * frequency
            self._last[layer], self._predicted[layer] = experts, predicted
            chance = np.maximum(predicted, 0)
            chance += frequency
            chance *= 0.5
        else:
            self._last[layer], chance = None, frequency
        if layer == 0 and self.first_layer_weight != 1:
            chance = chance * self.first_layer_weight
        self._chance[layer] = self._of_units(chance)
        self._set_least(layer, float(np.minimum.reduce(self._chance[layer] + self._absent[layer])))


RULE = RuleEntry(
    "learned", 10, "as next-use, with chances that learn which experts follow which", Learned
)
