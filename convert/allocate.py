"""Which expert gets which type within a budget of bytes: a multiple-choice knapsack. Pure numpy.

An item is one expert's projection, or a whole expert; a type is a column. `cost` is the damage of an item at a type,
infinite where the type is forbidden. Every function returns a bound that no allocation within the budget undercuts.
Source: GEMQ (2605.23078) solves a 0-1 program; here a price for each byte is bisected instead, and what the prices
leave open is solved exactly by dynamic programming over the few items that are near it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import UsageError
from moe_edge.models.formats.floats import Float64Array

IntArray = npt.NDArray[np.int64]

BISECTIONS = 200
CORE_ITEMS = 64  # solved exactly together: the others have clear choices at the right price
CORE_STEPS = 1 << 14  # of bytes; a core whose sizes have a common unit of at most that many steps is solved exactly
SWAP_MOVES = 800  # considered in pairs
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Allocation:
    """A type for each item.

    choice: (n_items,), index of the type. cost, bytes: their sums.
    bound: no allocation within the budget costs less.
    """

    choice: IntArray
    cost: float
    bytes: int
    bound: float

    @property
    def gap(self) -> float:
        """How much the cost may be above the best possible, as a share of the cost."""
        return (self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


def allocate_global(
    cost: Float64Array, bytes_: IntArray, budget_bytes: int, guard: Sequence[IntArray] | None = None
) -> Allocation:
    """The allocation of least cost within the budget, near enough: `gap` says how near.

    cost, bytes_: (n_items, n_types). A budget that holds all items at their largest types gives just that.
    guard: for each layer the items of its experts, (n_experts, n_projections): at least one expert of the layer keeps
    its largest types (GEMQ's code, optional there too). The bound is that of the problem without guard.
    Raises UsageError when the budget is below the smallest allocation.
    """
    problem = _checked(cost, bytes_, budget_bytes)
    largest = problem.largest()
    if problem.bytes_of(largest) <= budget_bytes:
        return problem.allocation(largest, float(problem.cost.min(axis=1).sum()))
    choice, bound, price = _solve(problem)
    if guard is not None:
        guarded = _guarded(problem, choice, price, guard)
        if guarded is not None:
            choice = _solve(guarded)[0]
    return problem.allocation(choice, bound)


def allocate_by_layer(cost: Float64Array, bytes_: IntArray, budget_bytes: int, layer_of: IntArray) -> Allocation:
    """Each layer alone, at the same share of its largest size: what to do when costs of layers do not compare.

    layer_of: (n_items,), the layer of each item. Source: PMQ of MC-MoE (2410.06270).
    Raises UsageError when the budget is below the smallest allocation, of all items or of one layer.
    """
    problem = _checked(cost, bytes_, budget_bytes)
    largest_bytes = np.take_along_axis(problem.bytes, problem.largest()[:, None], axis=1)[:, 0]
    total = int(largest_bytes.sum())
    choice = np.zeros(len(problem.bytes), np.int64)
    for layer in np.unique(layer_of):
        mine = np.flatnonzero(layer_of == layer)
        share = budget_bytes * int(largest_bytes[mine].sum()) // total
        try:
            choice[mine] = allocate_global(problem.cost[mine], problem.bytes[mine], share).choice
        except UsageError as error:
            raise UsageError(f"layer {int(layer)}: {error}") from error
    return problem.allocation(choice, _bound(problem))


def allocate_uniform(cost: Float64Array, bytes_: IntArray, budget_bytes: int, seed: int = 0) -> Allocation:
    """Two neighbouring types, the larger one spread evenly over the items: what a plain quantization does.

    seed: where the spreading starts. cost decides nothing, but where it is infinite.
    Raises UsageError when the budget is below the smallest allocation.
    """
    problem = _checked(cost, bytes_, budget_bytes)
    start = np.random.default_rng(seed).random()
    positions = (start + _GOLDEN * np.arange(len(problem.bytes))) % 1.0
    return _two_types(problem, np.argsort(positions, kind="stable"))


def allocate_by_frequency(cost: Float64Array, bytes_: IntArray, budget_bytes: int, counts: IntArray) -> Allocation:
    """Two neighbouring types, the larger one for the most used items; ties go to the earlier item.

    counts: (n_items,), uses of each item's expert. cost decides nothing, but where it is infinite.
    Raises UsageError when the budget is below the smallest allocation.
    """
    problem = _checked(cost, bytes_, budget_bytes)
    return _two_types(problem, np.argsort(-np.asarray(counts), kind="stable"))


class _Problem(NamedTuple):
    cost: Float64Array
    bytes: IntArray
    budget: int

    @property
    def allowed(self) -> npt.NDArray[np.bool_]:
        return np.isfinite(self.cost)

    def largest(self) -> IntArray:
        """Each item's largest allowed type; of two of the same size the cheaper."""
        return _first_by(-self.bytes, self.cost, self.allowed)

    def smallest(self) -> IntArray:
        return _first_by(self.bytes, self.cost, self.allowed)

    def bytes_of(self, choice: IntArray) -> int:
        return int(np.take_along_axis(self.bytes, choice[:, None], axis=1).sum())

    def cost_of(self, choice: IntArray) -> float:
        return float(np.take_along_axis(self.cost, choice[:, None], axis=1).sum())

    def allocation(self, choice: IntArray, bound: float) -> Allocation:
        cost = self.cost_of(choice)
        return Allocation(choice, cost, self.bytes_of(choice), min(bound, cost))


def _checked(cost: Float64Array, bytes_: IntArray, budget_bytes: int) -> _Problem:
    problem = _Problem(np.asarray(cost, np.float64), np.asarray(bytes_, np.int64), int(budget_bytes))
    assert problem.cost.ndim == 2 and problem.cost.shape == problem.bytes.shape, (problem.cost.shape, bytes_)
    assert not np.isnan(problem.cost).any() and not (problem.cost == -np.inf).any() and (problem.bytes >= 0).all()
    impossible = np.flatnonzero(~problem.allowed.any(axis=1))
    if len(impossible):
        raise UsageError(f"{len(impossible)} items, the first is number {impossible[0]}, may have none of the types")
    smallest = problem.bytes_of(problem.smallest())
    if problem.budget < smallest:
        raise UsageError(
            f"a budget of {problem.budget} bytes is below {smallest}, the size with every expert at its smallest type"
        )
    return problem


def _first_by(first: npt.NDArray[np.generic], second: Float64Array, allowed: npt.NDArray[np.bool_]) -> IntArray:
    """For each row the allowed column with the least `first`, then the least `second`."""
    primary = np.where(allowed, first, np.inf)
    tied = primary == primary.min(axis=1, keepdims=True)
    chosen: IntArray = np.where(tied, second, np.inf).argmin(axis=1).astype(np.int64)
    return chosen


def _at_price(problem: _Problem, price: float) -> tuple[IntArray, float]:
    """The best choice when a byte costs `price` (ties: fewer bytes), and the dual bound that proves."""
    priced = problem.cost + price * problem.bytes
    least = priced.min(axis=1)
    choice = _first_by(problem.bytes, problem.cost, priced <= least[:, None])
    return choice, float(least.sum()) - price * problem.budget


def _prices(problem: _Problem) -> tuple[IntArray, float, float]:
    """The choice at the least price that keeps to the budget, the best dual bound seen, and that price."""
    choice, bound = _at_price(problem, 0.0)
    if problem.bytes_of(choice) <= problem.budget:
        return choice, bound, 0.0
    low, high = 0.0, _highest_price(problem)
    choice, found = _at_price(problem, high)
    bound = max(bound, found)
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 1024
        if not low < middle < high:
            break
        tried, found = _at_price(problem, middle)
        bound = max(bound, found)
        if problem.bytes_of(tried) <= problem.budget:
            choice, high = tried, middle
        else:
            low = middle
    return choice, bound, high


def _highest_price(problem: _Problem) -> float:
    """A price at which every item takes its smallest type."""
    smallest = problem.smallest()[:, None]
    saved = np.take_along_axis(problem.cost, smallest, 1) - np.where(problem.allowed, problem.cost, np.inf)
    added = problem.bytes - np.take_along_axis(problem.bytes, smallest, 1)
    slopes = np.divide(saved, added, out=np.zeros_like(saved), where=(added > 0) & (saved > 0))
    return float(slopes.max()) * 2 + 1e-300


def _bound(problem: _Problem) -> float:
    return _prices(problem)[1]


def _solve(problem: _Problem) -> tuple[IntArray, float, float]:
    """(choice, bound, price): prices first, then what is left of the budget, then the core, then swaps."""
    choice, bound, price = _prices(problem)
    best = _spend(problem, choice)
    if price > 0:
        for start in (choice, best):
            tried = _swap(problem, _spend(problem, _solve_core(problem, start, price)), price)
            best = min(best, tried, key=problem.cost_of)
    return _use_rest(problem, best), bound, price


def _moves(problem: _Problem, choice: IntArray) -> tuple[Float64Array, IntArray]:
    """What changing an item to a type adds to the cost and to the bytes, (n_items, n_types)."""
    here = choice[:, None]
    return (
        problem.cost - np.take_along_axis(problem.cost, here, 1),
        problem.bytes - np.take_along_axis(problem.bytes, here, 1),
    )


def _spend(problem: _Problem, choice: IntArray) -> IntArray:
    """Upgrades by the best drop of cost per byte, while any fits."""
    choice = choice.copy()
    while True:
        slack = problem.budget - problem.bytes_of(choice)
        added_cost, added = _moves(problem, choice)
        useful = (added_cost < 0) & (added <= slack)
        if not useful.any():
            return choice
        rate = np.where(useful, -added_cost / np.maximum(added, 0.5), -1.0)
        types = rate.argmax(axis=1)
        rows = np.arange(len(choice))
        order = np.argsort(-rate[rows, types], kind="stable")
        order = order[rate[order, types[order]] > 0]
        fits = np.cumsum(np.maximum(added[order, types[order]], 0)) <= slack
        taken = order[: max(1, int(fits.argmin()) if not fits.all() else len(order))]
        choice[taken] = types[taken]


def _use_rest(problem: _Problem, choice: IntArray) -> IntArray:
    """Upgrades that cost nothing, the largest first: the text may not have used an expert that others use."""
    choice = choice.copy()
    slack = problem.budget - problem.bytes_of(choice)
    added_cost, added = _moves(problem, choice)
    rows, types = np.nonzero((added_cost <= 0) & (added > 0) & (added <= slack))
    done: set[int] = set()
    for at in np.argsort(-added[rows, types], kind="stable"):
        row, more = int(rows[at]), int(added[rows[at], types[at]])
        if row not in done and more <= slack:
            choice[row] = types[at]
            slack -= more
            done.add(row)
    return choice


def _swap(problem: _Problem, choice: IntArray, price: float) -> IntArray:
    """The best pair of changes, again and again: one item up and another down, or one alone."""
    choice = choice.copy()
    for _ in range(len(choice)):
        slack = problem.budget - problem.bytes_of(choice)
        added_cost, added = _moves(problem, choice)
        reduced = (added_cost + price * added).ravel()
        near = np.argsort(reduced, kind="stable")[: SWAP_MOVES + len(choice)]
        near = near[np.isfinite(reduced[near])][: 2 * SWAP_MOVES]
        items, types = np.divmod(near, problem.cost.shape[1])
        dc, db = added_cost.ravel()[near], added.ravel()[near]
        total = dc[:, None] + dc[None, :]
        total[(db[:, None] + db[None, :] > slack) | (items[:, None] == items[None, :])] = np.inf
        first, second = np.unravel_index(int(total.argmin()), total.shape)
        if not total[first, second] < -1e-12 * max(1e-300, float(np.abs(dc).max())):
            return choice
        for each in (int(first), int(second)):
            choice[items[each]] = types[each]
    return choice


def _solve_core(problem: _Problem, choice: IntArray, price: float) -> IntArray:
    """The items with the least clear choices, solved together; the others stay. Never worse than `choice`."""
    added_cost, added = _moves(problem, choice)
    reduced = added_cost + price * added
    reduced[np.arange(len(choice)), choice] = np.inf
    core = np.argsort(reduced.min(axis=1), kind="stable")[:CORE_ITEMS]
    slack = problem.budget - problem.bytes_of(choice)
    base = np.where(problem.allowed[core], problem.bytes[core], np.iinfo(np.int64).max).min(axis=1)
    room = int((np.take_along_axis(problem.bytes[core], choice[core][:, None], 1)[:, 0] - base).sum()) + slack
    sizes = problem.bytes[core] - base[:, None]
    unit = int(np.gcd.reduce(sizes[problem.allowed[core]]))
    unit = max(unit, -(-room // CORE_STEPS), 1)
    found = _knapsack(problem.cost[core], -(-sizes // unit), room // unit)
    tried = choice.copy()
    tried[core] = found
    return tried if problem.cost_of(tried) <= problem.cost_of(choice) else choice


def _knapsack(cost: Float64Array, steps: IntArray, room: int) -> IntArray:
    """The choice of least cost with at most `room` steps, by dynamic programming; all stay at 0 steps if need be."""
    n_items, n_types = cost.shape
    best = np.zeros(room + 1)
    taken = np.zeros((n_items, room + 1), np.int16)
    for item in range(n_items):
        least = np.full(room + 1, np.inf)
        for kind in range(n_types):
            size = int(steps[item, kind])
            if size > room or not np.isfinite(cost[item, kind]):
                continue
            tried = best[: room + 1 - size] + cost[item, kind]
            better = tried < least[size:]
            least[size:][better] = tried[better]
            taken[item, size:][better] = kind
        best = least
    choice = np.zeros(n_items, np.int64)
    for item in range(n_items - 1, -1, -1):
        choice[item] = taken[item, room]
        room -= int(steps[item, choice[item]])
    return choice


def _guarded(problem: _Problem, choice: IntArray, price: float, guard: Sequence[IntArray]) -> _Problem | None:
    """The problem with one expert fixed at its largest types in each layer that has none; None when all have one."""
    largest = problem.largest()
    added_cost, added = _moves(problem, choice)
    reduced = np.take_along_axis(added_cost + price * added, largest[:, None], 1)[:, 0]
    cost = problem.cost.copy()
    for experts in guard:
        kept = (choice[experts] == largest[experts]).all(axis=1)
        scores = np.where(kept, -np.inf, reduced[experts].sum(axis=1))
        for item in experts[int(scores.argmin())]:
            others = np.arange(cost.shape[1]) != largest[item]
            cost[item, others] = np.inf
    if np.array_equal(cost, problem.cost):
        return None
    guarded = problem._replace(cost=cost)
    smallest = guarded.bytes_of(guarded.smallest())
    if problem.budget < smallest:
        raise UsageError(
            f"a budget of {problem.budget} bytes is below {smallest}, the size with one expert of each layer guarded"
        )
    return guarded


def _two_types(problem: _Problem, order: IntArray) -> Allocation:
    """The largest type that all items fit at, and the next one for the first items of `order` that still fit."""
    totals = np.where(problem.allowed, problem.bytes, 0).sum(axis=0)
    ranked = [int(kind) for kind in np.argsort(totals, kind="stable")]
    columns = [_nearest(problem, kind) for kind in ranked]
    fitting = [number for number, column in enumerate(columns) if problem.bytes_of(column) <= problem.budget]
    if not fitting:
        choice, upper = problem.smallest(), columns[0]
    else:
        choice, upper = columns[fitting[-1]].copy(), columns[min(fitting[-1] + 1, len(columns) - 1)]
    added = problem.bytes[np.arange(len(choice)), upper] - problem.bytes[np.arange(len(choice)), choice]
    slack = problem.budget - problem.bytes_of(choice)
    for item in order[added[order] > 0]:
        if added[item] <= slack:
            choice[item] = upper[item]
            slack -= int(added[item])
    return problem.allocation(choice, _bound(problem))


def _nearest(problem: _Problem, kind: int) -> IntArray:
    """Every item at type `kind`, or where that is forbidden at the largest that is smaller, or at the smallest."""
    limit = problem.bytes[:, kind : kind + 1]
    below = problem.allowed & (problem.bytes <= limit)
    fallback = np.where(below.any(axis=1), _first_by(-problem.bytes, problem.cost, below), problem.smallest())
    chosen: IntArray = np.where(problem.allowed[:, kind], kind, fallback).astype(np.int64)
    return chosen
