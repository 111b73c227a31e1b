"""What a policy knows about the model: which units exist and how many bytes each takes in memory.

A unit is one expert of one MoE layer at one precision level; units are numbered layer by layer, expert by expert,
level by level, as in native/model.h. Levels are opaque indices, 0 is the highest precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SKIP = -1  # a level of a StepPlan: the expert is not computed, its output is zero


class ExpertKey(NamedTuple):
    """One expert: position among the MoE layers (not the block number), and index in the layer."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Layout:
    """n_experts: experts of each MoE layer. unit_bytes: resident bytes of each unit, in whole pages."""

    n_experts: tuple[int, ...]
    n_levels: int
    unit_bytes: tuple[int, ...]
    first_unit: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        starts = [0, *accumulate(n * self.n_levels for n in self.n_experts)]
        if starts[-1] != len(self.unit_bytes):
            raise ValueError(f"{len(self.unit_bytes)} unit sizes for {starts[-1]} units")
        object.__setattr__(self, "first_unit", tuple(starts[:-1]))

    @property
    def n_layers(self) -> int:
        return len(self.n_experts)

    def unit(self, key: ExpertKey, level: int = 0) -> int:
        return self.first_unit[key.layer] + key.expert * self.n_levels + level

    def layer_units(self, layer: int) -> range:
        start = self.first_unit[layer]
        return range(start, start + self.n_experts[layer] * self.n_levels)

    def largest_bytes(self, layer: int) -> int:
        """Bytes of the largest unit of one layer."""
        return max(self.unit_bytes[u] for u in self.layer_units(layer))

    @property
    def total_bytes(self) -> int:
        """All experts resident at the highest level."""
        return sum(self.unit_bytes[:: self.n_levels])


class Routing(NamedTuple):
    """The routing of each token of a micro-batch; views of buffers that are overwritten by the next step.

    experts: int32 [n_tokens, n_used]. weights: float32 [n_tokens, n_used], gate weights; equal shares where the model's
    graph does not show them. attention: float32 [n_tokens], attention received by each token in this layer (see
    native/attention.h), or None when it is not watched.
    """

    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    attention: npt.NDArray[np.float32] | None


class Ahead(NamedTuple):
    """What the router of a later layer says to this step's input.

    distance: 1 is the next MoE layer. experts: the most probable ones, best first. scores: their router probabilities
    over all experts of that layer, the mean over the step's tokens.
    """

    distance: int
    experts: Sequence[int]
    scores: Sequence[float]


AskAhead = Callable[[int], Sequence[Ahead]]


@dataclass(slots=True)
class Step:
    """One MoE layer of one micro-batch: what a policy is asked about.

    layer: position among the MoE layers. experts: distinct, ascending. counts: tokens of the micro-batch routed to
    each. weights: sum of the gate weights of those tokens; for one token its gate weights. squares: sum of their
    squares. routing: token by token, for micro-batches of more than one token and policies that want it.
    ask_ahead: what the routers of at most so many later layers predict, nearest first; None when look-ahead is off.
    Asking costs; valid until the step ends. later: set by a policy that wants its meanwhile() called for this step.
    """

    layer: int
    experts: Sequence[int]
    counts: Sequence[int]
    weights: Sequence[float] = ()
    squares: Sequence[float] = ()
    n_tokens: int = 1
    routing: Routing | None = None
    ask_ahead: AskAhead | None = None
    later: bool = False


class Selection(NamedTuple):
    """How one token's MoE layer is about to choose its experts: what a policy that selects is asked before the step.

    n_used: how many it chooses. order: all experts of the layer, best first by the model's own ranking. scores: what
    ranks them, in that order; -inf for those of a group that is left out. gates: what llama.cpp makes the gate weights
    of, in that order; zeros where the graph hides it.
    """

    layer: int
    n_used: int
    order: Sequence[int]
    scores: Sequence[float]
    gates: Sequence[float]


class Selections(NamedTuple):
    """The same for the T tokens of a micro-batch; views of buffers that are overwritten afterwards.

    order: int32 [T, n_expert], best first. scores, gates: float32 [T, n_expert], by expert; gates None where the graph
    hides them.
    """

    layer: int
    n_used: int
    order: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    gates: npt.NDArray[np.float32] | None = None


class Prefetch(NamedTuple):
    """A unit to read when the disk has nothing else to do; absent, and not one that the present step uses.

    victims: units to evict for it, none of this step's. One that is still being fetched is cancelled.
    """

    unit: int
    victims: Sequence[int]


class StepPlan(NamedTuple):
    """The answer for one MoE layer and micro-batch.

    order: permutation of the asked experts' positions, the order to fetch in. levels: precision level of each step, or
    SKIP. victims: for each step, the units to evict before its read starts. A victim may be an expert of an earlier
    step; the engine evicts it once it has been computed.
    """

    order: Sequence[int]
    levels: Sequence[int]
    victims: Sequence[Sequence[int]]
