"""The expert whose next use is expected last goes first."""

from __future__ import annotations

from moe_edge.schedulers.eviction.decayed import Decayed
from moe_edge.schedulers.eviction.ranked import distances
from moe_edge.schedulers.eviction.rule import RuleEntry
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.usage import Usage


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

    def _readiness(self, layer: int, score: float) -> float:
        return self.WAIT / (score * self._uses.scale[layer] + self.LEAST_CHANCE)


RULE = RuleEntry("next-use", 20, "the one whose next use is expected last", NextUse)
