"""Allocations: hand-worked cases, an exact solver's optimum on random ones, and the budget always kept."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from moe_edge.convert.allocate import (
    Allocation,
    allocate_by_frequency,
    allocate_by_layer,
    allocate_global,
    allocate_uniform,
)
from moe_edge.models.errors import UsageError

COST = np.array([[10.0, 4.0, 0.0], [2.0, 1.0, 0.0], [8.0, 7.0, 0.0]])
SIZE = np.array([[1, 2, 4]] * 3)
ROWS = {
    "global": allocate_global,
    "uniform": allocate_uniform,
    "frequency": lambda cost, size, budget: allocate_by_frequency(cost, size, budget, np.arange(len(cost))),
    "layer": lambda cost, size, budget: allocate_by_layer(cost, size, budget, np.arange(len(cost)) % 3),
}
Allocate = Callable[[npt.NDArray[np.float64], npt.NDArray[np.int64], int], Allocation]


Case = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], int]


def random_case(seed: int, n_items: int = 30, n_types: int = 4) -> Case:
    """Sizes of real types, of two shapes, or of no common unit; costs that fall with the size, or do not."""
    rng = np.random.default_rng(seed)
    bits = np.array([66, 84, 110, 144, 210])[-n_types:]
    size = np.outer(rng.choice([1, 1 + seed % 2], n_items), bits * 4096)
    if seed % 3 == 0:
        size = np.sort(rng.integers(1000, 1_000_000, (n_items, n_types)), axis=1)
    cost = np.exp(rng.normal(0, 2, (n_items, 1)) + rng.normal(0, 0.7, (n_items, n_types)))
    if seed % 4:
        cost = -np.sort(-cost, axis=1)
    if seed % 5 == 0:
        cost[:, 1:][rng.random((n_items, n_types - 1)) < 0.1] = np.inf
    low, high = int(size[:, 0].sum()), int(size[:, -1].sum())
    return cost, size, int(low + (high - low) * rng.uniform(0.05, 0.95))


def exact_optimum(cost: npt.NDArray[np.float64], size: npt.NDArray[np.int64], budget: int) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]

    n_items, n_types = cost.shape
    one_each = np.kron(np.eye(n_items), np.ones(n_types))
    unit = size.mean()
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size.ravel()[None] / unit, -np.inf, budget / unit)]
    allowed = np.isfinite(cost).ravel()
    values = np.where(allowed, cost.ravel(), 0.0)
    kinds = np.ones(cost.size)
    bounds = Bounds(0, allowed.astype(float))
    result = milp(values, constraints=limits, integrality=kinds, bounds=bounds, options={"mip_rel_gap": 0})
    return float(result.fun)


def test_small_case_worked_by_hand() -> None:
    found = allocate_global(COST, SIZE, 8)  # 4 + 1 + 0; the third at 4 bytes saves most, [2, 1, 1] would cost 8
    assert found.choice.tolist() == [1, 1, 2] and (found.cost, found.bytes) == (5.0, 8)
    found = allocate_global(COST, SIZE, 9)
    assert found.choice.tolist() == [2, 0, 2] and (found.cost, found.bytes) == (2.0, 9)
    assert found.bound <= 2.0 and found.gap == (2.0 - found.bound) / 2.0


@pytest.mark.parametrize("seed", range(48))
def test_global_is_the_optimum_of_an_exact_solver(seed: int) -> None:
    cost, size, budget = random_case(seed)
    found, best = allocate_global(cost, size, budget), exact_optimum(cost, size, budget)
    assert found.bytes <= budget
    assert found.bytes == size[np.arange(len(size)), found.choice].sum()
    assert found.cost == pytest.approx(cost[np.arange(len(cost)), found.choice].sum())
    assert found.bound <= best * (1 + 1e-9) and found.bound <= found.cost
    assert best * (1 - 1e-6) <= found.cost <= best * 1.005


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("seed", range(8))
def test_every_rule_keeps_the_budget_and_the_bound(name: str, seed: int) -> None:
    cost, size, budget = random_case(seed, 60, 5)
    budget = max(budget, int(size[:, 0].sum() * 1.3))
    found, best = ROWS[name](cost, size, budget), allocate_global(cost, size, budget)  # type: ignore[operator]
    assert found.bytes <= budget and np.isfinite(found.cost)
    assert found.cost >= best.bound * (1 - 1e-9) and found.bound == pytest.approx(best.bound, rel=1e-6)
    again = ROWS[name](cost, size, budget)  # type: ignore[operator]
    assert again.choice.tolist() == found.choice.tolist()


@pytest.mark.parametrize("name", ROWS)
def test_budgets_beyond_the_ends(name: str) -> None:
    with pytest.raises(UsageError, match="budget of 2 bytes is below 3"):
        ROWS[name](COST, SIZE, 2)  # type: ignore[operator]
    assert ROWS[name](COST, SIZE, 3).choice.tolist() == [0, 0, 0]  # type: ignore[operator]
    for budget in (12, 10**12):
        assert ROWS[name](COST, SIZE, budget).choice.tolist() == [2, 2, 2]  # type: ignore[operator]


def test_all_at_the_largest_even_where_a_smaller_type_measured_better() -> None:
    found = allocate_global(np.array([[1.0, 2.0]]), np.array([[1, 2]]), 2)
    assert (found.choice.tolist(), found.cost, found.bound) == ([1], 2.0, 1.0)


def test_item_with_no_type_is_named() -> None:
    with pytest.raises(UsageError, match="the first is number 1, may have none"):
        allocate_global(np.array([[1.0, 2.0], [np.inf, np.inf]]), np.array([[1, 2], [1, 2]]), 4)


def test_what_is_left_goes_to_experts_the_text_never_used() -> None:
    cost, size = np.array([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), np.array([[1, 3]] * 3)
    assert allocate_global(cost, size, 7).choice.tolist() == [1, 1, 0]
    assert allocate_global(cost, size, 5).choice.tolist() == [1, 0, 0]


def test_uniform_spreads_the_larger_type_evenly() -> None:
    size = np.array([[1, 2, 4]] * 90)
    found = allocate_uniform(np.zeros((90, 3)), size, 90 * 2 + 30 * 2)
    assert np.bincount(found.choice).tolist() == [0, 60, 30]
    per_ten = (found.choice == 2).reshape(9, 10).sum(axis=1)
    assert per_ten.min() >= 2 and per_ten.max() <= 5
    other = allocate_uniform(np.zeros((90, 3)), size, 90 * 2 + 30 * 2, seed=1)
    assert other.bytes == found.bytes and other.choice.tolist() != found.choice.tolist()


def test_uniform_goes_around_forbidden_types() -> None:
    cost, size = np.zeros((4, 3)), np.array([[1, 2, 4]] * 4)
    cost[0, 1] = cost[1, 2] = np.inf
    assert allocate_uniform(cost, size, 8).choice.tolist() == [0, 1, 1, 1]
    assert allocate_uniform(cost, size, 14).choice.tolist() == [2, 1, 2, 2]


def test_frequency_gives_the_larger_type_to_the_most_used() -> None:
    size = np.array([[1, 2, 4]] * 4)
    found = allocate_by_frequency(np.zeros((4, 3)), size, 12, np.array([5, 9, 5, 7]))
    assert found.choice.tolist() == [1, 2, 1, 2]
    assert allocate_by_frequency(np.zeros((4, 3)), size, 14, np.array([5, 9, 5, 7])).choice.tolist() == [2, 2, 1, 2]


def test_each_layer_gets_the_same_budget_whatever_its_costs() -> None:
    cost = np.array([[100.0, 0.0], [90.0, 0.0], [0.1, 0.0], [0.2, 0.0]])
    size = np.array([[1, 3]] * 4)
    layer_of = np.array([0, 0, 1, 1])
    assert allocate_by_layer(cost, size, 8, layer_of).choice.tolist() == [1, 0, 0, 1]
    assert allocate_global(cost, size, 8).choice.tolist() == [1, 1, 0, 0]
    cost[0, 0] = np.inf
    with pytest.raises(UsageError, match="layer 0: a budget of 3 bytes is below 4"):
        allocate_by_layer(cost, size, 6, layer_of)


def test_guard_keeps_one_expert_of_each_layer_at_its_largest() -> None:
    cost = np.array([[9.0, 0.0], [9.0, 0.0], [0.2, 0.0], [0.1, 0.0]])
    size = np.array([[1, 3]] * 4)
    guard = [np.array([[0], [1]]), np.array([[2], [3]])]
    assert allocate_global(cost, size, 8).choice.tolist() == [1, 1, 0, 0]
    guarded = allocate_global(cost, size, 8, guard)
    assert guarded.choice.tolist() == [1, 0, 1, 0] and guarded.bound <= guarded.cost
    pairs = [np.array([[0, 1], [2, 3]])]  # experts of two projections: both are at their largest already
    assert allocate_global(cost, size, 8, pairs).choice.tolist() == [1, 1, 0, 0]
    with pytest.raises(UsageError, match="below 8, the size with one expert of each layer guarded"):
        allocate_global(cost, size, 7, guard)


def test_eighteen_thousand_items_take_seconds() -> None:
    cost, size, budget = random_case(2, 18432, 5)
    started = time.perf_counter()
    found = allocate_global(cost, size, budget)
    assert time.perf_counter() - started < 10
    assert found.bytes <= budget and found.gap < 1e-4
