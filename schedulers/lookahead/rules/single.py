"""The next layer's best. Source: DyMoE, PAPERS.md, section 1."""

from __future__ import annotations

from collections.abc import Sequence

from moe_edge.schedulers.layout import Ahead
from moe_edge.schedulers.lookahead.rules.rule import Predicted, RuleEntry, Served, best_of


class SingleLayer:
    """The next layer's best."""

    depth = 1

    def predict(self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served) -> list[Predicted]:
        return [p for a in ahead[:1] if a.distance == 1 for p in best_of(layer, a, width)]


RULE = RuleEntry("single", 10, "the next layer's best (DyMoE)", SingleLayer)
