"""Which expert gets which type: what was measured of experts, or an importance matrix says, put to the allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from moe_edge.convert.allocate import (
    Allocation,
    allocate_by_frequency,
    allocate_by_layer,
    allocate_global,
    allocate_uniform,
)
from moe_edge.convert.quantize import fitting_type, target_type
from moe_edge.convert.quantizing_time import Wanted, allocate_in_time, quantizing_seconds
from moe_edge.convert.type_damage import ExpertErrors
from moe_edge.models.errors import UsageError
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.ggml_types import tensor_bytes, type_name
from moe_edge.models.store.experts import MatrixKey, MoELayer
from moe_edge.models.store.source import Source

IntArray = npt.NDArray[np.int64]
Errors = Mapping[tuple[int, int], ExpertErrors]  # (layer number, expert) -> errors of types for each projection alone


@dataclass(frozen=True)
class Choices:
    """One item for each expert's projection: keys, layers' positions and uses [n_items]; the rest [n_items, n_types].

    kinds: the types' ids. cost: nats, or what stands for them. seconds: nominal, of quantizing.
    """

    keys: tuple[MatrixKey, ...]
    kinds: tuple[int, ...]
    cost: Float64Array
    bytes: IntArray
    seconds: Float64Array
    layer_of: IntArray
    counts: IntArray
    n_weights: int

    def budget(self, bits: float) -> int:
        """Bytes that so many bits a weight make. Raises UsageError when the types cannot make them."""
        wanted, least = int(bits * self.n_weights / 8), int(self.bytes.min(axis=1).sum())
        if wanted < least:
            names = ", ".join(type_name(kind) for kind in self.kinds)
            raise UsageError(
                f"--bits {bits:g}: the types {names} need at least {8 * least / self.n_weights:.4g} bits a weight"
            )
        return wanted

    def wanted(self, bits: float) -> Wanted:
        return Wanted(self.cost, self.bytes, self.seconds, self.budget(bits))

    def by_key(self, made: Allocation) -> dict[MatrixKey, int]:
        return {key: self.kinds[choice] for key, choice in zip(self.keys, made.choice.tolist(), strict=True)}

    def choose(self, bits: float, how: str) -> dict[MatrixKey, int]:
        """how: `global` is the product's; `layer`, `frequency` and `uniform` are there to be compared with."""
        budget = self.budget(bits)
        return self.by_key(allocations(self.cost, self.bytes, budget, self.layer_of, self.counts)[how]())

    def choose_in_time(
        self, bits: Sequence[float], most_seconds: float
    ) -> tuple[tuple[dict[MatrixKey, int], ...], str | None]:
        """The types of each level, and what to say when the best would take longer than most_seconds to quantize."""
        levels = [self.wanted(each) for each in bits]
        made, priced = allocate_in_time(levels, most_seconds)
        note = None
        if priced:
            best = [allocate_global(each.cost, each.bytes, each.budget_bytes) for each in levels]
            hours = [
                sum(level.seconds_of(found) for level, found in zip(levels, some, strict=True)) / 3600
                for some in (best, made)
            ]
            more = ", ".join(
                f"{100 * (found.cost / max(least.cost, 1e-300) - 1):.0f} %"
                for found, least in zip(made, best, strict=True)
            )
            note = (
                f"types: the best take {hours[0]:.1f} core-hours to quantize; chosen are some of {hours[1]:.1f}, "
                f"with {more} more expected damage (--core-hours)"
            )
        return tuple(self.by_key(found) for found in made), note


def choices_of(
    source: Source, layers: Sequence[MoELayer], types: Sequence[str], cost_of: Callable[[int, int, str, int], float],
    counts: Sequence[IntArray],
) -> Choices:  # fmt: skip
    """cost_of: (layer position, expert, projection, type) -> cost. counts: by layer position, uses of each expert."""
    kinds = tuple(target_type(name, with_imatrix=True).id for name in types)
    keys: list[MatrixKey] = []
    rows: list[tuple[list[float], list[int], list[float]]] = []
    layer_of, uses = [], []
    n_weights = 0
    for position, layer in enumerate(layers):
        for expert in range(layer.n_expert):
            for projection in layer.projections:
                shape = layer.shape(projection)
                fitting = [fitting_type(kind, shape[0]) for kind in kinds]
                key = (layer.layer, expert, projection)
                has = source.experts[key].type
                weights = shape[0] * shape[1]
                keys.append(key)
                rows.append((
                    [cost_of(position, expert, projection, kind) for kind in kinds],
                    [tensor_bytes(kind, shape) for kind in fitting],
                    [0.0 if kind == has else quantizing_seconds(kind, weights) for kind in fitting],
                ))  # fmt: skip
                layer_of.append(position)
                uses.append(int(counts[position][expert]))
                n_weights += weights
    cost, sizes, seconds = zip(*rows, strict=True)
    return Choices(
        tuple(keys), kinds, np.array(cost), np.array(sizes, np.int64), np.array(seconds), np.array(layer_of),
        np.array(uses), n_weights,
    )  # fmt: skip


def measured_choices(
    source: Source, sensitivity: Float64Array, errors: Errors, types: Sequence[str], counts: Sequence[IntArray],
) -> Choices:  # fmt: skip
    """Costs are nats: measured errors times the layer's weight."""
    kinds = [target_type(name, with_imatrix=True).id for name in types]
    once = [
        cost_of_one_use(layer, used, errors, kinds) for layer, used in zip(source.layers, counts, strict=True)
    ]  # fmt: skip

    def cost_of(position: int, expert: int, projection: str, kind: int) -> float:
        found = once[position][projection]
        if counts[position][expert]:
            found = errors[source.layers[position].layer, expert].single[projection]
        return found[kind] * float(sensitivity[position])

    return choices_of(source, source.layers, types, cost_of, counts)


def cost_of_one_use(
    layer: MoELayer, used: IntArray, errors: Errors, kinds: Sequence[int]
) -> dict[str, Mapping[int, float]]:
    """For experts the text never used: projection -> type -> the layer's median error of a single use.

    At no cost they would get the smallest type whatever it does to them when another text does use them.
    """
    seen = np.flatnonzero(used).tolist()
    return {
        p: {k: float(np.median([errors[layer.layer, e].single[p][k] / used[e] for e in seen])) for k in kinds}
        for p in layer.projections
    }


def allocations(
    cost: Float64Array, bytes_: IntArray, budget: int, layer_of: IntArray, counts: IntArray
) -> dict[str, Callable[[], Allocation]]:
    return {
        "global": lambda: allocate_global(cost, bytes_, budget),
        "layer": lambda: allocate_by_layer(cost, bytes_, budget, layer_of),
        "frequency": lambda: allocate_by_frequency(cost, bytes_, budget, counts),
        "uniform": lambda: allocate_uniform(cost, bytes_, budget),
    }


def check_bits(source: Source, types: Sequence[str], bits: float) -> None:
    """Raises UsageError, before hours of work, for bits that the smallest types do not reach."""
    nothing = [np.zeros(layer.n_expert, np.int64) for layer in source.layers]
    choices_of(source, source.layers, types, lambda *_: 0.0, nothing).budget(bits)
