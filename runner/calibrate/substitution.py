"""What it costs to replace an expert by one that the router ranks lower: arithmetic on a sample of tokens.

Source: ours. The error of a type is squared output difference (GEMQ, PAPERS.md, section 5); so is this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
from moe_edge.models.calibration import GATES_SOFTMAX, GATES_UNKNOWN, Substitution
from moe_edge.models.formats.floats import Float64Array, FloatArray
from moe_edge.models.store.calibration_keys import SUBSTITUTION_BINS
from moe_edge.schedulers.layout import Layout, Selection, Selections
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policies.gates import gate_weights_of
from moe_edge.schedulers.policies.levels import IntArray

SAMPLED = 512  # tokens of each layer
RANKS = 2  # times the experts of a token: how far down the ranking replacements are looked for

Outputs = Callable[[int, int, FloatArray], FloatArray]  # (layer position, expert, inputs [n, n_embd]) -> [n, n_embd]


@dataclass(frozen=True)
class Ranking:
    """Some tokens of one layer: rows [T] among its inputs, their best R experts and the gates of those, best first."""

    n_used: int
    rows: npt.NDArray[np.int64]
    experts: IntArray
    gates: Float64Array


@dataclass
class _Rows:
    seen: int = 0
    n_used: int = 0
    rows: list[int] = field(default_factory=list)
    experts: list[list[int]] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)


class WatchRanking(ExactLru):
    """Exact, and keeps the rankings of every `stride`-th token of each layer."""

    selects = True

    def __init__(self, layout: Layout, arena_bytes: int, stride: int, n_seen: int = 0) -> None:
        """n_seen: tokens of each layer that were seen before."""
        super().__init__(layout, arena_bytes)
        self._stride = stride
        self._rows = [_Rows(n_seen) for _ in range(layout.n_layers)]

    def select(self, selection: Selection) -> None:
        self._keep(selection.layer, selection.n_used, 1, lambda _: (list(selection.order), list(selection.gates)))

    def select_many(self, selections: Selections) -> None:
        order, gates = selections.order, selections.gates
        if gates is None:
            return

        def row(t: int) -> tuple[list[int], list[float]]:
            return order[t].tolist(), gates[t][order[t]].tolist()

        self._keep(selections.layer, selections.n_used, len(order), row)

    def _keep(
        self, layer: int, n_used: int, n_tokens: int, row: Callable[[int], tuple[list[int], list[float]]]
    ) -> None:
        kept = self._rows[layer]
        kept.n_used = n_used
        for t in range(-kept.seen % self._stride, n_tokens, self._stride):
            experts, gates = row(t)
            kept.rows.append(kept.seen + t)
            kept.experts.append(experts[: RANKS * n_used])
            kept.gates.append(gates[: RANKS * n_used])
        kept.seen += n_tokens

    def taken(self) -> tuple[Ranking, ...]:
        """The rankings since this was last asked."""
        found = self.rankings()
        for kept in self._rows:
            kept.rows, kept.experts, kept.gates = [], [], []
        return found

    def rankings(self) -> tuple[Ranking, ...]:
        """Of each layer by position; with no rows where the graph hides the gates."""
        return tuple(
            Ranking(
                max(1, r.n_used), np.array(r.rows, np.int64),
                np.array(r.experts, np.int32).reshape(len(r.rows), RANKS * max(1, r.n_used) if not r.rows else -1),
                np.array(r.gates, np.float64).reshape(len(r.rows), RANKS * max(1, r.n_used) if not r.rows else -1),
            )
            for r in self._rows
        )  # fmt: skip


def measure_substitution(
    rankings: Sequence[Ranking], inputs: Callable[[int], npt.NDArray[np.float16]], outputs: Outputs,
    gating: Sequence[tuple[int, float]],
    kept: Callable[[int, Callable[[], Float64Array]], Float64Array] = lambda _, find: find(),
) -> Substitution | None:  # fmt: skip
    """inputs: layer position -> [n, n_embd], what its experts multiplied. gating: GATES_* and factor of each layer.
    kept: (layer position, what finds its factors) -> those, found now or before.

    None when a layer's gate weights come about in a way that is not known, or has no experts besides those in use.
    """
    for ranking, (kind, _) in zip(rankings, gating, strict=True):
        if kind == GATES_UNKNOWN or not len(ranking.rows) or ranking.experts.shape[1] <= ranking.n_used:
            return None

    def find(layer: int) -> Float64Array:
        ranking, (kind, scale) = rankings[layer], gating[layer]
        x = inputs(layer)[ranking.rows].astype(np.float32)
        y = np.zeros((*ranking.experts.shape, x.shape[1]), np.float32)
        for expert in np.unique(ranking.experts).tolist():
            tokens, ranks = np.nonzero(ranking.experts == expert)
            y[tokens, ranks] = outputs(layer, expert, x[tokens])
        return _factors(ranking, y, kind, scale)

    factors = [kept(layer, partial(find, layer)) for layer in range(len(rankings))]
    kinds, scales = zip(*gating, strict=True)
    return Substitution(np.stack(factors), np.array(kinds, np.int64), np.array(scales))


def _factors(ranking: Ranking, y: FloatArray, kind: int, scale: float) -> Float64Array:
    """[SUBSTITUTION_BINS]: see Substitution.factor. A bin that no pair falls into takes its neighbours' values."""
    k, gates = ranking.n_used, ranking.gates
    changed, whole = np.zeros(SUBSTITUTION_BINS), np.zeros(SUBSTITUTION_BINS)
    weights = gate_weights_of(kind, scale, gates[:, :k])
    sizes = np.square(y, dtype=np.float64).sum(axis=2)
    for rank in range(k):
        for other in range(k, gates.shape[1]):
            taken = gates[:, :k].copy()
            taken[:, rank] = gates[:, other]
            new = gate_weights_of(kind, scale, taken)
            difference = np.einsum("tk,tkd->td", new - weights, y[:, :k], optimize=True)
            difference += new[:, rank, None] * (y[:, other] - y[:, rank])
            bins = _bins(kind, gates[:, other], gates[:, rank])
            np.add.at(changed, bins, np.square(difference).sum(axis=1))
            np.add.at(whole, bins, np.square(weights[:, rank]) * sizes[:, rank])
    known = whole > 0
    middle = np.arange(SUBSTITUTION_BINS)
    filled: Float64Array = np.interp(middle, middle[known], changed[known] / whole[known])
    return filled


def _bins(kind: int, of: Float64Array, to: Float64Array) -> npt.NDArray[np.int64]:
    """Which bin the ratio of two gates falls into (schedulers.policies.gates.gate_ratio)."""
    if kind == GATES_SOFTMAX:
        ratio = np.exp(np.minimum(0.0, of - to))
    else:
        ratio = np.divide(of, to, out=np.ones_like(of), where=to > 0)
    found: npt.NDArray[np.int64] = (np.clip(ratio, 0.0, 1.0) * SUBSTITUTION_BINS).astype(np.int64)
    return np.minimum(found, SUBSTITUTION_BINS - 1)
