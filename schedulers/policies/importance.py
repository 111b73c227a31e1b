"""Which experts of a step matter most: gate weight, calibrated damage, or the tokens that attention goes to.

Plain lists in decode, where a step has a few experts and every microsecond is paid once for each layer and token;
numpy only for the heavy hitters of prefill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from moe_edge.schedulers.layout import Step

Table = Sequence[Sequence[float]]  # [L][E]


def gate_mass(step: Step) -> Sequence[float]:
    """Sum of the gate weights over the tokens, for each expert; the tokens' count where the step has no weights.

    For one token, its gate weights. Source: DyMoE's decode rule (PAPERS.md, section 1); HOBBIT measured a correlation
    of 0.99 with the norm of the expert's weighted output (Mixtral).
    """
    return step.weights or step.counts


def expected_damage(step: Step, unit_damage: Table) -> Sequence[float]:
    """Nats expected from not using the high level, for each expert: sum of g^2 times the expert's own table.

    unit_damage: [L][E] nats for gate weight 1 (Calibration.unit_damage) at the level that would replace the high one.
    Ours, after GEMQ (PAPERS.md, section 5).
    """
    of_layer = unit_damage[step.layer]
    return [q * of_layer[e] for q, e in zip(step.squares, step.experts, strict=True)]


def heavy_hitters(step: Step, heavy_share: float) -> Sequence[float]:
    """Number of heavy-hitter tokens routed to each expert, plus a fraction below 1 that breaks ties by gate mass.

    The heavy hitters are the ceil(heavy_share * n_tokens) tokens that received the most attention, ties to the earlier
    token. Without attention (a micro-batch too small to be watched): the gate mass.
    Source: DyMoE counts heavy hitters per expert; the attention sum is ours (PAPERS.md, section 1).
    """
    mass = gate_mass(step)
    if step.routing is None or step.routing.attention is None:
        return mass
    attention = step.routing.attention
    n_heavy = max(1, math.ceil(heavy_share * len(attention) - 1e-9))  # 0.07 * 100 is 7.000000000000001
    heavy = np.argsort(-attention, kind="stable")[:n_heavy]
    counts = np.bincount(step.routing.experts[heavy].ravel(), minlength=max(step.experts) + 1).tolist()
    scale = 1.0 / (sum(mass) + 1.0)
    return [counts[e] + m * scale for e, m in zip(step.experts, mass, strict=True)]


def most_important(importance: Sequence[float], n: int) -> list[int]:
    """Positions of the n largest, largest first; ties to the lower position."""
    return sorted(range(len(importance)), key=importance.__getitem__, reverse=True)[:n]
