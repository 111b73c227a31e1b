"""Which experts the next layers will want, from what their routers say of this layer's input (Step.ask_ahead).

single: the next layer's best (DyMoE). stacked: layer by layer to the first that would miss (HOBBIT). votes: only what
several earlier layers agree on, most votes first (FIRM-MoE; never the plain union, precision before recall). On the
trained tiny model votes are no more precise than the nearest layer alone and miss more (docs/LOG.md).
Source: PAPERS.md, sections 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from moe_edge.models.errors import UnknownName
from moe_edge.schedulers.layout import Ahead
from moe_edge.schedulers.policies.options import LOOKAHEADS

MOST_DEPTH = 3


class Predicted(NamedTuple):
    """An expert that a later step is expected to use. layer: its position. score: router probability."""

    layer: int
    expert: int
    score: float


Served = Callable[[int, int], bool]  # (layer, expert) -> whether it is in memory


class Rule(Protocol):
    depth: int  # layers ahead it looks at

    def predict(
        self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served
    ) -> list[Predicted]:
        """What to have in memory soon, most wanted first, from what the routers say in the step of `layer`.

        width: experts of a layer to consider. n_used: experts that a token uses in a layer.
        """
        ...


class SingleLayer:
    """The next layer's best."""

    depth = 1

    def predict(self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served) -> list[Predicted]:
        return [p for a in ahead[:1] if a.distance == 1 for p in _best(layer, a, width)]


class Stacked:
    """The best of each layer, up to the first layer that would miss."""

    depth = MOST_DEPTH

    def predict(self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served) -> list[Predicted]:
        predicted: list[Predicted] = []
        for a in ahead:
            best = _best(layer, a, width)
            predicted += best
            if not all(served(p.layer, p.expert) for p in best):
                break
        return predicted


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
                p for p in _best(layer, a, width)
                if (2 * votes[p.expert] > voters if a.distance == 1 else votes[p.expert] == voters)
            ]  # fmt: skip
            agreed.sort(key=lambda p: (-votes[p.expert], -p.score))
            predicted += agreed
        return predicted


def _best(layer: int, a: Ahead, width: int) -> list[Predicted]:
    there = layer + a.distance
    return [Predicted(there, e, s) for e, s in zip(a.experts[:width], a.scores[:width], strict=True)]


def make_rule(name: str) -> SingleLayer | Stacked | Votes:
    """Raises UnknownName."""
    if name == "single":
        return SingleLayer()
    if name in ("stacked", "auto"):
        return Stacked()
    if name == "votes":
        return Votes()
    raise UnknownName(f"unknown look-ahead '{name}'; known: {', '.join(LOOKAHEADS)}")
