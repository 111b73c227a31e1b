"""What types do to experts as far as an importance matrix tells: no tokens, only mean squares of columns' inputs.

For `down` the error of the output is the sum over its columns of mean square x squared change of the weights. For gate
and up, whose changes pass through the activation, a hidden unit is taken to change by as large a share of itself as
the row's product with its inputs does, and counts with its mean square and with what `down` makes of it. A layer's
errors count relative to the layer's output: without running the model nothing says how much the loss feels a layer.
Source: ours; of the mean squares, llama.cpp's imatrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from moe_edge.convert.type_damage import IntArray, Weights
from moe_edge.models.formats.floats import Float64Array, FloatArray


def weight_errors(
    reference: Weights, rows: Mapping[str, IntArray], candidates: Mapping[str, Mapping[int, FloatArray]],
    importance: Mapping[str, FloatArray],
) -> tuple[dict[str, dict[int, float]], float]:  # fmt: skip
    """(projection -> type id -> mean squared error of the expert's output for a token, mean square of the output).

    reference: one expert's weights. rows: of each projection those that the candidates are of. importance: projection
    -> mean squares of its columns' inputs.
    """
    hidden = importance["down"].astype(np.float64)
    reach = np.square(reference["down"], dtype=np.float64).sum(axis=0) * hidden  # [n_ff]
    energy = float(reach.sum())
    found: dict[str, dict[int, float]] = {}
    for projection, kinds in candidates.items():
        chosen = rows[projection]
        exact = reference[projection][chosen].astype(np.float64)
        squares = importance[projection].astype(np.float64)
        size = np.square(exact) @ squares
        if projection == "down":
            whole = float((np.square(reference["down"], dtype=np.float64) @ squares).sum())
        else:
            whole = energy * (2 if projection == "gate_up" else 1)
        found[projection] = {}
        for kind, weights in kinds.items():
            changed = np.square(weights - exact) @ squares
            weight = size if projection == "down" else reach[chosen % len(reach)]
            share = _weighted_share(changed, size, weight)
            found[projection][kind] = share * whole
    return found, energy


def _weighted_share(changed: Float64Array, size: Float64Array, weight: Float64Array) -> float:
    """Of rows' relative changes, the mean by weight."""
    relative = np.divide(changed, size, out=np.zeros_like(changed), where=size > 0)
    total = float(weight.sum())
    return float(relative @ weight) / total if total > 0 else 0.0
