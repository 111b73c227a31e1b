"""What a look-ahead rule is: it says which experts the next layers will want, from what their routers say now.

A rule is one file of this folder that ends with its RULE; __init__.py finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moe_edge.schedulers.layout import Ahead

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


@dataclass(frozen=True)
class RuleEntry:
    """A rule as the command line and the reports know it.

    words: one phrase for `--help`. order: where it stands in lists, lowest first. make: a new rule, without memory.
    """

    name: str
    order: int
    words: str
    make: Callable[[], Rule]


def best_of(layer: int, a: Ahead, width: int) -> list[Predicted]:
    """The experts that the router of the layer `a` is about likes best. layer: the position of the present one."""
    there = layer + a.distance
    return [Predicted(there, e, s) for e, s in zip(a.experts[:width], a.scores[:width], strict=True)]
