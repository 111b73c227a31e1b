"""Layer by layer to the first that would miss. Source: HOBBIT, PAPERS.md, section 2."""

from __future__ import annotations

from collections.abc import Sequence

from moe_edge.schedulers.layout import Ahead
from moe_edge.schedulers.lookahead.rules.rule import MOST_DEPTH, Predicted, RuleEntry, Served, best_of


class Stacked:
    """The best of each layer, up to the first layer that would miss."""

    depth = MOST_DEPTH

    def predict(self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served) -> list[Predicted]:
        predicted: list[Predicted] = []
        for a in ahead:
            best = best_of(layer, a, width)
            predicted += best
            if not all(served(p.layer, p.expert) for p in best):
                break
        return predicted


RULE = RuleEntry("stacked", 20, "layer by layer to the first that would miss (HOBBIT)", Stacked)
