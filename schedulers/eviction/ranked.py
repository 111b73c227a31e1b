"""Base of the eviction rules by score, and how far apart the steps of two layers are."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from operator import add

from moe_edge.schedulers.eviction.rule import Units
from moe_edge.schedulers.layout import Layout, Step


class Ranked:
    """Base of the rules by score: a heap for each layer, and the layer whose least unit is worth least gives it.

    A unit's score is that of its expert, and grows only when the expert is used. So a use costs an addition, and a unit
    moves in its heap when it comes to the head with an old score. What may not go is set aside until the next step.
    How readily a unit goes is _readiness(its layer, its score) + offset[present layer][its layer]; the first changes
    with the token and falls with the score. A rule gives both, _restart and _note.
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
        elif self._ready is not None:
            self._set_least(step.layer, self._least[step.layer])
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
                self._ready = [self._readiness(layer, least) for layer, least in enumerate(self._least)]
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
            ready = self._ready[layer] = -inf if score == inf else self._readiness(layer, score)
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
        ready = [self._readiness(of[unit], self.score[unit // self._n_levels]) for unit in units]
        by = [(-value - offset[of[u]], self._entry[u], u) for value, u in zip(ready, units, strict=True)]
        return [unit for _, _, unit in sorted(by)]

    def new_conversation(self) -> None:
        pass

    def _rebuild(self, layers: Iterable[int]) -> None:
        """The scores of these layers were replaced: sort them again."""
        self.release()
        for layer in layers:
            heap = self._heaps[layer]
            units = [(serial, unit) for _, serial, unit in heap if self._entry[unit] == serial]
            heap[:] = [(self.score[unit // self._n_levels], serial, unit) for serial, unit in units]
            heapify(heap)
            self._least[layer] = heap[0][0] if heap else inf
        self._ready = self._worst = None

    def _restart(self) -> None:
        raise NotImplementedError

    def _note(self, step: Step) -> None:
        raise NotImplementedError

    def _readiness(self, layer: int, score: float) -> float:
        raise NotImplementedError


def distances(n_layers: int) -> list[list[float]]:
    """[at][layer]: tokens from the step of one layer to the next step of another: 1/L for the next layer, 1 for at."""
    layers = range(n_layers)
    return [[((layer - at - 1) % n_layers + 1) / n_layers for layer in layers] for at in layers]
