"""What a wish becomes in the cache: each rule worked by hand, and random plans replayed as native/step.cpp does."""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import dataclass

import pytest
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.schedulers.budget import arena_floor_bytes
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.layout import SKIP, ExpertKey, Layout, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.levels import HIGH, LOW, LevelPolicy
from moe_edge.schedulers.policy import Policy, make_policy

# One layer of 4 experts, 10 bytes high and 4 low: expert e is unit 2e at the high level and 2e + 1 at the low one.
LAYOUT = Layout((4,), 2, (10, 4) * 4)


def policy(*resident: int, arena_bytes: int = 24, reuse: bool = True) -> LevelPolicy:
    made = LevelPolicy(LAYOUT, arena_bytes, reuse=reuse)
    made.reset(resident)
    return made


def ask(made: LevelPolicy, **wishes: int) -> list[tuple[int, int, list[int]]]:
    """ask(p, e2=LOW, e0=HIGH) -> [(expert, level, victims)] in plan order; [] for None."""
    experts = [int(name[1:]) for name in wishes]
    plan = made.serve(Step(0, experts, [1] * len(experts)), list(wishes.values()))
    if plan is None:
        return []
    return [(experts[i], level, list(v)) for i, level, v in zip(plan.order, plan.levels, plan.victims, strict=True)]


def test_the_cache_counts_bytes_and_evicts_the_oldest() -> None:
    cache = ExpertCache(LAYOUT, 24)
    assert (cache.add(0), cache.add(3), cache.add(4)) == ([], [], [])
    assert (cache.resident, cache.used_bytes) == ((0, 3, 4), 24)
    cache.renew(0)
    assert cache.make_room(4) == [3]
    assert cache.add(6) == [4] and cache.resident == (0, 6)
    cache.remove(0)
    assert cache.used_bytes == 10 and 0 not in cache and 6 in cache
    with pytest.raises(KeyError):
        cache.renew(0)


def test_the_cache_refuses_what_can_never_fit_and_loses_nothing_by_it() -> None:
    cache = ExpertCache(LAYOUT, 9)
    cache.add(1)
    with pytest.raises(BudgetTooSmall, match="one expert needs 10 bytes but the expert arena has 9") as e:
        cache.add(0)
    assert e.value.needed_bytes == 10 and cache.resident == (1,)


def test_a_high_copy_serves_a_high_wish() -> None:
    assert ask(policy(0), e0=HIGH) == []


def test_a_high_copy_serves_a_low_wish() -> None:
    p = policy(0, 2)
    assert ask(p, e0=LOW) == []
    assert p.resident == (2, 0)  # and is renewed
    assert p.stats.high_uses == 1


def test_a_low_copy_serves_a_low_wish() -> None:
    p = policy(1, 2)
    assert ask(p, e0=LOW) == [(0, LOW, [])]
    assert p.resident == (2, 1) and p.stats.low_uses == 1


def test_a_high_wish_promotes_a_low_copy_which_goes_first() -> None:
    p = policy(1, 2)
    assert ask(p, e0=HIGH) == [(0, HIGH, [1])]
    assert (p.resident, p.used_bytes) == ((2, 0), 20)


def test_a_promotion_needs_room_for_the_difference_only() -> None:
    assert ask(policy(2, 4, 1, arena_bytes=30), e0=HIGH) == [(0, HIGH, [1])]  # 24 of 30, 6 more: nothing else goes
    assert ask(policy(2, 4, 1, arena_bytes=29), e0=HIGH) == [(0, HIGH, [1, 2])]


def test_an_absent_expert_is_read_at_the_level_wanted() -> None:
    p = policy()
    assert ask(p, e0=LOW, e1=HIGH) == [(0, LOW, []), (1, HIGH, [])]
    assert p.resident == (1, 2)


def test_an_absent_expert_that_is_to_be_skipped_is_not_read() -> None:
    p = policy(2)
    assert ask(p, e0=SKIP, e1=HIGH) == [(1, HIGH, []), (0, SKIP, [])]
    assert p.resident == (2,) and p.stats.skipped_uses == 1


@pytest.mark.parametrize(("unit", "expected"), [(0, []), (1, [(0, LOW, [])])])
def test_what_is_in_memory_is_used_rather_than_skipped(unit: int, expected: list[object]) -> None:
    assert ask(policy(unit), e0=SKIP) == expected


@pytest.mark.parametrize("unit", [0, 1])
def test_without_reuse_a_skip_is_a_skip(unit: int) -> None:
    p = policy(unit, 2, reuse=False)
    assert ask(p, e0=SKIP) == [(0, SKIP, [])]
    assert p.resident == (unit, 2)  # neither used nor renewed


def test_without_reuse_a_low_wish_replaces_the_high_copy() -> None:
    p = policy(0, 2, reuse=False)
    assert ask(p, e0=LOW, e1=HIGH) == [(1, HIGH, []), (0, LOW, [0])]
    assert (p.resident, p.used_bytes) == ((2, 1), 14)


def test_hits_come_first_then_reads_then_skips() -> None:
    assert ask(policy(3), e0=SKIP, e1=LOW, e2=HIGH) == [(1, LOW, []), (2, HIGH, []), (0, SKIP, [])]


def test_an_expert_of_the_step_goes_only_after_the_rest_and_for_a_later_one() -> None:
    # 10 + 10 + 4 of 24: 6 is the oldest; then 0, hit in this step, makes room for expert 2, which comes after it
    assert ask(policy(6, 0, 3), e0=HIGH, e1=LOW, e2=HIGH) == [(0, HIGH, []), (1, LOW, []), (2, HIGH, [6])]
    assert ask(policy(0, 2), e0=HIGH, e1=HIGH, e2=HIGH) == [(0, HIGH, []), (1, HIGH, []), (2, HIGH, [0])]


def test_a_low_copy_evicted_for_an_earlier_expert_is_not_named_again_by_its_promotion() -> None:
    assert ask(policy(3, 4, 6), e0=LOW, e1=HIGH) == [(0, LOW, [3]), (1, HIGH, [4])]


def test_one_level_stores_have_no_low_copy_to_look_for() -> None:
    # with one level, unit + 1 is the next expert: it must not pass for a low copy
    p = LevelPolicy(Layout((4,), 1, (10,) * 4), 30)
    p.reset([1])
    assert ask(p, e0=HIGH) == [(0, HIGH, [])]
    assert ask(p, e3=SKIP) == [(3, SKIP, [])]


@pytest.mark.parametrize("name", ["exact", "dymoe", "hobbit"])
def test_a_low_copy_left_by_another_policy_is_promoted(name: str) -> None:
    p = make_policy(PolicyOptions(name, cache="lru"), LAYOUT, 24)
    p.reset([1, 4])
    assert p.plan(Step(0, [0], [1], [1.0], [1.0])) == ([0], [HIGH], [[1]])
    assert p.resident == (4, 0)


@dataclass
class Engine:
    """What native/step.cpp does with a plan, with its checks, and a check of the bytes at every moment."""

    layout: Layout
    arena_bytes: int
    rng: random.Random

    def __post_init__(self) -> None:
        self.resident: set[int] = set()
        self.by_age: list[int] = []  # the test's own LRU: oldest first
        self.evictions = 0

    def used_bytes(self, units: set[int] | list[int]) -> int:
        return sum(self.layout.unit_bytes[u] for u in units)

    def other_levels(self, unit: int) -> set[int]:
        n = self.layout.n_levels
        return set(range(unit - unit % n, unit - unit % n + n)) - {unit}

    def run(self, step: Step, plan: StepPlan | None) -> None:
        n = len(step.experts)
        plan = plan or StepPlan(range(n), [HIGH] * n, [()] * n)
        assert sorted(plan.order) == list(range(n)) and len(plan.levels) == len(plan.victims) == n
        units = [
            None if level == SKIP else self.layout.unit(ExpertKey(step.layer, step.experts[i]), level)
            for i, level in zip(plan.order, plan.levels, strict=True)
        ]
        self.check_victims(units, plan)
        busy = {u for u in units if u is not None}
        loads = []
        for unit, victims in zip(units, plan.victims, strict=True):
            if unit is None or unit in self.resident:
                assert not victims, "evicts for one that needs no room"
            else:
                loads.append((unit, victims))
        waiting = list(busy)
        self.dispatch(loads, busy)  # type: ignore[arg-type]
        while waiting:
            ready = [u for u in waiting if u in self.resident]
            assert ready, "waits for an expert that nothing will bring"
            unit = self.rng.choice(ready)  # workers finish in any order
            waiting.remove(unit)
            busy.remove(unit)
            self.dispatch(loads, busy)  # type: ignore[arg-type]
        assert not loads

    def dispatch(self, loads: list[tuple[int, list[int]]], busy: set[int]) -> None:
        while loads and not busy.intersection(loads[0][1]):
            unit, victims = loads.pop(0)
            for v in victims:
                self.resident.remove(v)  # KeyError: evicts what is not in memory
                self.evictions += 1
            self.resident.add(unit)
            assert not self.other_levels(unit) & self.resident, "two levels of one expert"
            assert self.used_bytes(self.resident) <= self.arena_bytes

    def check_victims(self, units: list[int | None], plan: StepPlan) -> None:
        """Each victim is the other level of its expert, or the oldest of what is left while the bytes do not fit."""
        hits = [u for u in units if u is not None and u in self.resident]
        assert [u for u in units if u is not None][: len(hits)] == hits, "hits come before misses"
        self.by_age = [u for u in self.by_age if u not in hits] + hits
        for at, (unit, victims) in enumerate(zip(units, plan.victims, strict=True)):
            if unit is None or unit in hits:
                continue
            expected = [u for u in self.by_age if u in self.other_levels(unit)]
            left = [u for u in self.by_age if u not in expected]
            while self.used_bytes(left) + self.layout.unit_bytes[unit] > self.arena_bytes:
                expected.append(left.pop(0))
            assert list(victims) == expected
            assert not set(units[at:]) & set(victims), "evicts what this step has still to compute"
            self.by_age = [*left, unit]


def random_step(rng: random.Random, layer: int, n_experts: int) -> Step:
    n = rng.randint(1, n_experts)
    experts = sorted(rng.sample(range(n_experts), n))
    n_tokens = rng.choice([1, 1, 7])
    weights = [rng.random() * n_tokens for _ in experts]
    return Step(layer, experts, [n_tokens] * n, weights, [w * w / n_tokens for w in weights], n_tokens)


def options(rng: random.Random, name: str, n_levels: int) -> PolicyOptions:
    if name == "hobbit":
        t1 = rng.random()
        return PolicyOptions(name, t1=t1, t2=rng.uniform(t1, 1), cache="lru")
    low_level = rng.choice(["low", "skip"]) if n_levels > 1 else "skip"
    retention = rng.choice([0.0, 0.3, 0.5, 0.75, 0.9, 1.0])
    return PolicyOptions(name, retention=retention, low_level=low_level, reuse=rng.random() < 0.7, cache="lru")


@pytest.mark.parametrize("name", ["exact", "dymoe", "hobbit"])
def test_no_plan_breaks_what_the_engine_needs_and_no_eviction_is_more_than_the_bytes_require(name: str) -> None:
    seen = {"evictions": 0, "low": 0, "skip": 0, "promotions": 0}
    for seed in range(200):
        rng = random.Random(seed)
        n_layers, n_experts, n_levels = rng.randint(1, 3), rng.randint(2, 8), rng.choice([1, 2, 2, 2])
        layout = Layout(
            (n_experts,) * n_layers, n_levels, tuple(rng.randint(1, 9) for _ in range(n_layers * n_experts * n_levels))
        )
        floor = arena_floor_bytes(layout)
        arena = rng.choice([floor, rng.randint(floor, max(floor, sum(layout.unit_bytes)))])
        p: Policy = make_policy(options(rng, name, n_levels), layout, arena)
        engine = Engine(layout, arena, rng)
        for _ in range(40):
            step = random_step(rng, rng.randrange(n_layers), n_experts)
            before = set(engine.resident)
            engine.run(step, p.plan(step))
            assert tuple(engine.by_age) == p.resident and engine.resident == set(p.resident)
            assert p.used_bytes == engine.used_bytes(engine.resident) <= arena
            for u in engine.resident - before:
                seen["promotions"] += n_levels > 1 and u % 2 == HIGH and u + 1 in before
        stats = p.stats
        assert stats.uses == stats.high_uses + stats.low_uses + stats.skipped_uses
        seen["evictions"] += engine.evictions
        seen["low"] += stats.low_uses
        seen["skip"] += stats.skipped_uses
    assert seen["evictions"] > 1000  # the property was tested on something
    assert name == "exact" or min(seen.values()) > 100


def test_the_order_of_use_can_be_read_from_another_thread() -> None:
    """As the console of the server's page does while a reply is decoded."""
    cache = ExpertCache(Layout((256,), 1, (1,) * 256), 200)
    for unit in range(200):
        cache.add(unit)
    cache.renew(0)
    assert cache.oldest_use_first() == (*range(1, 200), 0)
    over, before = threading.Event(), sys.getswitchinterval()

    def use() -> None:
        at = 0
        while not over.is_set():
            at = (at + 97) % 256
            cache.renew(at) if at in cache else cache.add(at)

    thread = threading.Thread(target=use)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(3000):
            seen = cache.oldest_use_first()
            assert len(set(seen)) == len(seen) and 199 <= len(seen) <= 200
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(before)
