"""`convert --allocate imatrix`: types chosen by an importance matrix alone, in minutes where a calibration takes hours.

The model is not run, so nothing is known of gate weights, of how much the loss feels a layer, or of what policies may
do: the store has no calibration. How much worse the choice is: docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.imatrix import fill_unused, read_imatrix
from moe_edge.convert.imatrix_damage import weight_errors
from moe_edge.convert.quantize import prepare, target_type
from moe_edge.models.errors import BadFile
from moe_edge.models.store.experts import MoELayer
from moe_edge.runner.calibrate.calibrate import DEFAULT_TYPES
from moe_edge.runner.calibrate.choose_types import check_bits, choices_of
from moe_edge.runner.calibrate.expert_weights import ExpertWeights
from moe_edge.runner.calibrate.forecast import Forecast

Found = tuple[dict[str, dict[int, float]], float]


def types_by_imatrix(
    source_path: Path, imatrix_path: Path, types: ExpertTypes, names: Sequence[str] | None, *, bits: float | None,
    low_bits: float | None, core_hours: float, n_threads: int = 0, tell: Callable[[str], None] = lambda _: None,
) -> ExpertTypes:  # fmt: skip
    """`types` with a type for each expert's projection at the levels that have bits.

    names: of the types to choose from. Raises UsageError for bits that they cannot make, BadFile for a matrix of
    another model or without some layer's experts.
    """
    source, names = open_source(source_path), tuple(names or DEFAULT_TYPES)
    wanted = [each for each in (bits, low_bits) if each is not None]
    for each in wanted:
        check_bits(source, names, each)
    imatrix = read_imatrix(imatrix_path)
    importance = fill_unused(imatrix.expert_importance(source.layers), source.layers)
    for layer in source.layers:
        for p in layer.projections:
            if (layer.layer, 0, p) not in importance:
                raise BadFile(
                    f"{imatrix_path}: has nothing of the experts' {p} in layer {layer.layer}; make it on more text, "
                    "or calibrate: --calibrate TEXT"
                )
    counts = [row[: layer.n_expert] for row, layer in
              zip(imatrix.routing_counts(source.layers), source.layers, strict=True)]  # fmt: skip
    kinds = [target_type(name, with_imatrix=True).id for name in names]
    prepare(set(kinds))
    found: list[list[Found]] = []
    forecast = Forecast()
    forecast.plan("experts", sum(layer.n_expert for layer in source.layers))
    forecast.is_known = True

    def work(weights: ExpertWeights, layer: MoELayer, expert: int) -> Found:
        mine = {p: importance[layer.layer, expert, p] for p in layer.projections}
        reference, rows, candidates = weights.tried(layer, expert, dict.fromkeys(layer.projections, kinds), mine)
        return weight_errors(reference, rows, candidates, mine)

    with ExpertWeights(source, n_threads) as weights:
        for layer in source.layers:
            found.append(list(weights.map(work, layer)))
            forecast.step("experts", layer.n_expert)
            tell(f"errors by the importance matrix: block {layer.layer}, {len(kinds)} types{forecast.suffix()}")
    uses = [np.maximum(1, row) for row in counts]  # an expert the text never used may be used by another
    energy = [
        sum(float(n) * each[1] for n, each in zip(row, some, strict=True))
        for row, some in zip(uses, found, strict=True)
    ]

    def cost_of(position: int, expert: int, projection: str, kind: int) -> float:
        mine = found[position][expert][0][projection][kind] * float(uses[position][expert])
        return mine / max(energy[position], 1e-300)

    chosen, note = choices_of(source, source.layers, names, cost_of, uses).choose_in_time(wanted, core_hours * 3600)
    if note:
        tell(note)
    levels = iter(chosen)
    if bits is not None:
        types = replace(types, homes=next(levels))
    return replace(types, low_homes=next(levels)) if low_bits is not None else types
