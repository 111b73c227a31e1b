"""Eviction rules: one contract that all pass, then each worked by hand. No model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from moe_edge.models.errors import BudgetTooSmall, UnknownName
from moe_edge.schedulers.cache import STREAM_WINDOW, ExpertCache
from moe_edge.schedulers.eviction import RULES, make_rule
from moe_edge.schedulers.eviction.decayed import Decayed
from moe_edge.schedulers.eviction.hobbit_score import HobbitScore
from moe_edge.schedulers.eviction.learned import Learned, learned_half_life
from moe_edge.schedulers.eviction.lru_admit import LruAdmit
from moe_edge.schedulers.eviction.next_use import NextUse, fitting_half_life
from moe_edge.schedulers.eviction.ranked import distances
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import DecayedUses

ONE = Layout((8,), 1, (10,) * 8)  # one layer, 8 experts of 10 bytes: expert e is unit e
TWO = Layout((4, 4), 1, (10,) * 8)  # two layers: expert e of layer l is unit 4 l + e


def step(layer: int, experts: Sequence[int], n_tokens: int = 1, counts: Sequence[int] = ()) -> Step:
    return Step(layer, list(experts), list(counts) or [n_tokens] * len(experts), n_tokens=n_tokens)


def serve(cache: ExpertCache, layout: Layout, asked: Step, level: int = 0) -> list[tuple[int, list[int]]]:
    """As a policy does it: [(unit, victims)] in plan order, hits first."""
    units = [layout.first_unit[asked.layer] + e * layout.n_levels + level for e in asked.experts]
    hits, misses = [u for u in units if u in cache], [u for u in units if u not in cache]
    cache.note(asked)
    for unit in hits:
        cache.renew(unit)
    return [(unit, []) for unit in hits] + [(unit, cache.add(unit)) for unit in misses]


def run(cache: ExpertCache, *tokens: Sequence[int], layout: Layout = ONE) -> list[int]:
    """One layer, a token each; all victims."""
    victims = []
    for experts in tokens:
        victims += [v for _, gone in serve(cache, layout, step(0, experts)) for v in gone]
        cache.learn()
    return victims


def some_layout(rng: random.Random) -> Layout:
    n_layers, n_experts, n_levels = rng.randint(1, 4), rng.randint(2, 8), rng.choice([1, 1, 2])
    one_size = rng.random() < 0.5
    n = n_layers * n_experts * n_levels
    return Layout((n_experts,) * n_layers, n_levels, tuple(5 if one_size else rng.randint(1, 9) for _ in range(n)))


def some_step(rng: random.Random, layout: Layout, layer: int) -> Step:
    n = layout.n_experts[layer]
    experts = sorted(rng.sample(range(n), rng.randint(1, n)))
    n_tokens = rng.choice([1, 1, 1, 40])
    return step(layer, experts, n_tokens, [rng.randint(1, n_tokens) for _ in experts])


# ---- the contract ------------------------------------------------------------------------------------------

every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
def test_no_unit_is_there_twice_and_no_byte_is_freed_without_need(rule: str) -> None:
    evictions = 0
    for seed in range(60):
        rng = random.Random(seed)
        layout = some_layout(rng)
        sizes, n_levels = layout.unit_bytes, layout.n_levels
        arena = rng.randint(max(sizes), sum(sizes))
        cache = ExpertCache(layout, arena, rule)
        resident: set[int] = set()
        for i in range(120):
            layer = i % layout.n_layers if rng.random() < 0.9 else rng.randrange(layout.n_layers)
            asked = some_step(rng, layout, layer)
            if n_levels > 1 and rng.random() < 0.3:  # a promotion: the other copy goes first
                unit = layout.first_unit[asked.layer] + asked.experts[0] * n_levels
                if unit + 1 in resident:
                    cache.remove(unit + 1)
                    resident.remove(unit + 1)
            if rng.random() < 0.2:
                cache.protect(rng.sample(range(len(sizes)), rng.randint(0, 2)))
            for unit, victims in serve(cache, layout, asked, rng.randrange(n_levels)):
                if unit in resident:
                    assert not victims
                    continue
                used = sum(sizes[u] for u in resident)
                for at, victim in enumerate(victims):
                    assert used + sizes[unit] > arena, f"{victims[at:]} of {victims} need not go"
                    resident.remove(victim)  # KeyError: not in memory
                    used -= sizes[victim]
                evictions += len(victims)
                resident.add(unit)
                assert used + sizes[unit] <= arena
            assert set(cache.resident) == resident and len(cache.resident) == len(resident)
            assert cache.used_bytes == sum(sizes[u] for u in resident) <= arena
            assert all((u in cache) == (u in resident) for u in range(len(sizes)))
    assert evictions > 1000


@every_rule
def test_what_the_step_uses_goes_last_and_in_plan_order(rule: str) -> None:
    for seed in range(80):
        rng = random.Random(seed)
        layout = Layout((6,) * 3, 1, (10,) * 18)
        cache = ExpertCache(layout, 10 * rng.randint(1, 10), rule)
        for i in range(60):
            before = set(cache.resident)
            plan = serve(cache, layout, some_step(rng, layout, i % 3))
            others = before - {unit for unit, _ in plan}
            served: list[int] = []
            for unit, victims in plan:
                for victim in victims:
                    if others:
                        others.remove(victim)  # KeyError: one of the step goes although others are left
                    else:
                        assert victim == served.pop(0)
                served.append(unit)


@every_rule
def test_protected_units_go_only_when_all_but_the_steps_own_are_gone(rule: str) -> None:
    cache = ExpertCache(TWO, 50, rule)
    for _ in range(3):
        serve(cache, TWO, step(0, [0, 1]))
        serve(cache, TWO, step(1, [0, 1, 2]))
    cache.protect([0, 4, 7])  # 7 is not in memory
    assert serve(cache, TWO, step(0, [2]))[0][1][0] in (1, 5, 6)
    assert serve(cache, TWO, step(0, [1, 3]))[0][1] != [0]
    assert {0, 4} <= set(cache.resident)
    for token in range(8):
        serve(cache, TWO, step(0, [2 + token % 2]))
        assert {0, 4} <= set(cache.resident)
    victims = [v for _, gone in serve(cache, TWO, step(1, [0, 1, 2, 3])) for v in gone]
    assert 0 not in victims and 4 in cache  # 4 is used: three of the others are enough
    cache = ExpertCache(TWO, 20, rule)
    serve(cache, TWO, step(0, [0, 1]))
    cache.protect([0, 1])
    assert serve(cache, TWO, step(1, [0, 1, 2])) == [(4, [0]), (5, [1]), (6, [4])]


@every_rule
def test_protection_ends_with_the_next_one(rule: str) -> None:
    cache = ExpertCache(ONE, 20, rule)
    run(cache, [0], [1])
    cache.protect([0, 1])
    cache.protect([])
    assert run(cache, [2]) == [0]


@every_rule
def test_protection_ends_with_reset(rule: str) -> None:
    cache = ExpertCache(ONE, 20, rule)
    run(cache, [0], [1])
    cache.protect([0, 1])
    cache.reset([0, 1])
    run(cache, [2])
    assert len(cache.resident) == 2 and 0 not in cache


@every_rule
def test_a_unit_added_ahead_of_its_step_stays_while_it_is_protected(rule: str) -> None:
    cache = ExpertCache(TWO, 30, rule)
    for _ in range(5):
        serve(cache, TWO, step(0, [0, 1, 2]))
    cache.protect([7])
    assert len(cache.add(7)) == 1
    serve(cache, TWO, step(1, [0, 1]))
    assert 7 in cache


@every_rule
def test_reset_starts_again_in_the_order_given(rule: str) -> None:
    rng = random.Random(1)
    layout = Layout((6,) * 3, 1, tuple(rng.randint(1, 9) for _ in range(18)))
    old = ExpertCache(layout, 40, rule)
    for i in range(50):
        serve(old, layout, some_step(rng, layout, i % 3))
    old.protect([1, 2, 3])
    start = [11, 2, 7, 6]
    old.reset(start)
    first, again = (ExpertCache(layout, 40, rule) for _ in range(2))
    first.reset(start)
    again.reset(first.resident)  # as a simulation starts from what the engine's policy says
    assert old.used_bytes == sum(layout.unit_bytes[u] for u in start)
    for i in range(80):
        asked = some_step(rng, layout, i % 3)
        assert serve(old, layout, asked) == serve(first, layout, asked) == serve(again, layout, asked)
        assert old.resident == first.resident == again.resident


@every_rule
def test_equals_go_in_the_order_of_reset(rule: str) -> None:
    cache = ExpertCache(ONE, 30, rule)
    cache.reset([4, 2, 6])
    assert cache.resident == (4, 2, 6)
    assert run(cache, [0], [1]) == [4, 2]


@every_rule
def test_a_removed_unit_is_gone(rule: str) -> None:
    cache = ExpertCache(ONE, 30, rule)
    run(cache, [0], [1], [2])
    cache.remove(1)
    assert (1 in cache, cache.used_bytes) == (False, 20)
    with pytest.raises(KeyError):
        cache.renew(1)
    with pytest.raises(KeyError):
        cache.remove(1)
    assert run(cache, [3]) == [] and 1 not in run(cache, [4], [5], [6])


@every_rule
def test_a_unit_larger_than_the_arena_is_refused_and_nothing_lost(rule: str) -> None:
    cache = ExpertCache(ONE, 9, rule)
    with pytest.raises(BudgetTooSmall, match="one expert needs 10 bytes but the expert arena has 9"):
        run(cache, [0])
    assert cache.resident == () and cache.used_bytes == 0


@every_rule
def test_a_long_run_does_not_gather_entries(rule: str) -> None:
    cache = ExpertCache(TWO, 50, rule)
    rng = random.Random(0)
    for i in range(6000):
        serve(cache, TWO, step(i % 2, sorted(rng.sample(range(4), 2))))
        if i % 3 == 0:
            cache.remove(cache.resident[0])
    heaps = getattr(cache._rule, "_heaps", [])
    assert all(len(heap) <= 16 for heap in heaps)


def test_an_unknown_rule_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown eviction rule 'lfru'; known: auto, learned, next-use, decayed, lru"):
        ExpertCache(ONE, 30, "lfru")


# ---- by hand -----------------------------------------------------------------------------------------------


def test_lru_evicts_the_oldest_use() -> None:
    assert run(ExpertCache(ONE, 20, "lru"), [0], [0], [0], [1], [2]) == [0]


def test_decayed_weighs_how_often_against_how_long_ago() -> None:
    # at the fifth token expert 0 has 1/16 + 1/8 + 1/4 and expert 1 has 1/2, at a half-life of one token
    assert run(ExpertCache(ONE, 20, Decayed(ONE, 1.0)), [0], [0], [0], [1], [2]) == [0]
    # of two tokens: 0.25 + 0.354 + 0.5 against 0.707
    assert run(ExpertCache(ONE, 20, Decayed(ONE, 2.0)), [0], [0], [0], [1], [2]) == [1]


def test_decayed_remembers_experts_that_are_not_in_memory() -> None:
    cache = ExpertCache(ONE, 20, Decayed(ONE, 16.0))
    run(cache, [0], [0], [0], [1], [1], [1], [2])  # 0 is evicted for 2
    assert cache.resident == (2, 1)
    assert run(cache, [0]) == [2]
    assert run(cache, [3]) == [1]  # 0 has four uses now


def test_below_the_working_set_lru_never_hits_and_the_frequency_rules_do() -> None:
    tokens = [([0, 1 + i % 3], [0, 1 + i % 2]) for i in range(40)]

    def hits(rule: str) -> int:
        cache, n = ExpertCache(TWO, 30, rule), 0
        for of_layers in tokens:
            for layer, experts in enumerate(of_layers):
                n += sum(4 * layer + e in cache for e in experts)
                serve(cache, TWO, step(layer, sorted(experts)))
        return n

    assert hits("lru") == 0
    assert min(hits("decayed"), hits("next-use"), hits("learned")) > 70  # of 160: two of three stay


def test_a_step_of_n_tokens_counts_as_n_tokens() -> None:
    one_by_one, together = DecayedUses(ONE, 1.0), DecayedUses(ONE, 1.0)
    for _ in range(2):
        one_by_one.note(step(0, [3]))
    together.note(step(0, [3, 4], 2, [2, 1]))
    assert one_by_one.score[3] / one_by_one.gain[0] == pytest.approx(1.5)
    assert [together.score[e] / together.gain[0] for e in (3, 4)] == pytest.approx([1.5, 0.75])
    assert together.rate(3) == pytest.approx(0.75)


def test_each_layer_has_a_clock_of_its_own() -> None:
    """A micro-batch of many tokens must not make the layers it has not come to look unused."""
    uses = DecayedUses(TWO, 1.0)
    for asked in (step(0, [0]), step(1, [0]), step(0, [1])):
        uses.note(asked)
    assert [uses.score[e] / uses.gain[uses.layer_of[e]] for e in range(8)] == [0.5, 1, 0, 0, 1, 0, 0, 0]
    before = uses.rate(4)
    uses.note(step(0, [0, 1], 500, [500, 1]))
    assert uses.rate(4) == before and uses.rate(0) > 0.99
    uses.note(step(1, [1], 500, [500]))
    assert uses.rate(4) < 1e-100


@pytest.mark.parametrize("half_life", [0.5, 3.0])
@pytest.mark.parametrize("kind", [Decayed, NextUse])
def test_victims_are_those_of_scores_worked_out_the_long_way(kind: type[Decayed], half_life: float) -> None:
    """Thousands of half-lives, so that scores are scaled many times; steps of several tokens among them."""
    layout, rng = Layout((6,) * 3, 1, (10,) * 18), random.Random(2)
    rule = Decayed(layout, half_life) if kind is Decayed else NextUse(layout, 90)
    half_life = rule._uses.half_life
    cache, scores, decay = ExpertCache(layout, 90, rule), [0.0] * 18, 0.5 ** (1 / half_life)

    def ready(unit: int, layer: int) -> float:
        if kind is Decayed:
            return -scores[unit]
        return distances(3)[layer][unit // 6] + 0.25 / (scores[unit] * (1 - decay) + 0.05)  # type: ignore[no-any-return]

    n_tokens = 1
    for i in range(3000):
        layer = i % 3
        if layer == 0:
            n_tokens = rng.choice([1, 1, 1, 5, 700])
        for e in range(6 * layer, 6 * layer + 6):
            scores[e] *= decay**n_tokens
        asked = step(layer, sorted({min(5, int(rng.expovariate(0.7))) for _ in range(2)}), n_tokens)
        for e in asked.experts:
            scores[6 * layer + e] += (1 - decay**n_tokens) / (1 - decay)
        present = set(cache.resident)
        for unit, victims in serve(cache, layout, asked):
            left = [u for u in present if u // 6 != layer or u % 6 not in asked.experts]
            for victim in victims:
                most = max(ready(u, layer) for u in left)
                assert ready(victim, layer) == pytest.approx(most, rel=1e-9, abs=1e-30)
                left.remove(victim)
                present.remove(victim)
            present.add(unit)


def test_next_use_of_equals_evicts_from_the_layer_that_comes_last() -> None:
    cache = ExpertCache(Layout((4,) * 3, 1, (10,) * 12), 30, "next-use")
    layout = Layout((4,) * 3, 1, (10,) * 12)
    for layer in range(3):
        serve(cache, layout, step(layer, [0]))
    # all used once. At layer 1, layer 2 comes next, then layer 0, then layer 1 itself
    assert serve(cache, layout, step(1, [1])) == [(5, [4])]
    assert distances(3)[1] == pytest.approx([2 / 3, 1, 1 / 3])


def test_next_use_prefers_the_expert_with_the_longer_wait_over_the_later_layer() -> None:
    cache = ExpertCache(TWO, 30, "next-use")
    for _ in range(20):
        serve(cache, TWO, step(0, [0]))
        serve(cache, TWO, step(1, [1]))
    cache.add(4)  # never used, and its layer comes next: 0.5 + 5 tokens against 1 + 0.25 / 0.8
    assert serve(cache, TWO, step(0, [3])) == [(3, [4])]


def test_learned_keeps_the_expert_that_follows_and_not_the_one_used_as_often() -> None:
    # a cycle 0 1 2 3: by frequency the expert just used looks best; the one to come next is three tokens old
    cycle = [[i % 4] for i in range(400)]
    learned, frequency = ExpertCache(ONE, 30, Learned(ONE, 30)), ExpertCache(ONE, 30, "next-use")
    run(learned, *cycle)
    run(frequency, *cycle)
    more = [[i % 4] for i in range(40)]
    assert len(run(learned, *more)) < 0.6 * len(run(frequency, *more))


def test_learned_takes_the_step_of_least_mean_squares() -> None:
    rule = Learned(ONE, 20)
    rule._uses.half_life, rule._uses._decay = 1.0, 0.5  # frequency: half of what it was, plus a half
    cache = ExpertCache(ONE, 20, rule)
    run(cache, [0, 1], [0, 2], [3, 4])  # the second step and the third need victims, and are worked out
    # after token 2, q was 0.7 * (0.75, 0.25, 0.5); token 3 used 3 and 4. Half of RATE for each of experts 0 and 2
    weights = rule._weights[0]
    assert weights[0, 3] == weights[2, 4] == pytest.approx(0.025)
    assert weights[2, :3].tolist() == pytest.approx([-0.025 * 0.525, -0.025 * 0.175, -0.025 * 0.35])
    assert not weights[1].any() and not weights[3:].any()


def test_learned_follows_the_frequency_alone_after_a_step_of_several_tokens() -> None:
    rule = Learned(ONE, 20)
    cache = ExpertCache(ONE, 20, rule)
    for i in range(30):
        serve(cache, ONE, step(0, [i % 3], 4))
    assert not any(weights.any() for weights in rule._weights)
    assert rule._chance[0].tolist() == pytest.approx(rule._frequency(0).tolist())


def test_looking_at_a_cache_changes_nothing() -> None:
    for rule in RULES:
        rng, (looked, alone) = random.Random(3), (ExpertCache(TWO, 50, rule) for _ in range(2))
        for i in range(200):
            asked = step(i % 2, sorted(rng.sample(range(4), 2)))
            assert serve(looked, TWO, asked) == serve(alone, TWO, asked)
            assert len(looked.resident) <= 5


def test_auto_is_learned_unless_the_table_would_be_large() -> None:
    assert isinstance(make_rule("auto", TWO, 40), Learned)
    many = Layout((512,) * 40, 1, (10,) * (512 * 40))  # 40 MiB of weights
    assert isinstance(make_rule("auto", many, 4000), NextUse)
    assert [learned_half_life(share) for share in (0.05, 0.25, 1.0)] == [8, 16, 32]


@pytest.mark.parametrize(("share", "half_life"), [(0.05, 8), (0.2, 8), (0.25, 10), (0.4, 16), (0.6, 24), (1.0, 32)])
def test_the_half_life_grows_with_the_arena(share: float, half_life: float) -> None:
    assert fitting_half_life(share) == pytest.approx(half_life)
    rule = make_rule("next-use", ONE, round(80 * share))
    assert isinstance(rule, NextUse) and rule._uses.half_life == pytest.approx(half_life, abs=0.01)


def test_a_refused_expert_is_the_first_victim_until_it_is_used_again() -> None:
    tokens = [0], [0], [1], [2]  # 2 displaces 0, which was used more often
    assert run(ExpertCache(ONE, 20, "lru"), *tokens, [3]) == [0, 1]
    assert run(ExpertCache(ONE, 20, "lru-admit"), *tokens, [3]) == [0, 2]
    assert run(ExpertCache(ONE, 20, "lru-admit"), *tokens, [2], [3]) == [0, 1]
    assert run(ExpertCache(ONE, 20, LruAdmit(ONE)), [0], [1], [2], [3]) == [0, 1]  # younger, as often: admitted


def test_hobbits_terms_one_by_one() -> None:
    tokens = [0], [0], [0], [1], [2]
    assert run(ExpertCache(ONE, 20, HobbitScore(ONE, (1, 0, 0, 0))), *tokens) == [0]  # R
    assert run(ExpertCache(ONE, 20, HobbitScore(ONE, (0, 1, 0, 0))), *tokens) == [1]  # F
    # 3/5 w1 + 3/5 w2 against 4/5 w1 + 1/5 w2
    assert run(ExpertCache(ONE, 20, HobbitScore(ONE, (0.6, 0.4, 0, 0))), *tokens) == [1]
    assert run(ExpertCache(ONE, 20, HobbitScore(ONE, (0.7, 0.3, 0, 0))), *tokens) == [0]
    # the layer just passed is the last to come again: at layer 0 of three it is layer 2
    layout = Layout((4,) * 3, 1, (10,) * 12)
    cache = ExpertCache(layout, 30, HobbitScore(layout, (0, 0, 0, 1)))
    cache.reset([0, 4, 8])
    assert serve(cache, layout, step(0, [1])) == [(1, [8])]


def test_hobbit_counts_high_uses_apart() -> None:
    layout = Layout((4,), 2, (10, 10) * 4)
    cache = ExpertCache(layout, 20, HobbitScore(layout, (0, 0, 1, 0)))
    for _ in range(3):
        serve(cache, layout, step(0, [0]), level=1)
    serve(cache, layout, step(0, [1]), level=0)
    assert serve(cache, layout, step(0, [2]), level=0) == [(4, [1])]  # three low uses against one high one


def test_hobbit_counts_a_conversation_at_a_time() -> None:
    cache = ExpertCache(ONE, 20, HobbitScore(ONE, (0, 1, 0, 0)))
    run(cache, [0], [0], [0], [1])
    cache.new_conversation()
    assert run(cache, [1], [2]) == [0]


@pytest.mark.parametrize("rule", ["learned", "next-use"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_a_long_prompt_keeps_a_part_of_every_layer(rule: str, share: float) -> None:
    """A cyclic scan: the best there is hits, in each round, what fits in memory but for the one that is being read."""
    n_layers, n_experts, n_rounds = 6, 48, 6
    layout = Layout((n_experts,) * n_layers, 1, (10,) * (n_layers * n_experts))
    arena_bytes = int(share * layout.total_bytes)
    cache = ExpertCache(layout, arena_bytes, rule)
    loads = 0
    for _ in range(n_rounds):
        for layer in range(n_layers):
            loads += sum(layout.first_unit[layer] + e not in cache for e in range(n_experts))
            serve(cache, layout, step(layer, list(range(n_experts)), 512, [20] * n_experts))
    n_units, fit = n_layers * n_experts, arena_bytes // 10
    best = n_units + (n_rounds - 1) * (n_units - fit + 1)
    assert best <= loads <= best + (n_rounds - 1) * 2 * STREAM_WINDOW


def test_what_is_still_read_or_computed_is_not_evicted_for_a_prompt() -> None:
    """The latest units of the plan stay, whatever the rule thinks of them."""
    layout = Layout((64, 64), 1, (10,) * 128)
    cache = ExpertCache(layout, 320, "learned")
    for number in range(8):
        planned: list[int] = []
        for unit, victims in serve(cache, layout, step(number % 2, list(range(64)), 512, [8] * 64)):
            assert not set(victims) & set(planned[-STREAM_WINDOW:])
            planned.append(unit)


def test_a_step_of_one_token_keeps_all_it_uses() -> None:
    layout = Layout((64, 64), 1, (10,) * 128)
    cache = ExpertCache(layout, 640, "learned")
    for number in range(8):
        asked = step(number % 2, list(range(number, number + 40)))
        own = {64 * asked.layer + e for e in asked.experts}
        for _, victims in serve(cache, layout, asked):
            assert not set(victims) & own
