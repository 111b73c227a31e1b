"""HOBBIT's weighted score of recency, frequency, precision and layer distance."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from moe_edge.schedulers.eviction.ranked import Ranked, distances
from moe_edge.schedulers.eviction.rule import RuleEntry
from moe_edge.schedulers.layout import Layout, Step


class HobbitScore(Ranked):
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
        self._rebuild(range(self._n_layers))

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

    def _readiness(self, layer: int, score: float) -> float:
        return -score / max(1, self._token)


RULE = RuleEntry(
    "hobbit", 60, "HOBBIT's weighted score", lambda layout, arena_bytes, usage: HobbitScore(layout)
)
