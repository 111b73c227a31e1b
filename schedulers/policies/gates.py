"""The gate weights that llama.cpp will make of what its router says of some experts, before it has made them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from moe_edge.models.calibration import GATES_NORMALISED, GATES_SOFTMAX

Array = npt.NDArray[np.float64]
SMALLEST = 6.103515625e-5  # llama.cpp divides by no smaller sum (llama-graph.cpp, build_moe_ffn)


def gate_weights(kind: int, scale: float, gates: Sequence[float]) -> list[float]:
    """Of one token's experts, by one of GATES_*; `gates` as in a Selection."""
    if kind == GATES_SOFTMAX:
        most = max(gates)
        powers = [math.exp(g - most) for g in gates]
        total = sum(powers) / scale
        return [p / total for p in powers]
    total = max(sum(gates), SMALLEST) / scale if kind == GATES_NORMALISED else 1.0 / scale
    return [g / total for g in gates]


def gate_weights_of(kind: int, scale: float, gates: Array) -> Array:
    """The same for rows [T, k]."""
    if kind == GATES_SOFTMAX:
        powers = np.exp(gates - gates.max(axis=1, keepdims=True))
        softmax: Array = scale * powers / powers.sum(axis=1, keepdims=True)
        return softmax
    if kind == GATES_NORMALISED:
        normalised: Array = scale * gates / np.maximum(gates.sum(axis=1, keepdims=True), SMALLEST)
        return normalised
    return scale * gates


def gate_ratio(kind: int, of: float, to: float) -> float:
    """How large the gate weight of one expert would be, as a share of another's, within 0 to 1."""
    if kind == GATES_SOFTMAX:
        return min(1.0, math.exp(min(0.0, of - to)))
    return min(1.0, max(0.0, of / to)) if to > 0 else 1.0
