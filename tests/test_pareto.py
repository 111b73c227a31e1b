"""Quality against bytes: curves are compared at equal KLD or equal bytes, and the rivals skip what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import pareto
import pareto_settings
from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.logits import logits_pass
from moe_edge.schedulers.layout import Layout, Selection, Step
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.levels import HIGH
from moe_edge.schedulers.policy import Policy, make_policy
from pareto_points import Saving, bytes_at_kld, front, kld_at_bytes, kld_ratio, saving
from random_models import Shape, write_random_model
from rivals import RULES, Rival, make_rival

CURVE = [(100.0, 1.0), (200.0, 0.01), (150.0, 2.0)]  # the last is worse than the first in both
UNIT = 10


def calibration(counts: list[list[int]]) -> Calibration:
    used = np.array(counts, np.int64)
    ones = np.ones(used.shape)
    return Calibration(
        text_sha256="", n_tokens=1, levels=("Q4_0",), counts=used, mean_gate=ones, squares=ones,
        sensitivity=np.ones(len(used)), error=np.stack([0 * ones, ones], axis=-1), cumulated=np.linspace(0, 1, 101),
        use_damage=np.zeros((len(used), 101)),
    )  # fmt: skip


def rival(name: str, value: float = 0.0, *, n_layers: int = 1, slots: int = 100) -> Policy:
    """Four experts a layer, of which the calibration used expert 2 least, then 0."""
    layout = Layout((4,) * n_layers, 1, (UNIT,) * 4 * n_layers)
    return make_rival(Rival(name, value), layout, slots * UNIT, calibration([[2, 9, 1, 5]] * n_layers))


def token(layer: int = 0, **weights: float) -> Step:
    g = list(weights.values())
    return Step(layer, [int(name[1:]) for name in weights], [1] * len(g), g, [w * w for w in g])


def computed(policy: Policy, step: Step) -> set[int]:
    plan = policy.plan(step)
    if plan is None:
        return set(step.experts)
    return {step.experts[i] for i, level in zip(plan.order, plan.levels, strict=True) if level == HIGH}


# arithmetic


def test_the_front_leaves_out_what_is_worse_in_both() -> None:
    assert front(CURVE) == [(100.0, 1.0), (200.0, 0.01)]


def test_curves_are_linear_in_bytes_and_logarithmic_in_kld() -> None:
    assert bytes_at_kld(CURVE, 0.1) == pytest.approx(150)
    assert kld_at_bytes(CURVE, 150) == pytest.approx(0.1)
    assert bytes_at_kld(CURVE, 0.001) is None
    assert kld_at_bytes(CURVE, 201) is None
    assert bytes_at_kld([], 0.1) is None


def test_a_saving_is_at_equal_kld_and_a_bound_beyond_the_curve() -> None:
    assert saving((75, 0.1), CURVE) == Saving(pytest.approx(0.5))  # type: ignore[arg-type]
    assert saving((100, 0.001), CURVE) == Saving(0.5, ">")
    assert saving((50, 5.0), CURVE) == Saving(0.5, "<")
    assert saving((50, 5.0), []) is None
    assert str(Saving(0.125, ">")) == ">+12.5 %"
    assert [Saving(s, b).tells for s, b in ((0.1, ""), (0.1, ">"), (-0.1, ">"), (-0.1, "<"), (0.1, "<"))] == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_curves_are_compared_where_both_are() -> None:
    half = [(size, kld / 2) for size, kld in CURVE]
    assert kld_ratio(half, CURVE) == pytest.approx(0.5)
    assert kld_ratio([(300.0, 1.0)], CURVE) is None
    assert kld_ratio([], CURVE) is None


def test_the_hardest_rival_is_named_and_a_bound_that_says_nothing_is_not() -> None:
    def row(family: str, size: float, kld: float) -> dict[str, object]:
        return {"family": family, "setting": "x", "bytes_per_token": size, "kld_source": kld}

    ours = row("dymoe low", 75, 0.1)
    rows = [row("exact, one type", *point) for point in CURVE] + [row("exact", 200, 0.01), row("lone", 100, 0.1), ours]
    assert pareto.dynamic_lines(rows)[-1] == "| dymoe low x | +25.0 %, lone | +50.0 % | +25.0 % |"
    assert ours["saving"]["lone"]["share"] == pytest.approx(0.25)  # type: ignore[index]


# rivals


def test_top_k_less_skips_the_smallest_gate_weights() -> None:
    step = token(e0=0.1, e1=0.5, e2=0.3, e3=0.1)
    assert computed(rival("top-k less", 1), step) == {0, 1, 2}
    assert computed(rival("top-k less", 2), step) == {1, 2}
    assert computed(rival("top-k less", 9), step) == {1}


def test_on_miss_what_is_in_memory_is_used() -> None:
    for name, expected in (("top-k less", {1, 2}), ("top-k less on miss", {0, 1, 2})):
        policy = rival(name, 2)
        policy.reset([0])
        assert computed(policy, token(e0=0.1, e1=0.5, e2=0.3, e3=0.1)) == expected


def test_weights_below_a_share_of_the_tokens_sum_are_skipped() -> None:
    assert computed(rival("weight below", 0.2), token(e0=2, e1=5, e3=1)) == {0, 1}
    assert computed(rival("weight below", 0.9), token(e0=2, e1=5, e3=1)) == {1}


def test_cold_experts_are_those_least_used_but_one_expert_stays() -> None:
    assert computed(rival("cold dropped", 0.5), token(e0=0.5, e1=0.2, e2=0.3)) == {1}
    assert computed(rival("cold dropped", 0.5), token(e0=0.4, e2=0.6)) == {2}
    assert computed(rival("cold dropped", 0.0), token(e0=0.4, e2=0.6)) == {0, 2}


def test_skips_are_counted() -> None:
    policy = rival("top-k less", 1)
    policy.plan(token(e0=0.4, e2=0.6))
    s = policy.stats
    assert (s.uses, s.high_uses, s.skipped_uses, s.wanted_high, s.wanted_skip) == (2, 1, 1, 1, 1)


def test_micro_batches_are_served_in_full() -> None:
    step = Step(0, [0, 1], [3, 1], [0.9, 0.1], [0.5, 0.01], n_tokens=4)
    for name in ("top-k less", "weight below"):
        assert computed(rival(name, 1), step) == {0, 1}


def test_on_demand_keeps_nothing_from_layer_to_layer() -> None:
    policy = rival("on demand", n_layers=2)
    for layer in (0, 1, 0):
        plan = policy.plan(token(layer, e1=0.5, e2=0.5))
        assert plan is not None and plan.levels == [HIGH, HIGH]
        assert policy.resident == (4 * layer + 1, 4 * layer + 2)
    plan = policy.plan(token(0, e2=0.5, e3=0.5))
    assert plan is not None
    assert (plan.order, plan.victims) == ([0, 1], [(), [1]])
    assert policy.plan(token(0, e2=0.5, e3=0.5)) is None


def test_unknown_rival_names_the_known() -> None:
    with pytest.raises(UnknownName, match="unknown rival 'coin'; known: top-k less, "):
        rival("coin")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("pareto") / "tiny.gguf", "olmoe", Shape(n_expert=8, n_used=3))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("budget", ["floor", "resident"])
def test_the_engine_carries_out_every_rivals_plans(model: Path, name: str, budget: str) -> None:
    chunks = np.random.default_rng(0).integers(0, 256, (1, 24), np.int32)
    probe = Engine(model, EngineOptions(n_ctx=24, n_threads=1))
    plan = probe.plan
    probe.close()
    ram = plan.floor_bytes if budget == "floor" else plan.resident_bytes
    with Engine(model, EngineOptions(n_ctx=24, n_threads=1, ram_bytes=ram)) as engine:
        layers = engine.layout.n_layers
        counts = calibration([[5, 1, 2, 3, 4, 6, 7, 8]] * layers)
        policy = make_rival(
            Rival(name, 0.5 if "k less" not in name else 1), engine.layout, engine.plan.arena_bytes, counts
        )
        engine._use(policy)
        assert sum(1 for _ in logits_pass(engine, chunks, one_by_one=True)) == 11
        counters, stats = engine.counters(), policy.stats
        assert (counters.uses, counters.skipped_uses) == (stats.high_uses, stats.skipped_uses)
        if name == "on demand":
            assert counters.hits == 0
        elif name == "cache-prior":
            assert stats.skipped_uses == 0 and (counters.substituted_uses > 0 or budget == "floor")
        elif "miss" not in name:
            assert stats.skipped_uses > 0


def test_cache_prior_boosts_logits_where_reroute_boosts_probabilities() -> None:
    p = [0.6, 0.3, 0.06, 0.04]  # the logits' range is 2.71, the second is 1.61 above the third: 0.59 of it
    asked = Selection(0, 2, [0, 1, 2, 3], p, p)
    for strength, found in ((0.55, None), (0.65, [0, 2])):
        prior = rival("cache-prior", strength)
        prior.reset([2])
        assert prior.select(asked) == found
    reroute = make_policy(PolicyOptions("reroute", strength=0.45), Layout((4,), 1, (UNIT,) * 4), 4 * UNIT)
    reroute.reset([2])
    assert reroute.select(asked) == [0, 2]  # 0.24 of a range of 0.56 is 0.43


def test_bytes_at_equal_kld_are_compared_with_the_best_that_replaces_nothing() -> None:
    def row(family: str, size: float, kld: float) -> dict[str, object]:
        return {"family": family, "bytes_per_token": 1024 * size, "kld_source": kld}

    rows = [
        row("exact", 400, 0.0001), row("exact, one type", 200, 0.001), row("damage low", 160, 0.001),
        row("damage low", 100, 0.002), row("damage low, replacing", 120, 0.001), row("reroute mean", 176, 0.001),
    ]  # fmt: skip
    lines = pareto.at_equal_kld(rows)
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert cells["the best that replaces nothing"][1:] == ["160", "100 |"]
    assert cells["damage low, replacing"][1:] == ["120 (-25 %)", "N/A |"]
    assert cells["reroute mean"][1] == "176 (+10 %)" and cells["exact, one type"][1:] == ["200", "N/A |"]


# the command


def test_wrong_calls(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["m.gguf", "--calibrate", "c", "--text", "t", "--out", "o"]
    for arguments, message in (
        (["--parts", "speed"], "unknown part 'speed'; known: static, dynamic, ablation"),
        (["--pairs", "Q4_K"], "--pairs Q4_K: write high+low"),
        (["--hobbit", "half"], "'half' is no pair of thresholds"),
        (["--retention", "much"], "'much' is no list of numbers"),
        (["--share", "0"], "--share is above 0"),
    ):
        assert pareto.main([*files, *arguments]) == UsageError.exit_status
        assert message in capsys.readouterr().err


def test_models_and_rows_are_made_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 200)
    arguments = [str(model), "--calibrate", str(text), "--text", str(text), "--out", str(tmp_path / "out")]
    arguments += "--parts static --bits 5 --types Q4_0,Q8_0 --plain Q4_0 --calibrate-tokens 512".split()
    arguments += "--ctx 32 --chunks 1 --decode-chunks 1 --threads 1".split()
    assert pareto.main(arguments) == 0
    first = capsys.readouterr()
    rows = json.loads((tmp_path / "out" / "static.json").read_text())["rows"]
    assert [row["family"] for row in rows] == [*pareto.ALLOCATIONS, "plain"]
    assert all(4.4 < row["bits"] <= 5 and row["kld_source"] > 0 for row in rows)
    assert json.loads(first.out.splitlines()[-1])["options"]["bits"] == [5.0]
    assert pareto.main(arguments) == 0
    assert "converting" not in capsys.readouterr().err
    again = json.loads((tmp_path / "out" / "static.json").read_text())["rows"]
    assert again == rows
    assert pareto.main([*arguments, "--calibrate-tokens", "1024"]) == UsageError.exit_status
    assert "holds models of another source or calibration" in capsys.readouterr().err


def test_settings_have_names_of_their_own() -> None:
    o = pareto_settings.Options(Path(), Path(), Path(), Path())
    settings = [*pareto_settings.dynamic_settings(o), *pareto_settings.ablation_settings(o, pareto_settings.ABLATION)]
    assert len({s.name for s in settings}) == len(settings)
    assert pareto_settings.hobbit_options("0.6:0.9") == PolicyOptions("hobbit", t1=0.6, t2=0.9)
    known = {*pareto_settings.ABLATION, *pareto_settings.PREFILL, "hobbit low", "damage low", "damage skip"}
    assert {name for pair in pareto_settings.COMPARISONS for name in pair} <= known
