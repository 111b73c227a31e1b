"""How good a trace's look-ahead is: how many of the experts that a layer used were predicted some layers before, and
how many of the predicted ones were used. What a look-ahead rule makes of the predictions is simulated by simulate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.replay.trace import Trace

Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Quality:
    """The `width` best experts predicted for the layer `distance` further on, over all tokens and layers.

    steps: token-layers that a prediction was made for; others are not counted. recall: share of the experts used there
    that were predicted. precision: share of the predicted ones that were used. miss_recall: recall over the uses that
    missed, one for each set of misses; None without a miss.
    """

    distance: int
    width: int
    steps: int
    recall: float
    precision: float
    miss_recall: tuple[float | None, ...] = ()


def prediction_widths(trace: Trace) -> list[int]:
    """Top-k, one and a half of it, and two, as far as the trace goes; none without look-ahead scores."""
    if trace.ahead_experts is None:
        return []
    k, known = trace.n_used, int(trace.ahead_experts.shape[3])
    return list(dict.fromkeys(min(width, known) for width in (k, -(-3 * k // 2), 2 * k)))


def prediction_quality(trace: Trace, misses: Sequence[Bools] = ()) -> list[Quality]:
    """Recall and precision for every distance that the trace has, at the widths of prediction_widths().

    misses: each [T, L, k], the uses that missed, as missed_uses() gives them. Empty for a trace without scores.
    """
    depth = 0 if trace.ahead_experts is None else int(trace.ahead_experts.shape[2])
    found = [_quality(trace, d, width, misses) for d in range(1, depth + 1) for width in prediction_widths(trace)]
    return [quality for quality in found if quality.steps]


def _quality(trace: Trace, distance: int, width: int, misses: Sequence[Bools]) -> Quality:
    assert trace.ahead_experts is not None
    steps = used = predicted = right = 0
    alone = np.repeat(trace.batch_tokens == 1, trace.batch_tokens)  # others were predicted for all tokens together
    missed, foreseen = [0] * len(misses), [0] * len(misses)
    for there in range(distance, trace.n_layers):
        guesses, chosen = trace.ahead_experts[:, there - distance, distance - 1, :width], trace.experts[:, there]
        valid: Any = (guesses >= 0) & (guesses < trace.n_experts[there])
        rows = np.flatnonzero(alone & valid.any(-1) & (chosen >= 0).all(-1))
        same: Any = (guesses[rows, :, None] == chosen[rows, None, :]) & valid[rows, :, None]
        hit = same.any(1)
        steps, used, predicted = steps + len(rows), used + hit.size, predicted + int(valid[rows].sum())
        right += int(hit.sum())
        for i, miss in enumerate(misses):
            of_layer = miss[rows, there]
            missed[i] += int(of_layer.sum())
            foreseen[i] += int((hit & of_layer).sum())
    of_misses = tuple(f / m if m else None for f, m in zip(foreseen, missed, strict=True))
    return Quality(distance, width, steps, right / max(1, used), right / max(1, predicted), of_misses)


def missed_uses(trace: Trace, cache: str, arena_bytes: int) -> Bools:
    """[T, L, k]: the uses of `experts` that are not in memory when their step begins, in steps of one token.

    Under the exact policy without look-ahead, from an empty arena; cache: a name of schedulers.eviction.RULES.
    Raises BudgetTooSmall.
    """
    layout = trace.layout()
    policy = ExactLru(layout, arena_bytes)
    policy.use_cache(cache)
    first_unit, n_levels, wide = layout.first_unit, layout.n_levels, max(layout.n_experts)
    ends = np.cumsum(trace.batch_tokens).tolist()
    missed: list[int] = []
    for batch, step in trace.steps():
        if step.n_tokens == 1:
            at, first = ((ends[batch] - 1) * trace.n_layers + step.layer) * wide, first_unit[step.layer]
            missed += [at + expert for expert in step.experts if first + expert * n_levels not in policy.cache]
        policy.plan(step)
        if step.later:
            policy.meanwhile(step)
    places = np.arange(trace.n_tokens * trace.n_layers).reshape(trace.n_tokens, trace.n_layers, 1) * wide
    uses: Any = places + trace.experts
    return np.isin(uses, np.array(missed, np.int64)) & (trace.experts >= 0)
