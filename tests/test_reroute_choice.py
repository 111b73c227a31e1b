"""Policy reroute, what it chooses: values worked by hand, and the boosted ranking as the paper writes it."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

import numpy as np
import pytest
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Selection, Selections, Step
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.levels import HIGH
from moe_edge.schedulers.policies.reroute import Reroute, boosted_choice
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.settings import policy_selects, policy_warning


def reroute(resident: Iterable[int] = (), n_experts: int = 6, n_layers: int = 1, **knobs: Any) -> Reroute:
    layout = Layout((n_experts,) * n_layers, 1, (10,) * (n_experts * n_layers))
    policy = make_policy(PolicyOptions("reroute", **knobs), layout, 1000)
    assert isinstance(policy, Reroute)
    policy.reset(resident)
    return policy


def token(*scores: float, layer: int = 0, n_used: int = 2) -> Selection:
    order = sorted(range(len(scores)), key=lambda e: -scores[e])
    return Selection(layer, n_used, order, [scores[e] for e in order], [0.0] * len(scores))


def by_hand(scores: np.ndarray, n_used: int, keep_top: int, boost: float, resident: set[int]) -> set[int]:
    """The paper's rule as it is written: score + boost where in memory, the best of that, and the true top J stay."""
    order = np.argsort(-scores, kind="stable").tolist()
    boosted = {e: scores[e] + (boost if e in resident else 0.0) for e in order}
    kept = order[:keep_top]
    # of equal ones, the model's own choice first
    rest = sorted(order[keep_top:], key=lambda e: (-boosted[e], order.index(e) >= n_used, order.index(e)))
    return {*kept, *rest[: n_used - keep_top]}


@pytest.mark.parametrize("keep_top", [0, 1, 3])
@pytest.mark.parametrize("boost", [0.0, 0.05, 0.3, 2.0])
def test_the_choice_is_the_boosted_ranking(keep_top: int, boost: float) -> None:
    rng = np.random.default_rng(7)
    replaced = 0
    for _ in range(300):
        scores = rng.permutation(24)[:12] / 24.0  # no two alike
        resident = set(rng.permutation(12)[: rng.integers(0, 12)].tolist())
        order = np.argsort(-scores).tolist()
        found = boosted_choice(
            order, [scores[e] for e in order], 4, keep_top, boost + 1e-9 * (boost > 0), resident.__contains__
        )
        chosen = set(order[:4] if found is None else found)
        assert chosen == by_hand(scores, 4, keep_top, boost + 1e-9 * (boost > 0), resident)
        assert chosen >= set(order[:keep_top]) and len(chosen) == 4
        assert set(order[:4]) - chosen <= set(order) - resident and chosen - set(order[:4]) <= resident
        replaced += found is not None
    assert (replaced > 0) == (boost > 0)


def test_an_expert_in_memory_replaces_one_that_is_not_within_the_reach() -> None:
    policy = reroute(resident=[2], strength=0.2, score_range="token")  # range 1: reach 0.2
    assert policy.select(token(1.0, 0.5, 0.35, 0.0)) == [0, 2]
    assert policy.select(token(1.0, 0.5, 0.25, 0.0)) is None  # too far behind
    assert policy.select(token(0.9, 0.5, 1.0, 0.0)) is None  # the best stays; it is 0 that is next, and it is absent
    assert reroute(resident=[1, 2], strength=0.2, score_range="token").select(token(1.0, 0.5, 0.45, 0.0)) is None


def test_the_best_keep_top_stay() -> None:
    scores = token(1.0, 0.95, 0.93, 0.9, 0.0)
    assert reroute(resident=[2, 3], strength=0.5, keep_top=2).select(scores) is None
    assert reroute(resident=[2, 3], strength=0.5, keep_top=1).select(scores) == [0, 2]
    assert set(reroute(resident=[2, 3], strength=0.5, keep_top=0).select(scores) or ()) == {2, 3}


def test_the_mean_range_is_of_the_layer_and_of_all_tokens_so_far() -> None:
    policy = reroute(resident=[2], n_layers=2, strength=0.2)
    assert policy.select(token(1.0, 0.5, 0.35, 0.0)) == [0, 2]  # range 1
    assert policy.select(token(0.2, 0.1, 0.0, 0.0)) == [0, 2]  # the mean of 1 and 0.2 is 0.6, its reach 0.12
    assert reroute(resident=[2], strength=0.2, score_range="token").select(token(0.2, 0.1, 0.0, 0.0)) is None
    fresh = reroute(resident=[8], n_layers=2, strength=0.2)
    fresh.select(token(1.0, 0.5, 0.35, 0.0))
    assert fresh.select(token(0.2, 0.1, 0.05, 0.0, layer=1)) is None  # the other layer's mean is 0.2, its reach 0.04


def test_experts_of_a_group_that_is_left_out_are_never_taken() -> None:
    policy = reroute(resident=[2, 3], strength=0.2, score_range="token")
    assert policy.select(token(1.0, 0.9, -inf, -inf, 0.8, 0.0)) is None
    assert policy.select(token(1.0, 0.9, -inf, 0.85, 0.8, 0.0)) == [0, 3]


def many(*rows: tuple[float, ...], n_used: int = 2) -> Selections:
    scores = np.array(rows, np.float32)
    return Selections(0, n_used, np.argsort(-scores, axis=1, kind="stable").astype(np.int32), scores)


def test_in_a_prompt_only_experts_that_few_tokens_would_read_are_replaced() -> None:
    policy = reroute(resident=[5], strength=1.0, few_tokens=1, score_range="token")
    a, b = (1.0, 0.9, 0.0, 0.1, 0.2, 0.8), (1.0, 0.0, 0.9, 0.1, 0.2, 0.8)
    found = policy.select_many(many(a, a, b))
    assert found is not None
    assert found.tolist() == [[0, 1], [0, 1], [0, 5]]  # 1 is read for two tokens; 2 would be for one
    assert policy.select_many(many(a, a, b, b)) is None
    assert reroute(resident=[5], strength=1.0, few_tokens=0).select_many(many(a, a, b)) is None


def test_in_a_prompt_an_expert_that_is_read_anyway_is_at_hand_for_others() -> None:
    policy = reroute(strength=1.0, few_tokens=1, score_range="token")
    a, b = (1.0, 0.9, 0.1, 0.0), (0.9, 0.8, 1.0, 0.85)  # b's second would be 0, which all of a's tokens keep
    found = policy.select_many(many(a, (0.9, 0.8, 0.1, 1.0), b))
    assert found is None or all(len(set(row)) == 2 for row in found.tolist())
    rows = policy.select_many(many(a, a, (0.8, 0.7, 0.1, 1.0), (0.6, 0.7, 1.0, 0.5)))
    assert rows is None or rows.tolist()[3][0] == 2


def test_one_token_of_many_is_as_one_alone() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        scores = rng.permutation(8) / 8.0
        resident = rng.permutation(8)[:4].tolist()
        knobs: dict[str, Any] = {"n_experts": 8, "strength": 0.3, "score_range": "token"}
        one = reroute(resident, **knobs).select(token(*scores, n_used=3))
        several = reroute(resident, **knobs).select_many(many(tuple(scores), n_used=3))
        own = np.argsort(-scores)[:3].tolist()
        assert (own if one is None else list(one)) == (own if several is None else several[0].tolist())


def test_of_predicted_experts_those_that_stay_are_worth_a_read() -> None:
    step = Step(0, [1, 3, 5], [1, 1, 1], [0.2, 0.5, 0.3], [0.04, 0.25, 0.09])
    assert reroute(strength=0.1).wishes(step) == [SKIP, HIGH, SKIP]
    assert reroute(strength=0.1, keep_top=2).wishes(step) == [SKIP, HIGH, HIGH]
    assert reroute(strength=0.0).wishes(step) == [HIGH] * 3


def test_wrong_knobs_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--strength -1 is not a share of the range"):
        reroute(strength=-1)
    with pytest.raises(UsageError, match=r"--keep-top 1\.5 is not a whole number"):
        reroute(keep_top=1.5)
    with pytest.raises(UnknownName, match="unknown score range 'all'; known: mean, token"):
        reroute(score_range="all")


def test_it_takes_part_in_the_choice_only_where_it_is_strong() -> None:
    asked = PolicyOptions("reroute")
    assert policy_selects(asked, None) and "same seed" in policy_warning(asked, None)
    assert not policy_selects(PolicyOptions("reroute", strength=0.0), None)
    assert not policy_selects(PolicyOptions(), None) and not policy_warning(PolicyOptions(), None)
