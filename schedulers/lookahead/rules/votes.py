"""Only what several earlier layers agree on, never the plain union: precision before recall.

Source: FIRM-MoE, PAPERS.md, section 3. On the trained tiny model votes are no more precise than the nearest layer
alone, and miss more (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_edge.schedulers.layout import Ahead
from moe_edge.schedulers.lookahead.rules.rule import MOST_DEPTH, Predicted, RuleEntry, Served, best_of


class Votes:
    """What the layers before it agree on, nearest layer first; of a layer most votes first, then the last score.

    An expert of the next layer needs the votes of more than half of the layers that have looked at it; one further away
    of all of them, and of two at least.
    """

    depth = MOST_DEPTH

    def __init__(self) -> None:
        self._votes: dict[int, tuple[int, dict[int, int]]] = {}  # layer -> (voters, expert -> votes)
        self._last = -1

    def predict(self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served) -> list[Predicted]:
        if layer <= self._last:
            self._votes.clear()
        self._last = layer
        self._votes.pop(layer, None)
        predicted: list[Predicted] = []
        for a in ahead:
            target = layer + a.distance
            voters, votes = self._votes.get(target, (0, {}))
            for expert in a.experts[:width]:
                votes[expert] = votes.get(expert, 0) + 1
            voters += 1
            self._votes[target] = voters, votes
            if a.distance > 1 and voters < 2:
                continue
            agreed = [
                p for p in best_of(layer, a, width)
                if (2 * votes[p.expert] > voters if a.distance == 1 else votes[p.expert] == voters)
            ]  # fmt: skip
            agreed.sort(key=lambda p: (-votes[p.expert], -p.score))
            predicted += agreed
        return predicted


RULE = RuleEntry("votes", 30, "what several earlier layers agree on (FIRM-MoE)", Votes)
