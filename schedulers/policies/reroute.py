"""Cache-conditional routing: among experts that the router ranks nearly equal, take the one that is in memory.

Only the selection changes. llama.cpp gives the experts that were chosen the gate weights it would give them anyway.
Source: Cache-Prior (2412.00099; PAPERS.md, section 7): score + lambda * range * (in memory), the true top J stay.
Which experts are left alone in a prompt, and the token's own range as an alternative, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.options import Knob, PolicyOptions
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.levels import HIGH, IntArray, LevelPolicy

STRENGTH = Knob(
    "strength", 0.05, "how much being in memory counts, as a share of the range of the router's scores; 0: nothing",
    is_what="a share of the range of the router's scores; give a number from 0 up",
)  # fmt: skip
KEEP_TOP = Knob(
    "keep_top", 1, "how many of each token's best experts always stay",
    is_what="a number of experts; give 0 or more",
)  # fmt: skip
SCORE_RANGE = Knob(
    "score_range", "mean", "the range: mean (over the layer's tokens so far, as in the paper), token (the token's own)",
    choices=("mean", "token"), label="score range",
)  # fmt: skip
FEW_TOKENS = Knob(
    "few_tokens", 2, "in a prompt, experts that at most so many tokens would read may be replaced",
    is_what="a number of tokens; give 0 or more",
)  # fmt: skip


class RunningMean:
    """The mean of all that was noted, for each layer."""

    def __init__(self, n_layers: int) -> None:
        self._sums, self._counts = [0.0] * n_layers, [0] * n_layers

    def note(self, layer: int, total: float, count: int = 1) -> float:
        """Add `count` values that sum to `total`; the mean, these included."""
        self._sums[layer] += total
        self._counts[layer] += count
        return self._sums[layer] / self._counts[layer]


def boosted_choice(
    order: Sequence[int], scores: Sequence[float], n_used: int, keep_top: int, boost: float,
    available: Callable[[int], bool],
) -> list[int] | None:  # fmt: skip
    """The n_used experts with the largest score + boost * available; None when they are the model's own choice.

    order: experts, best first; scores: in that order. The best keep_top stay. Ties go to the model's choice.
    """
    absent = [rank for rank in range(keep_top, n_used) if not available(order[rank])]
    if not absent or boost <= 0:
        return None
    chosen = list(order[:n_used])
    rank, replaced = n_used, False
    for worst in reversed(absent):
        least = scores[worst] - boost
        while rank < len(order) and not available(order[rank]):
            rank += 1
        # the next best that is at hand; -inf, an expert of a group that is left out, is never above
        if rank >= len(order) or not scores[rank] > least:
            break
        chosen[worst] = order[rank]
        replaced = True
        rank += 1
    return chosen if replaced else None


class Reroute(LevelPolicy):
    """Everything at the high level, but of other experts where that saves a read. Made by make_policy.

    In a micro-batch of several tokens an expert is at hand when it is in memory or will be read anyway: because more
    than `few_tokens` tokens chose it, or one of them among its best `keep_top`.
    """

    name = "reroute"
    wants_routing = wants_attention = False

    def __init__(
        self, layout: Layout, arena_bytes: int, options: PolicyOptions, calibration: Calibration | None = None
    ) -> None:
        super().__init__(layout, arena_bytes)
        self.selects = options[STRENGTH] > 0
        self._strength, self._keep_top = options[STRENGTH], int(options[KEEP_TOP])
        self._mean = RunningMean(layout.n_layers) if options[SCORE_RANGE] == "mean" else None
        self._few_tokens = int(options[FEW_TOKENS])

    def select(self, selection: Selection) -> Sequence[int] | None:
        layer, n_used, order, scores, _ = selection
        span = scores[0] - _last_finite(scores)
        if self._mean is not None:
            span = self._mean.note(layer, span)
        first, n_levels, cache = self._layout.first_unit[layer], self._layout.n_levels, self.cache
        return boosted_choice(
            order, scores, n_used, self._keep_top, self._strength * span,
            lambda expert: first + expert * n_levels in cache,
        )  # fmt: skip

    def select_many(self, selections: Selections) -> IntArray | None:
        layer, n_used, order, scores, _ = selections
        finite = np.where(np.isfinite(scores), scores, np.inf).min(axis=1)
        spans = scores.max(axis=1) - finite
        if self._mean is not None:
            spans = np.full_like(spans, self._mean.note(layer, float(spans.sum(dtype=np.float64)), len(spans)))
        at_hand = self._at_hand(layer, n_used, order)
        own = order[:, :n_used]
        rows = np.nonzero(~at_hand[own[:, self._keep_top :]].all(axis=1))[0]
        if not len(rows):
            return None
        chosen: IntArray = own.copy()
        available = at_hand.tolist().__getitem__
        for row in rows.tolist():
            ranked = order[row]
            found = boosted_choice(
                ranked.tolist(), scores[row][ranked].tolist(), n_used, self._keep_top,
                self._strength * float(spans[row]), available,
            )  # fmt: skip
            if found is not None:
                chosen[row] = found
        return chosen

    def _at_hand(self, layer: int, n_used: int, order: IntArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """[n_expert]: in memory, or read for this micro-batch whatever is chosen."""
        n, n_levels, first = self._layout.n_experts[layer], self._layout.n_levels, self._layout.first_unit[layer]
        at_hand = np.array([first + expert * n_levels in self.cache for expert in range(n)])
        at_hand |= np.bincount(order[:, :n_used].ravel(), minlength=n) > self._few_tokens
        at_hand[order[:, : min(self._keep_top, n_used)].ravel()] = True
        return at_hand

    def plan(self, step: Step) -> StepPlan | None:
        self.stats.wanted_high += len(step.experts)
        if self._all_high(step):
            return None
        return self.serve(step, [HIGH] * len(step.experts))

    def wishes(self, step: Step) -> list[int]:
        """Of experts that are only predicted, the best keep_top alone are worth a read: others may be replaced."""
        if not self.selects or step.n_tokens > 1:
            return [HIGH] * len(step.experts)
        kept = sorted(range(len(step.experts)), key=lambda i: -step.weights[i])[: max(1, self._keep_top)]
        return [HIGH if i in kept else SKIP for i in range(len(step.experts))]


def _last_finite(scores: Sequence[float]) -> float:
    """The smallest score of a falling list that is not -inf."""
    return next((score for score in reversed(scores) if score > -np.inf), scores[0])


def _check(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    for knob in (KEEP_TOP, FEW_TOKENS):
        if options[knob] != int(options[knob]):
            raise UsageError(f"{knob.option} {options[knob]:g} is not a whole number")


def _describe(options: PolicyOptions, calibration: Calibration | None) -> str:
    return (
        f"reroute, strength {options[STRENGTH]:g} of the {options[SCORE_RANGE]} score range, "
        f"the best {options[KEEP_TOP]:g} stay"
    )


def _selects(options: PolicyOptions, calibration: Calibration | None) -> bool:
    return bool(options[STRENGTH] > 0)


def history_warning(options: PolicyOptions, calibration: Calibration | None) -> str:
    """What must be said of a policy that chooses by what is in memory."""
    return (
        "the reply depends on what was in memory before; the same seed, prompt and empty cache give the same text, "
        "unless --lookahead auto, which goes by the clock, is on"
    )


POLICY = PolicyEntry(
    "reroute", 40, "among nearly equal experts, one in memory is chosen (after Cache-Prior)", Reroute,
    knobs=(STRENGTH, KEEP_TOP, SCORE_RANGE, FEW_TOKENS), check=_check, describe=_describe, selects=_selects,
    warning=history_warning,
)  # fmt: skip
