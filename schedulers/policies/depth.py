"""How the share of experts at the high level falls with depth: r(l), [L], each in [0, 1], with a given mean.

Layers are positions among the MoE layers and weigh the same: each has the same number of expert uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from moe_edge.models.calibration import Calibration

DEPTHS = ("auto", "cosine", "calibrated", "flat")

_PERCENT = np.linspace(0.0, 1.0, 101)


def depth_schedule(kind: str, retention: float, n_layers: int, calibration: Calibration | None) -> tuple[float, ...]:
    """r(l) by one of DEPTHS; 'auto' is calibrated where there is a calibration, else cosine.

    Retention 1 gives exactly 1 everywhere, 0 exactly 0. 'calibrated' needs a calibration.
    """
    if kind == "flat" or n_layers == 1 or retention in (0.0, 1.0):
        return (float(retention),) * n_layers
    if kind == "calibrated" or (kind == "auto" and calibration):
        assert calibration is not None, "make_policy refuses 'calibrated' without one"
        return calibrated(retention, calibration)
    return cosine(retention, n_layers)


def cosine(retention: float, n_layers: int) -> tuple[float, ...]:
    """From shallow to deep along half a cosine, which sums to nothing over the layers, so the mean is the retention.

    From 1 down to 2 * retention - 1. Below a retention of 0.5, where that would be negative, from 2 * retention down to
    0; the two agree at 0.5. Source: the shape is DyMoE's, both forms are ours (PAPERS.md, section 1).
    """
    swing = min(retention, 1.0 - retention)
    shares = (retention + swing * math.cos(math.pi * layer / (n_layers - 1)) for layer in range(n_layers))
    return tuple(min(1.0, max(0.0, r)) for r in shares)


def calibrated(retention: float, calibration: Calibration) -> tuple[float, ...]:
    """Per layer, the share of uses whose damage is above one threshold; the threshold that gives the mean.

    The threshold is bisected. Where many uses have the very same damage no threshold gives the mean; the shares just
    above and just below it are then mixed. The damage is the low level's where the store has one, even if the rest is
    to be skipped: that is what the calibration keeps of each use.
    Ours, after GEMQ's one loss scale for all layers (PAPERS.md, section 5).
    """

    def above(threshold: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([1.0 - np.interp(threshold, row, _PERCENT) for row in calibration.use_damage])

    highest = float(np.max(calibration.use_damage))
    under, over = -1.0, highest  # damage is not negative: everything is above -1, nothing above the highest
    for _ in range(200):
        middle = (under + over) / 2
        if middle in (under, over):
            break
        if above(middle).mean() >= retention:
            under = middle
        else:
            over = middle
    more, fewer = above(under), above(over)
    spread = more.mean() - fewer.mean()
    share = (retention - fewer.mean()) / spread if spread > 0 else 0.0
    return tuple(float(r) for r in np.clip(fewer + share * (more - fewer), 0.0, 1.0))


def at_least_one(shares: Sequence[float], n: int) -> tuple[float, ...]:
    """The shares with none below one expert of n (HOBBIT's guard: a token without any expert loses the layer).

    What that gives too much is taken evenly from the other layers, so the mean stays where 1/n allows it.
    """
    least, mean = 1.0 / n, sum(shares) / len(shares)
    if min(shares) >= least:
        return tuple(shares)
    if mean <= least:
        return (least,) * len(shares)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        shifted = [max(least, s - middle) for s in shares]
        low, high = (middle, high) if sum(shifted) / len(shifted) > mean else (low, middle)
    return tuple(max(least, s - high) for s in shares)
