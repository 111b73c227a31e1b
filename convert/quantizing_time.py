"""What quantizing to a type costs in time, and types chosen by damage and time together.

llama.cpp's grid types are searched for, up to 25 times slower than rounding: the best types of a model of 30 billion
weights take longer to write than anybody waits. So time has a price, in damage, that is raised until what is chosen
can be quantized in the time that is there. The speeds are nominal, so that the choice is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from moe_edge.convert.allocate import Allocation, IntArray, allocate_global
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.ggml_types import TYPES

# Weights a second of one core, with an importance matrix, 2048 columns: docs/LOG.md, 2026-11-27.
WEIGHTS_PER_SECOND: Mapping[str, float] = {
    "IQ2_XXS": 2.4e6, "IQ2_XS": 1.2e6, "IQ2_S": 1.2e6, "IQ1_S": 1.2e6, "IQ1_M": 1.2e6, "IQ3_XXS": 1.5e6, "IQ3_S": 2.6e6,
    "IQ4_XS": 3.9e6, "IQ4_NL": 3.9e6, "Q2_K": 6e6, "Q3_K": 20e6, "Q4_K": 7e6, "Q5_K": 7e6, "Q6_K": 26e6,
}  # fmt: skip
CORE_HOURS = 6.0  # of quantizing at the most, unless asked otherwise: docs/LOG.md, 2026-11-28
FAST = 30e6  # what is not in the table
HALVINGS = 24


@dataclass(frozen=True)
class Wanted:
    """One level to be chosen: cost, bytes and nominal seconds [n_items, n_types], and the bytes it may take."""

    cost: Float64Array
    bytes: IntArray
    seconds: Float64Array
    budget_bytes: int

    def seconds_of(self, made: Allocation) -> float:
        return float(np.take_along_axis(self.seconds, made.choice[:, None], 1).sum())


def quantizing_seconds(type_id: int, n_weights: int) -> float:
    """Nominal seconds of one core."""
    return n_weights / WEIGHTS_PER_SECOND.get(TYPES[type_id].name, FAST)


def allocate_in_time(levels: Sequence[Wanted], most_seconds: float) -> tuple[tuple[Allocation, ...], bool]:
    """The allocations of least damage that are quantized in most_seconds together, and whether time had a say.

    A level's damage counts relative to the least it can have. Where even the fastest types take longer, those that a
    very high price of time chooses. Raises UsageError, as allocate_global does.
    """
    free = tuple(allocate_global(each.cost, each.bytes, each.budget_bytes) for each in levels)
    if _seconds(levels, free) <= most_seconds:
        return free, False
    least = [each.cost for each in free]

    def at(price: float) -> tuple[Allocation, ...]:
        return tuple(
            allocate_global(each.cost + price * max(base, 1e-300) * each.seconds, each.bytes, each.budget_bytes)
            for each, base in zip(levels, least, strict=True)
        )

    made = _dearest_that_fits(at, lambda found: _seconds(levels, found) <= most_seconds, 1 / most_seconds)
    return tuple(_without_time(each, found) for each, found in zip(levels, made, strict=True)), True


def _dearest_that_fits(
    at: Callable[[float], tuple[Allocation, ...]], fits: Callable[[tuple[Allocation, ...]], bool], start: float
) -> tuple[Allocation, ...]:
    low, high = start * 1e-3, start
    made = at(high)
    while not fits(made) and high < start * 1e3:
        low, high = high, high * 4
        made = at(high)
    for _ in range(HALVINGS):
        if high / low < 1.01:
            break
        middle = float(np.sqrt(low * high))
        tried = at(middle)
        if fits(tried):
            made, high = tried, middle
        else:
            low = middle
    return made


def _without_time(level: Wanted, made: Allocation) -> Allocation:
    cost = float(np.take_along_axis(level.cost, made.choice[:, None], 1).sum())
    return Allocation(made.choice, cost, made.bytes, min(made.bound, cost))


def _seconds(levels: Sequence[Wanted], made: Sequence[Allocation]) -> float:
    return sum(level.seconds_of(found) for level, found in zip(levels, made, strict=True))


def used_types(levels: Sequence[Wanted], most_seconds: float, margin: float = 0.1) -> npt.NDArray[np.int64]:
    """Columns that some item is given, at the budgets and a tenth below and above them: the others are hopeless."""
    used = set()
    for factor in (1 - margin, 1.0, 1 + margin):
        least = [int(each.bytes.min(axis=1).sum()) for each in levels]
        near = [
            Wanted(each.cost, each.bytes, each.seconds, max(few, int(each.budget_bytes * factor)))
            for each, few in zip(levels, least, strict=True)
        ]
        for limit in (most_seconds, np.inf):
            for made in allocate_in_time(near, limit)[0]:
                used |= set(made.choice.tolist())
    return np.array(sorted(used), np.int64)
