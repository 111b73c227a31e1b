"""The policy, without a model: exact values worked by hand, and a property that holds for every plan."""

from __future__ import annotations

import random

import pytest
from moe_edge.models.errors import BudgetTooSmall, UnknownName
from moe_edge.schedulers.layout import ExpertKey, Layout, Step
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policy import Policy, make_policy


def layout(n_layers: int = 2, n_experts: int = 4, unit_bytes: int = 10) -> Layout:
    return Layout((n_experts,) * n_layers, 1, (unit_bytes,) * (n_layers * n_experts))


def ask(policy: Policy, layer: int, *experts: int) -> list[tuple[int, list[int]]]:
    """[(expert, victims)] in plan order."""
    plan = policy.plan(Step(layer, experts, [1] * len(experts)))
    if plan is None:  # all in memory
        return [(e, []) for e in experts]
    assert sorted(plan.order) == list(range(len(experts)))
    assert list(plan.levels) == [0] * len(experts)
    return [(experts[i], list(v)) for i, v in zip(plan.order, plan.victims, strict=True)]


def test_units_are_numbered_layer_by_layer() -> None:
    units = Layout((2, 3), 2, tuple(range(10)))
    assert units.unit(ExpertKey(0, 1)) == 2
    assert units.unit(ExpertKey(1, 0), level=1) == 5
    assert list(units.layer_units(1)) == [4, 5, 6, 7, 8, 9]
    assert units.largest_bytes(0) == 3


def test_a_layout_with_the_wrong_number_of_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="3 unit sizes for 4 units"):
        Layout((4,), 1, (1, 2, 3))


def test_a_free_arena_evicts_nothing() -> None:
    lru = ExactLru(layout(), 80)
    assert ask(lru, 0, 2, 0) == [(2, []), (0, [])]
    assert ask(lru, 1, 3) == [(3, [])]
    assert lru.used_bytes == 30


def test_a_step_without_a_miss_is_answered_by_none_and_renews_its_experts() -> None:
    lru = ExactLru(layout(), 30)
    ask(lru, 0, 0, 1, 2)
    assert lru.plan(Step(0, [1, 0], [1, 1])) is None
    assert lru.resident == (2, 1, 0)


def test_hits_come_before_misses_and_the_oldest_use_is_evicted() -> None:
    lru = ExactLru(layout(), 30)
    ask(lru, 0, 0, 1)
    ask(lru, 1, 0)  # full: units 0, 1, 4
    assert ask(lru, 0, 3, 0) == [(0, []), (3, [1])]  # 0 is hit and renewed, so 1 is the oldest
    assert lru.resident == (4, 0, 3)


def test_an_expert_of_this_step_is_evicted_only_when_nothing_else_is_left() -> None:
    lru = ExactLru(layout(), 20)
    ask(lru, 0, 0)
    ask(lru, 1, 1)
    assert ask(lru, 1, 1, 2, 3) == [(1, []), (2, [0]), (3, [5])]


def test_a_step_wider_than_the_arena_streams_through_it() -> None:
    lru = ExactLru(layout(), 20)
    assert ask(lru, 0, 0, 1, 2, 3) == [(0, []), (1, []), (2, [0]), (3, [1])]
    assert ask(lru, 0, 0, 1, 2, 3) == [(2, []), (3, []), (0, [2]), (1, [3])]


def test_units_of_different_size_evict_as_many_bytes_as_needed_and_no_more() -> None:
    sizes = Layout((4,), 1, (10, 10, 25, 5))
    lru = ExactLru(sizes, 30)
    ask(lru, 0, 0, 1, 3)
    assert ask(lru, 0, 2) == [(2, [0, 1])]
    assert lru.used_bytes == 30


def test_one_expert_larger_than_the_arena_is_refused_with_both_numbers() -> None:
    with pytest.raises(BudgetTooSmall, match="one expert needs 10 bytes but the expert arena has 9"):
        ask(ExactLru(layout(), 9), 0, 0)


def test_reset_starts_from_what_is_really_in_memory() -> None:
    lru = ExactLru(layout(), 20)
    ask(lru, 0, 0, 1)
    lru.reset([1])
    assert lru.used_bytes == 10
    assert ask(lru, 0, 1, 0) == [(1, []), (0, [])]


def test_no_plan_exceeds_the_arena_or_evicts_what_is_absent_or_still_needed() -> None:
    rng = random.Random(0)
    for _ in range(300):
        n_layers, n_experts = rng.randint(1, 4), rng.randint(2, 12)
        sizes = tuple(rng.randint(1, 9) for _ in range(n_layers * n_experts))
        units = Layout((n_experts,) * n_layers, 1, sizes)
        arena = rng.randint(max(sizes), sum(sizes))
        policy = ExactLru(units, arena)
        resident: set[int] = set()
        for _ in range(40):
            layer = rng.randrange(n_layers)
            experts = rng.sample(range(n_experts), rng.randint(1, n_experts))
            computed: set[int] = set()
            step = {units.unit(ExpertKey(layer, e)) for e in experts}
            for expert, victims in ask(policy, layer, *experts):
                unit = units.unit(ExpertKey(layer, expert))
                for v in victims:
                    assert v in resident and (v not in step or v in computed)
                    resident.remove(v)
                if unit in resident:
                    assert not victims
                resident.add(unit)
                computed.add(unit)
                assert sum(sizes[u] for u in resident) <= arena
            assert resident == set(policy.resident)


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown policy 'lfru'; known: exact, dymoe, hobbit"):
        make_policy(PolicyOptions("lfru"), layout(), 80)
