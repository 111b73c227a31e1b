"""The expert with the lowest decayed frequency goes first."""

from __future__ import annotations

from moe_edge.schedulers.eviction.ranked import Ranked
from moe_edge.schedulers.eviction.rule import RuleEntry
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import DecayedUses, Usage

HALF_LIFE_TOKENS = 16.0


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

    def _take_scaled(self, layer: int) -> None:
        self._rebuild([layer])

    def _note(self, step: Step) -> None:
        self._uses.note(step)

    def _readiness(self, layer: int, score: float) -> float:
        return -score * self._uses.scale[layer]


RULE = RuleEntry(
    "decayed", 30, "the one used least often lately",
    lambda layout, arena_bytes, usage: Decayed(layout, usage=usage),
)  # fmt: skip
