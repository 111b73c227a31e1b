"""DyMoE, HOBBIT and exact: who gets which level. Values worked by hand; no model."""

from __future__ import annotations

import random
from dataclasses import replace
from math import ceil, cos, pi

import numpy as np
import pytest
from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.formats.floats import Float64Array
from moe_edge.schedulers.layout import SKIP, Layout, Routing, Step
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.depth import at_least_one, calibrated, cosine, depth_schedule
from moe_edge.schedulers.policies.dymoe import DyMoE
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policies.hobbit import Hobbit, fit_thresholds
from moe_edge.schedulers.policies.importance import expected_damage, gate_mass, heavy_hitters, most_important
from moe_edge.schedulers.policies.levels import HIGH, LOW, PolicyStats
from moe_edge.schedulers.policy import Policy, make_policy


def layout(n_layers: int = 1, n_experts: int = 4, n_levels: int = 2) -> Layout:
    return Layout((n_experts,) * n_layers, n_levels, (10, 4)[:n_levels] * (n_layers * n_experts))


def calibration(
    n_layers: int = 1,
    n_experts: int = 4,
    low: Float64Array | None = None,
    removed: Float64Array | None = None,
    use_damage: Float64Array | None = None,
    cumulated: Float64Array | None = None,
    settings: tuple[Setting, ...] = (),
    levels: tuple[str, ...] = ("Q4_0", "Q2_K"),
) -> Calibration:
    """low, removed: [L, E], the damage of a use with gate weight 1."""
    ones = np.ones((n_layers, n_experts))
    low = ones if low is None else low
    removed = 2 * low if removed is None else removed
    return Calibration(
        text_sha256="",
        n_tokens=1,
        levels=levels,
        counts=ones.astype(np.int64),
        mean_gate=ones,
        squares=ones,
        sensitivity=np.ones(n_layers),
        error=np.stack([0 * ones, *[low] * (len(levels) - 1), removed], axis=-1),
        cumulated=np.linspace(0, 1, 101) if cumulated is None else cumulated,
        use_damage=np.tile(np.linspace(0, 1, 101), (n_layers, 1)) if use_damage is None else use_damage,
        settings=settings,
    )


def one_token(layer: int, **weights: float) -> Step:
    """one_token(0, e1=0.7, e3=0.3)"""
    g = list(weights.values())
    return Step(layer, [int(name[1:]) for name in weights], [1] * len(g), g, [w * w for w in g])


def levels(policy: Policy, step: Step) -> dict[int, int]:
    """{expert: level computed}"""
    plan = policy.plan(step)
    if plan is None:
        return dict.fromkeys(step.experts, HIGH)
    return {step.experts[i]: level for i, level in zip(plan.order, plan.levels, strict=True)}


def dymoe(options: PolicyOptions, units: Layout, arena_bytes: int = 10**6, known: Calibration | None = None) -> DyMoE:
    policy = make_policy(replace(options, name="dymoe"), units, arena_bytes, known)
    assert isinstance(policy, DyMoE)
    return policy


# depth


def test_the_cosine_falls_from_1_to_twice_the_mean_less_1() -> None:
    assert cosine(0.75, 3) == pytest.approx((1.0, 0.75, 0.5))
    assert cosine(0.9, 5) == pytest.approx((1.0, 0.970711, 0.9, 0.829289, 0.8), abs=1e-6)
    lo = 2 * 0.9 - 1  # as PAPERS.md, section 1, writes it
    assert cosine(0.9, 48) == pytest.approx([lo + (1 - lo) * (1 + cos(pi * i / 47)) / 2 for i in range(48)])


def test_below_one_half_the_cosine_falls_to_0_instead() -> None:
    assert cosine(0.25, 3) == pytest.approx((0.5, 0.25, 0.0))
    assert cosine(0.5, 3) == pytest.approx((1.0, 0.5, 0.0))


@pytest.mark.parametrize("kind", ["cosine", "flat", "calibrated", "auto"])
@pytest.mark.parametrize("retention", [0.0, 0.1, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("n_layers", [1, 2, 7])
def test_every_depth_schedule_has_the_mean_and_stays_a_share(kind: str, retention: float, n_layers: int) -> None:
    spread = np.sort(np.random.default_rng(3).random((n_layers, 101)), axis=1)
    shares = depth_schedule(kind, retention, n_layers, calibration(n_layers, use_damage=spread))
    assert len(shares) == n_layers and all(0 <= r <= 1 for r in shares)
    assert sum(shares) / n_layers == pytest.approx(retention, abs=1e-9)
    if retention in (0, 1):
        assert shares == (retention,) * n_layers  # exactly


def test_auto_depth_is_calibrated_where_it_can_be() -> None:
    known = calibration(2, use_damage=np.array([np.linspace(0, 1, 101), np.linspace(0, 3, 101)]))
    assert depth_schedule("auto", 0.5, 2, known) == calibrated(0.5, known)
    assert depth_schedule("auto", 0.5, 2, None) == cosine(0.5, 2)


def test_calibrated_depth_by_hand() -> None:
    # uniform damage on 0..1 and on 0..3: above 0.75 lie 25 % and 75 %
    known = calibration(2, use_damage=np.array([np.linspace(0, 1, 101), np.linspace(0, 3, 101)]))
    assert calibrated(0.5, known) == pytest.approx((0.25, 0.75))


@pytest.mark.parametrize("retention", [0.2, 0.5, 0.9])
def test_calibrated_depth_is_what_ranking_all_uses_by_damage_gives(retention: float) -> None:
    uses = np.random.default_rng(1).lognormal(-8, 3, (5, 4000)) * np.array([[0.1], [1], [3], [10], [30]])
    known = calibration(5, use_damage=np.quantile(uses, np.linspace(0, 1, 101), axis=1).T)
    threshold = np.sort(uses.ravel())[round((1 - retention) * uses.size)]
    assert calibrated(retention, known) == pytest.approx((uses >= threshold).mean(axis=1), abs=0.012)


def test_calibrated_depth_keeps_the_mean_where_many_uses_are_alike() -> None:
    row = np.concatenate([np.zeros(81), np.linspace(0.1, 1, 20)])  # 80 % of the uses do no damage at all
    known = calibration(2, use_damage=np.array([row, row]))
    assert calibrated(0.5, known) == pytest.approx((0.5, 0.5))
    assert calibrated(0.5, calibration(2, use_damage=np.zeros((2, 101)))) == pytest.approx((0.5, 0.5))


# importance


def test_importance_in_decode_is_the_gate_weight_or_the_damage() -> None:
    step = one_token(0, e0=0.5, e1=0.3, e2=0.2)
    assert gate_mass(step) == [0.5, 0.3, 0.2]
    assert expected_damage(step, [[1.0, 2.0, 10.0, 9.0]]) == pytest.approx([0.25, 0.18, 0.4])
    assert gate_mass(Step(0, [0, 1], [3, 1])) == [3, 1]  # without weights: counts


def test_ties_go_to_the_lower_expert() -> None:
    assert most_important([1.0, 2.0, 1.0, 2.0], 3) == [1, 3, 0]


def prefill(attention: list[float] | None) -> Step:
    """Five tokens, top 2 of 4 experts."""
    experts = np.array([[0, 1], [0, 2], [1, 2], [2, 3], [0, 3]], np.int32)
    weights = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.5, 0.5]], np.float32)
    mass = [2.2, 0.8, 1.1, 0.9]
    squares = [0.81 + 0.64 + 0.25, 0.01 + 0.49, 0.04 + 0.09 + 0.36, 0.16 + 0.25]
    routing = Routing(experts, weights, None if attention is None else np.array(attention, np.float32))
    return Step(0, [0, 1, 2, 3], [3, 2, 3, 2], mass, squares, 5, routing)


def test_heavy_hitters_are_counted_for_each_expert_and_mass_breaks_ties() -> None:
    # ceil(0.4 * 5) = 2 tokens: 3 and 2, routed to (2, 3) and (1, 2)
    counted = heavy_hitters(prefill([0.1, 0.2, 0.5, 0.9, 0.3]), 0.4)
    assert [int(c) for c in counted] == [0, 1, 2, 1]
    assert most_important(counted, 4) == [2, 3, 1, 0]  # 3 has more mass than 1


def test_the_number_of_heavy_hitters_is_rounded_up_and_ties_go_to_the_earlier_token() -> None:
    assert [int(c) for c in heavy_hitters(prefill([1.0] * 5), 0.21)] == [2, 1, 1, 0]  # ceil(1.05) = 2: tokens 0 and 1
    assert [int(c) for c in heavy_hitters(prefill([1.0] * 5), 0.2)] == [1, 1, 0, 0]
    assert [int(c) for c in heavy_hitters(prefill([1.0] * 5), 1.0)] == [3, 2, 3, 2]


def test_seven_percent_of_100_tokens_are_seven_and_ties_stay_in_order_however_many() -> None:
    experts = np.arange(100, dtype=np.int32)[:, None]
    routing = Routing(experts, np.ones((100, 1), np.float32), np.ones(100, np.float32))
    step = Step(0, range(100), [1] * 100, [1.0] * 100, [1.0] * 100, 100, routing)
    counted = heavy_hitters(step, 0.07)  # 0.07 * 100 is 7.000000000000001 in floating point
    assert [int(c) for c in counted] == [1] * 7 + [0] * 93


def test_without_attention_the_mass_decides() -> None:
    assert heavy_hitters(prefill(None), 0.4) == [2.2, 0.8, 1.1, 0.9]


@pytest.mark.parametrize(
    ("prefill_importance", "high"), [("mass", {0, 2}), ("attention", {2, 3}), ("damage", {1, 3}), ("auto", {1, 3})]
)
def test_prefill_ranks_by_the_importance_asked_for(prefill_importance: str, high: set[int]) -> None:
    known = calibration(low=np.array([[1.0, 9.0, 1.0, 9.0]]))
    policy = dymoe(
        PolicyOptions(retention=0.5, depth="flat", prefill_importance=prefill_importance), layout(), known=known
    )
    got = levels(policy, prefill([0.1, 0.2, 0.5, 0.9, 0.3]))
    assert {e for e, level in got.items() if level == HIGH} == high


@pytest.mark.parametrize("low_level", ["low", "skip"])
def test_decode_damage_is_that_of_the_level_that_replaces_the_high_one(low_level: str) -> None:
    known = calibration(low=np.array([[1.0, 1, 1, 9]]), removed=np.array([[9.0, 9, 9, 9]]))
    policy = dymoe(PolicyOptions(retention=0.5, low_level=low_level), layout(), known=known)
    other = LOW if low_level == "low" else SKIP
    # 0.36 against 0.16 * 9 for low; 0.36 * 9 against 0.16 * 9 for skip
    expected = {0: other, 3: HIGH} if low_level == "low" else {0: HIGH, 3: other}
    assert levels(policy, one_token(0, e0=0.6, e3=0.4)) == expected


def test_only_attention_importance_asks_for_the_routing() -> None:
    def wants(**knobs: object) -> tuple[bool, bool]:
        policy = make_policy(PolicyOptions("dymoe", **knobs), layout(), 100)  # type: ignore[arg-type]
        return policy.wants_routing, policy.wants_attention

    assert wants() == (False, False)
    assert wants(prefill_importance="mass") == (False, False)
    assert wants(prefill_importance="attention") == (True, True)
    assert wants(prefill_importance="attention", retention=1.0) == (False, False)
    for name in ("exact", "hobbit"):
        policy = make_policy(PolicyOptions(name), layout(), 100)
        assert (policy.wants_routing, policy.wants_attention) == (False, False)


# DyMoE


def test_the_most_important_get_the_high_level_and_the_rest_the_low_one() -> None:
    policy = dymoe(PolicyOptions(retention=0.5, depth="flat"), layout())
    assert levels(policy, one_token(0, e0=0.1, e1=0.4, e2=0.3, e3=0.2)) == {0: LOW, 1: HIGH, 2: HIGH, 3: LOW}
    policy = dymoe(PolicyOptions(retention=0.5, depth="flat", low_level="skip"), layout())
    assert levels(policy, one_token(0, e0=0.1, e1=0.4, e2=0.3, e3=0.2)) == {0: SKIP, 1: HIGH, 2: HIGH, 3: SKIP}


def wanted_high_share(retention: float, n_layers: int, top_k: int, n_tokens: int = 50, depth: str = "cosine") -> float:
    policy = dymoe(PolicyOptions(retention=retention, depth=depth), layout(n_layers, 16))
    rng = random.Random(0)
    for _ in range(n_tokens):
        for layer in range(n_layers):
            experts = sorted(rng.sample(range(16), top_k))
            weights = [rng.random() for _ in experts]
            policy.plan(Step(layer, experts, [1] * top_k, weights, weights))
    s = policy.stats
    assert s.wanted_high + s.wanted_low == s.uses == n_tokens * n_layers * top_k
    return s.wanted_high / s.uses


@pytest.mark.parametrize("depth", ["cosine", "flat"])
@pytest.mark.parametrize(
    ("retention", "n_layers", "top_k"),
    [(0.75, 32, 2), (0.9, 48, 8), (0.9, 32, 2), (0.75, 48, 8), (0.6, 32, 2), (0.3, 48, 8), (0.9, 1, 4), (1.0, 32, 2)],
)
def test_the_share_wanted_high_is_the_retention(retention: float, n_layers: int, top_k: int, depth: str) -> None:
    assert wanted_high_share(retention, n_layers, top_k, depth=depth) == pytest.approx(retention, abs=0.01)


def test_rounding_up_would_make_the_mode_do_nothing() -> None:
    assert sum(ceil(2 * r - 1e-9) for r in cosine(0.75, 32)) / 64 == pytest.approx(0.98, abs=0.005)
    assert wanted_high_share(0.75, 32, 2) == pytest.approx(0.75, abs=0.001)


def test_what_rounding_leaves_goes_to_the_next_step_of_the_layer() -> None:
    policy = dymoe(PolicyOptions(retention=0.7, depth="flat"), layout(2))
    step = one_token(0, e0=0.5, e1=0.3, e2=0.2)
    wanted = []
    for _ in range(20):
        before = policy.stats.copy()
        policy.plan(step)
        wanted.append(policy.stats.since(before).wanted_high)
        policy.plan(one_token(1, e0=0.5, e1=0.3, e2=0.2))  # what another layer rounds away is its own
    # 2.1 a step, half an expert behind at the start of layer 0: 2 (-0.4 left), 2 (-.3), 2 (-.2), 2 (-.1)
    assert wanted[:4] == [2] * 4
    assert policy.stats.wanted_high in (83, 84, 85)  # 2 layers x 20 steps x 2.1 = 84


def test_decode_wants_at_least_one_high_expert() -> None:
    policy = dymoe(PolicyOptions(retention=0.0), layout())
    for _ in range(100):
        assert levels(policy, one_token(0, e0=0.7, e1=0.3)) == {0: HIGH, 1: LOW}
    assert policy.stats.wanted_high == 100


def test_the_guard_takes_its_experts_from_the_other_layers() -> None:
    # r = 1, 0.6, 0.2 on three layers of 2: none may be below 0.5, so 0.2 is taken from the first
    assert at_least_one((1.0, 0.6, 0.2), 2) == pytest.approx((0.8, 0.5, 0.5))
    assert at_least_one((1.0, 0.6, 0.2), 8) == (1.0, 0.6, 0.2)
    assert at_least_one((0.4, 0.2), 2) == (0.5, 0.5)  # more than the mean allows: one each


def test_prefill_and_decode_round_apart() -> None:
    policy = dymoe(PolicyOptions(retention=0.7, depth="flat"), layout())
    several = Step(0, [0, 1], [5, 5], [6.0, 4.0], [5.0, 3.0], 10)
    alone = one_token(0, e0=0.7, e1=0.3)
    wanted = []
    for step in (several, several, alone, several, alone):
        before = policy.stats.copy()
        policy.plan(step)
        wanted.append(policy.stats.since(before).wanted_high)
    assert wanted == [1, 1, 1, 2, 1]  # 0.9, 1.3 | 0.9 | 1.7 | 1.3; with one carry the third is 1.7


def test_reset_forgets_what_rounding_owes() -> None:
    policy = dymoe(PolicyOptions(retention=0.7, depth="flat", reuse=False), layout())
    for _ in range(5):
        policy.reset([])
        assert levels(policy, one_token(0, e0=0.7, e1=0.3)) == {0: HIGH, 1: LOW}


def test_all_resident_at_the_high_level_is_answered_by_none_and_wishes_are_counted_all_the_same() -> None:
    policy = dymoe(PolicyOptions(retention=0.5, depth="flat", cache="lru"), layout())
    policy.reset([0, 2, 4, 6])
    assert policy.plan(one_token(0, e0=0.7, e1=0.3)) is None
    assert policy.stats == PolicyStats(uses=2, high_uses=2, wanted_high=1, wanted_low=1)
    assert policy.resident == (4, 6, 0, 2)


def test_without_reuse_a_resident_high_copy_gives_way_to_the_low_wish() -> None:
    policy = dymoe(PolicyOptions(retention=0.5, depth="flat", reuse=False), layout())
    policy.reset([0, 2])
    plan = policy.plan(one_token(0, e0=0.7, e1=0.3))
    assert plan == ([0, 1], [HIGH, LOW], [(), [2]])
    policy = dymoe(PolicyOptions(retention=1.0, reuse=False), layout())
    policy.reset([0, 2])
    assert policy.plan(one_token(0, e0=0.7, e1=0.3)) is None


@pytest.mark.parametrize("n_levels", [1, 2])
@pytest.mark.parametrize("low_level", ["low", "skip"])
@pytest.mark.parametrize("reuse", [True, False])
def test_retention_1_is_exact(n_levels: int, low_level: str, reuse: bool) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        sizes = tuple(rng.randint(2, 9) for _ in range(3 * 8 * n_levels))
        units, arena = Layout((8, 8, 8), n_levels, sizes), rng.randint(20, 120)
        options = PolicyOptions("dymoe", retention=1.0, low_level=low_level, reuse=reuse)
        exact, other = make_policy(PolicyOptions(), units, arena), make_policy(options, units, arena)
        assert isinstance(exact, ExactLru) and isinstance(other, DyMoE)
        start = rng.sample(range(len(sizes)), 2)
        exact.reset(start)
        other.reset(start)
        for _ in range(60):
            experts = sorted(rng.sample(range(8), rng.randint(1, 6)))
            weights = [rng.random() for _ in experts]
            step = Step(rng.randrange(3), experts, [1] * len(experts), weights, weights, rng.choice([1, 9]))
            assert exact.plan(step) == other.plan(step)
            assert exact.resident == other.resident
        assert exact.stats == replace(other.stats, expected_damage=0.0)


# HOBBIT


def test_the_miss_rule_on_two_experts() -> None:
    policy = make_policy(PolicyOptions("hobbit"), layout(), 10**6)
    assert isinstance(policy, Hobbit) and (policy.t1, policy.t2) == (0.6, 0.9)
    assert policy.wishes(one_token(0, e0=0.45, e1=0.55)) == [HIGH, HIGH]  # 0.55 before the second: not above 0.6
    assert policy.wishes(one_token(0, e0=0.3, e1=0.7)) == [LOW, HIGH]
    assert policy.wishes(one_token(0, e0=0.05, e1=0.95)) == [SKIP, HIGH]
    assert policy.wishes(one_token(0, e0=0.1, e1=0.4)) == [LOW, HIGH]  # 0.8 once they sum to 1
    assert policy.wishes(one_token(0, e2=1.0)) == [HIGH]


def test_the_miss_rule_on_eight_experts_and_on_the_threshold() -> None:
    policy = make_policy(PolicyOptions("hobbit", t1=0.5, t2=0.875), layout(), 10**6)
    assert isinstance(policy, Hobbit)
    step = Step(0, list(range(8)), [1] * 8, [8, 4, 2, 2, 4, 8, 2, 2])  # of 32; s in falling order of weight:
    # e0 0, e5 .25, e1 .5, e4 .625, e2 .75, e3 .8125, e6 .875, e7 .9375
    assert policy.wishes(step) == [HIGH, HIGH, LOW, LOW, LOW, HIGH, LOW, SKIP]


def test_the_first_expert_is_always_high() -> None:
    policy = make_policy(PolicyOptions("hobbit", t1=0.0, t2=0.0), layout(), 10**6)
    assert levels(policy, one_token(0, e0=0.5, e1=0.5)) == {0: HIGH, 1: SKIP}
    assert levels(policy, one_token(0, e2=0.0, e3=0.0)) == {2: HIGH, 3: HIGH}  # no weight at all: nothing is before e3


def test_only_misses_are_degraded() -> None:
    policy = make_policy(PolicyOptions("hobbit"), layout(), 10**6)
    policy.reset([0, 3])
    # e0 high in memory for a skip wish; e1 low in memory for a low wish; e2 absent, wanted high
    plan = policy.plan(one_token(0, e0=0.05, e1=0.25, e2=0.7))
    assert plan == ([0, 1, 2], [HIGH, LOW, HIGH], [(), (), []])
    assert policy.stats == PolicyStats(uses=3, high_uses=2, low_uses=1, wanted_high=1, wanted_low=1)
    assert policy.plan(one_token(0, e0=0.1, e2=0.9)) is None


def test_a_low_copy_serves_a_skip_wish_and_is_promoted_for_a_high_one() -> None:
    policy = make_policy(PolicyOptions("hobbit"), layout(), 10**6)
    policy.reset([1, 4])
    assert policy.plan(one_token(0, e0=0.05, e2=0.95)) == ([0, 1], [LOW, HIGH], [(), ()])
    assert policy.plan(one_token(0, e0=0.95, e2=0.05)) == ([1, 0], [HIGH, HIGH], [(), [1]])


def test_with_one_level_a_low_wish_reads_the_level_there_is_and_a_skip_stays() -> None:
    policy = make_policy(PolicyOptions("hobbit"), layout(n_levels=1), 10**6)
    assert levels(policy, one_token(0, e0=0.3, e1=0.7)) == {0: HIGH, 1: HIGH}
    assert levels(policy, one_token(0, e2=0.05, e3=0.95)) == {2: SKIP, 3: HIGH}


def test_in_prefill_the_rule_takes_shares_of_the_mass() -> None:
    policy = make_policy(PolicyOptions("hobbit"), layout(), 10**6)
    step = Step(0, [0, 1, 2], [9, 1, 2], [7.0, 0.5, 2.5], [6.0, 0.2, 1.0], 10)
    assert levels(policy, step) == {0: HIGH, 2: LOW, 1: SKIP}  # s: 0, 0.7, 0.95


def test_thresholds_are_fitted_to_the_shares_of_the_paper() -> None:
    assert fit_thresholds(None) == (0.6, 0.9)
    known = calibration(cumulated=np.linspace(0, 1, 101) ** 2)
    assert fit_thresholds(known) == pytest.approx((0.67**2, 0.97**2))
    policy = make_policy(PolicyOptions("hobbit", t2=0.95), layout(), 100, known)
    assert isinstance(policy, Hobbit) and (policy.t1, policy.t2) == pytest.approx((0.67**2, 0.95))


def test_fitted_thresholds_split_the_uses_67_30_3() -> None:
    rng = np.random.default_rng(0)
    g = -np.sort(-rng.dirichlet(np.full(8, 0.5), 4000), axis=1)
    s = np.cumsum(g, axis=1) - g
    policy = make_policy(
        PolicyOptions("hobbit"),
        layout(1, 8),
        10**6,
        calibration(1, 8, cumulated=np.quantile(s, np.linspace(0, 1, 101))),
    )
    assert isinstance(policy, Hobbit)
    wishes = [w for row in g for w in policy.wishes(Step(0, list(range(8)), [1] * 8, row.tolist()))]
    shares = [wishes.count(level) / len(wishes) for level in (HIGH, LOW, SKIP)]
    assert shares == pytest.approx([0.67, 0.30, 0.03], abs=0.002)


# counts


def test_expected_damage_sums_low_and_skipped_uses() -> None:
    known = calibration(low=np.array([[1.0, 2, 3, 4]]), removed=np.array([[10.0, 20, 30, 40]]))
    policy = make_policy(PolicyOptions("hobbit", t1=0.5, t2=0.9), layout(), 10**6, known)
    policy.plan(one_token(0, e0=0.8, e1=0.15, e3=0.05))  # high, low, skip
    assert policy.stats.expected_damage == pytest.approx(0.15**2 * 2 + 0.05**2 * 40)
    before = policy.stats.copy()
    policy.plan(one_token(0, e1=0.3, e0=0.7))  # the low copy of 1 serves again
    assert policy.stats.since(before) == PolicyStats(
        2,
        1,
        1,
        0,
        0,
        1,
        0,
        expected_damage=pytest.approx(0.3**2 * 2),  # type: ignore[arg-type]
    )
    assert before.uses == 3 and policy.stats.uses == 5
