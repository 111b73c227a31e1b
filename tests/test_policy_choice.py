"""Which policy is made of what is asked for: knobs, measured settings, calibrations that fit."""

from __future__ import annotations

import pytest
from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.schedulers.layout import SKIP
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.dymoe import DyMoE
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policies.levels import HIGH, PolicyStats
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.settings import choose_setting, describe_setting, resolve_options
from test_policies import calibration, layout, levels, one_token


def test_expected_damage_is_none_without_a_calibration_and_nothing_for_exact() -> None:
    step = one_token(0, e0=0.8, e1=0.2)
    policy = make_policy(PolicyOptions("dymoe", retention=0.5), layout(), 10**6)
    policy.plan(step)
    assert policy.stats.low_uses == 1 and policy.stats.expected_damage is None
    assert policy.stats.since(PolicyStats()).expected_damage is None
    exact = make_policy(PolicyOptions(), layout(), 10**6)
    exact.plan(step)
    assert exact.stats == PolicyStats(uses=2, high_uses=2, wanted_high=2, expected_damage=0.0)


# settings

TABLE = (
    Setting("dymoe", "skip", 0.5, 0.20, 0.55),
    Setting("dymoe", "low", 0.5, 0.03, 0.75),
    Setting("dymoe", "low", 0.75, 0.025, 0.75),
    Setting("dymoe", "low", 0.9, 0.01, 0.95),
    Setting("hobbit", "low", 0.9, 0.001, 1.02),
)


def test_max_kld_chooses_the_fewest_bytes_within_the_bound() -> None:
    known = calibration(settings=TABLE)
    assert choose_setting(known, 1.0) == TABLE[0]
    assert choose_setting(known, 0.20) == TABLE[0]  # the bound itself is allowed
    assert choose_setting(known, 0.1) == TABLE[2]  # as few bytes as the row before, closer to exact
    assert choose_setting(known, 0.02) == TABLE[3]
    assert choose_setting(known, 0.005) is None  # a row that reads more than exact is no use
    assert choose_setting(known, 0.0) is None


def test_max_kld_sets_the_policy_and_its_knobs() -> None:
    known = calibration(settings=TABLE)
    asked = PolicyOptions(depth="flat", max_kld=0.1)
    expected = PolicyOptions("dymoe", retention=0.75, low_level="low", depth="flat")
    assert resolve_options(asked, known) == expected
    assert resolve_options(expected, known) is expected
    policy = make_policy(asked, layout(), 100, known)
    assert isinstance(policy, DyMoE) and policy.retention == (0.75,)
    assert isinstance(make_policy(PolicyOptions("dymoe", max_kld=0.0), layout(), 100, known), ExactLru)


def test_the_chosen_setting_is_said_in_a_sentence() -> None:
    assert describe_setting(TABLE[2], 0.1) == (
        "--max-kld 0.1: --policy dymoe --retention 0.75 --low-level low, measured at 0.025 nats per token "
        "and 75% of the bytes of exact"
    )
    assert describe_setting(None, 0.001) == "--max-kld 0.001: exact, as no measured setting reads less within that"


@pytest.mark.parametrize("known", [None, calibration()])
def test_max_kld_without_measured_settings_is_refused(known: Calibration | None) -> None:
    with pytest.raises(UsageError, match="convert it with --calibrate"):
        make_policy(PolicyOptions(max_kld=0.1), layout(), 100, known)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "dymo"}, "unknown policy 'dymo'; known: exact, dymoe, hobbit"),
        ({"depth": "sine"}, "unknown depth schedule 'sine'; known: auto, cosine, calibrated, flat"),
        ({"importance": "mass"}, "unknown importance 'mass'; known: auto, gate, damage"),
        ({"prefill_importance": "gate"}, "unknown prefill importance 'gate'; known: auto, mass, attention, damage"),
        ({"low_level": "none"}, "unknown low level 'none'; known: low, skip"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(knobs: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        make_policy(PolicyOptions(**knobs), layout(), 100)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PolicyOptions("dymoe", retention=1.1), "--retention 1.1 is outside 0 to 1"),
        (PolicyOptions("dymoe", retention=float("nan")), "--retention nan is outside"),
        (PolicyOptions("dymoe", heavy_share=0.0), "heavy share 0 is outside"),
        (PolicyOptions("dymoe", depth="calibrated"), "depth schedule 'calibrated' needs a calibration.*--calibrate"),
        (PolicyOptions("dymoe", importance="damage"), "importance 'damage' needs a calibration.*--calibrate"),
        (PolicyOptions("dymoe", prefill_importance="damage"), "prefill importance 'damage' needs.*--calibrate"),
        (PolicyOptions("dymoe", t1=0.5), "--t1 is hobbit's and the policy is dymoe"),
        (PolicyOptions("hobbit", t1=0.9, t2=0.6), "t1 0.9 and t2 0.6 do not satisfy"),
        (PolicyOptions("hobbit", t1=0.95), "t1 0.95 and t2 0.9 do not satisfy"),
        (PolicyOptions("hobbit", t2=1.5), "t1 0.6 and t2 1.5 do not satisfy"),
        (PolicyOptions(max_kld=-1.0), "--max-kld -1 is not a bound"),
    ],
)
def test_a_knob_out_of_range_or_out_of_place_is_refused(options: PolicyOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_policy(options, layout(), 100)


def test_a_low_level_that_the_model_lacks_is_refused_with_the_ways_out() -> None:
    with pytest.raises(UsageError, match="no low level; convert it with --low TYPE, or use --low-level skip"):
        make_policy(PolicyOptions("dymoe"), layout(n_levels=1), 100)
    make_policy(PolicyOptions("dymoe", retention=1.0), layout(n_levels=1), 100)
    assert levels(
        make_policy(PolicyOptions("dymoe", retention=0.5, low_level="skip"), layout(n_levels=1), 100),
        one_token(0, e0=0.7, e1=0.3),
    ) == {0: HIGH, 1: SKIP}


def test_a_calibration_of_other_levels_is_refused() -> None:
    with pytest.raises(UsageError, match="levels Q4_0 but the model has 2"):
        make_policy(PolicyOptions("dymoe"), layout(), 100, calibration(levels=("Q4_0",)))
