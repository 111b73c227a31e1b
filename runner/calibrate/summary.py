"""What a calibration saw and measured, summed up as the policies will use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
from moe_edge.convert.conversion_plan import ConvertPlan
from moe_edge.convert.type_damage import ExpertErrors
from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.store.source import Source
from moe_edge.models.store.store import HIGH_NAME, LOW_NAME
from moe_edge.runner.calibrate.observe import LayerView, Observed

QUANTILES = np.linspace(0, 1, 101)


def planned_types(plan: ConvertPlan) -> dict[tuple[int, int, str, str], int]:
    """(layer number, expert, projection, level) -> type of the store's tensor."""
    found = {}
    for each in plan.experts:  # blk.3.ffn_up_exps.7.low.weight
        _, layer, name, expert, *level = each.name.split(".")
        projection = name.removeprefix("ffn_").removesuffix("_exps")
        found[int(layer), int(expert), projection, LOW_NAME if level[0] == LOW_NAME else HIGH_NAME] = each.type
    return found


def calibration_of(
    source: Source, seen: Observed, plan: ConvertPlan, levels: Mapping[tuple[int, int], ExpertErrors]
) -> Calibration:
    n_layers, n_experts = len(source.layers), max(layer.n_expert for layer in source.layers)
    counts = np.zeros((n_layers, n_experts), np.int64)
    gates, squares = np.zeros((n_layers, n_experts)), np.zeros((n_layers, n_experts))
    error = np.zeros((n_layers, n_experts, len(plan.levels) + 1))
    for i, (layer, view) in enumerate(zip(source.layers, seen.layers, strict=True)):
        chosen, g = view.experts.ravel(), view.weights.ravel().astype(np.float64)
        counts[i] = np.bincount(chosen, minlength=n_experts)
        gates[i] = np.bincount(chosen, g, n_experts) / np.maximum(1, counts[i])
        squares[i] = np.bincount(chosen, g * g, n_experts)
        for expert in range(layer.n_expert):
            found = levels[layer.layer, expert]
            error[i, expert] = [*found.joint, found.removed]
    plain = Calibration(
        text_sha256=seen.text_sha256, n_tokens=seen.n_tokens, levels=plan.levels, counts=counts, mean_gate=gates,
        squares=squares, sensitivity=seen.sensitivity, error=error, cumulated=cumulated_quantiles(seen.layers),
        use_damage=np.zeros((n_layers, len(QUANTILES))),
    )  # fmt: skip
    unit = plain.unit_damage(1 if len(plan.levels) > 1 else -1)
    damage = [np.square(v.weights.astype(np.float64)) * unit[i][v.experts] for i, v in enumerate(seen.layers)]
    return replace(plain, use_damage=np.stack([np.quantile(d, QUANTILES) for d in damage]))


def cumulated_quantiles(layers: Sequence[LayerView]) -> Float64Array:
    """[101]: quantiles over all uses of the share of the token's gate weight that larger ones have: HOBBIT's s(e_i)."""
    shares = []
    for view in layers:
        g = -np.sort(-view.weights.astype(np.float64), axis=1)
        before = np.cumsum(g, axis=1) - g
        shares.append((before / np.maximum(g.sum(axis=1, keepdims=True), 1e-30)).ravel())
    quantiles: Float64Array = np.quantile(np.concatenate(shares), QUANTILES)
    return quantiles


def settings_text(rows: Sequence[Setting]) -> str:
    """Rows of settings as a text to keep."""
    return json.dumps([asdict(row) for row in rows])


def settings_from(text: str | None) -> tuple[Setting, ...] | None:
    """The rows that a journal keeps; None where there are none."""
    try:
        return tuple(Setting(**row) for row in json.loads(text or ""))
    except (ValueError, TypeError):
        return None
