"""Replacing an expert by another, priced: what a calibration measures, and what policy damage does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.models.calibration import (
    GATES_NORMALISED,
    GATES_PLAIN,
    GATES_SOFTMAX,
    GATES_UNKNOWN,
    Calibration,
    Substitution,
)
from moe_edge.models.errors import BadFile, UsageError
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.keyvalues import parse_records
from moe_edge.models.store.calibration_keys import SUBSTITUTION_BINS, calibration_kvs, read_calibration
from moe_edge.runner.calibrate.substitution import Ranking, WatchRanking, measure_substitution
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.prove import NOTHING
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.layout import SKIP, Layout, Selection, Selections, Step
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.damage import MIB, DamagePolicy
from moe_edge.schedulers.policies.gates import gate_ratio, gate_weights, gate_weights_of
from moe_edge.schedulers.policies.levels import HIGH, LOW
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.settings import describe_options, policy_selects, policy_warning
from test_calibration import make_calibration
from test_lossy import logits, watch
from test_policies import calibration

KINDS = (GATES_PLAIN, GATES_NORMALISED, GATES_SOFTMAX)


def measured(n_layers: int = 1, factor: float = 1.0, kind: int = GATES_PLAIN) -> Substitution:
    return Substitution(
        np.full((n_layers, SUBSTITUTION_BINS), factor), np.full(n_layers, kind, np.int64), np.ones(n_layers)
    )


# ---- gate weights before llama.cpp has made them


@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe", "deepseek2", "gpt-oss"])
def test_gate_weights_foretold_are_those_that_llama_cpp_makes(sources: Callable[[str], Path], arch: str) -> None:
    options: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 1, "logits_all": True, "proof": NOTHING}
    with Engine(sources(arch), EngineOptions(ram_bytes=NO_LIMIT, flash_attn=False, **options)) as engine:
        ranked = WatchRanking(engine.layout, engine.plan.arena_bytes, 1)
        engine._use(ranked)
        seen = watch(engine)
        logits(engine, [(7 * i * i + 3) % 250 for i in range(40)], 40)
        gating = [engine.native.gating(layer) for layer in range(engine.layout.n_layers)]
    for layer, ranking in enumerate(ranked.rankings()):
        kind, scale = gating[layer]
        assert kind != GATES_UNKNOWN and ranking.rows.tolist() == list(range(40))
        at = seen.layers.index(layer)
        k = ranking.n_used
        assert np.array_equal(ranking.experts[:, :k], seen.experts[at])
        foretold = gate_weights_of(kind, scale, ranking.gates[:, :k])
        assert np.allclose(foretold, seen.weights[at], rtol=1e-4, atol=1e-7)
        one = gate_weights(kind, scale, ranking.gates[3, :k].tolist())
        assert one == pytest.approx(foretold[3].tolist())


def test_the_ratio_of_two_gates_is_that_of_their_weights() -> None:
    assert gate_ratio(GATES_PLAIN, 0.1, 0.4) == pytest.approx(0.25)
    assert gate_ratio(GATES_SOFTMAX, 1.0, 2.0) == pytest.approx(np.exp(-1))
    assert gate_ratio(GATES_PLAIN, 0.5, 0.4) == 1.0 == gate_ratio(GATES_PLAIN, 0.1, 0.0)  # a selection bias may do that


# ---- what a calibration measures


def by_brute_force(ranking: Ranking, y: FloatArray, kind: int, scale: float) -> np.ndarray:
    """[bins]: each layer output as llama.cpp would make it, with the expert and with the one in its place."""
    changed, whole, k = np.zeros(SUBSTITUTION_BINS), np.zeros(SUBSTITUTION_BINS), ranking.n_used
    for t, gates in enumerate(ranking.gates.tolist()):
        w = gate_weights(kind, scale, gates[:k])
        before = sum(w[i] * y[t, i].astype(np.float64) for i in range(k))
        for rank in range(k):
            for other in range(k, len(gates)):
                slots = [*range(rank), other, *range(rank + 1, k)]
                new = gate_weights(kind, scale, [gates[i] for i in slots])
                after = sum(new[j] * y[t, i].astype(np.float64) for j, i in enumerate(slots))
                at = min(SUBSTITUTION_BINS - 1, int(gate_ratio(kind, gates[other], gates[rank]) * SUBSTITUTION_BINS))
                changed[at] += np.square(after - before).sum()
                whole[at] += w[rank] ** 2 * np.square(y[t, rank].astype(np.float64)).sum()
    return np.where(whole > 0, changed / np.maximum(whole, 1e-30), np.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_is_the_squared_change_of_the_layer_s_output(kind: int) -> None:
    rng, n, n_experts, n_embd = np.random.default_rng(kind), 30, 6, 8
    matrices = rng.standard_normal((n_experts, n_embd, n_embd)).astype(np.float32)
    inputs = rng.standard_normal((50, n_embd)).astype(np.float16)
    experts = np.array([rng.permutation(n_experts)[:5] for _ in range(n)], np.int32)
    gates = -np.sort(-rng.random((n, 5)), axis=1)
    ranking = Ranking(2, rng.permutation(50)[:n], experts, gates)

    def outputs(layer: int, expert: int, x: FloatArray) -> FloatArray:
        assert layer == 0
        product: FloatArray = x @ matrices[expert].T
        return product

    found = measure_substitution([ranking], lambda _: inputs, outputs, [(kind, 1.5)])
    assert found is not None and found.gates.tolist() == [kind] and found.scale.tolist() == [1.5]
    x = inputs[ranking.rows].astype(np.float32)
    y = np.einsum("tred,td->tre", matrices[experts], x)
    want = by_brute_force(ranking, y, kind, 1.5)
    known = ~np.isnan(want)
    assert known.sum() > 3 and found.factor[0][known] == pytest.approx(want[known], rel=1e-4)
    assert np.isfinite(found.factor).all()  # bins without a pair have their neighbours'


def test_experts_that_are_alike_cost_nothing_and_strangers_cost_both() -> None:
    ranking = Ranking(1, np.arange(4), np.tile(np.arange(2, dtype=np.int32), (4, 1)), np.tile([0.5, 0.5], (4, 1)))
    same = measure_substitution([ranking], lambda _: np.ones((4, 2), np.float16), lambda *a: a[2], [(GATES_PLAIN, 1.0)])
    assert same is not None and same.factor.max() == pytest.approx(0.0)

    def axis(layer: int, expert: int, x: FloatArray) -> FloatArray:
        rows: FloatArray = np.eye(2, dtype=np.float32)[np.full(len(x), expert)]
        return rows

    other = measure_substitution([ranking], lambda _: np.ones((4, 2), np.float16), axis, [(GATES_PLAIN, 1.0)])
    assert other is not None and other.factor[0].tolist() == pytest.approx([2.0] * SUBSTITUTION_BINS)
    for gating in ([(GATES_UNKNOWN, 1.0)], [(GATES_PLAIN, 1.0)]):
        few = ranking if gating[0][0] == GATES_UNKNOWN else replace(ranking, n_used=2)
        assert measure_substitution([few], lambda _: np.ones((4, 2), np.float16), axis, gating) is None


def test_it_is_kept_with_the_calibration_and_old_ones_still_open() -> None:
    old = make_calibration(n_layers=3)
    read = read_calibration(parse_records(calibration_kvs(old).values()))
    assert read is not None and read.substitution is None
    new = replace(old, substitution=replace(measured(3, 0.25), scale=np.array([1.0, 2.5, 0.5])))
    kvs = calibration_kvs(new)
    read = read_calibration(parse_records(kvs.values()))
    assert read is not None and read.substitution is not None
    for name in ("factor", "gates", "scale"):
        assert np.array_equal(getattr(read.substitution, name), getattr(new.substitution, name))
    with pytest.raises(UsageError, match=r"substitution\.factor has shape"):
        calibration_kvs(replace(old, substitution=measured(2)))
    del kvs["moe_edge.calibration.substitution.gates"]
    with pytest.raises(BadFile, match=r"substitution\.gates is missing"):
        read_calibration(parse_records(kvs.values()))


# ---- policy damage


def damage(
    known: Calibration, resident: Iterable[int] = (), *, n_levels: int = 1, n_experts: int = 4, **knobs: Any
) -> DamagePolicy:
    """Every read costs 0.1 nats at the high level (10 bytes) and 0.04 at the low one."""
    layout = Layout((n_experts,), n_levels, (10, 4)[:n_levels] * n_experts)
    policy = make_policy(PolicyOptions("damage", price=0.01 * MIB, **knobs), layout, 1000, known)
    assert isinstance(policy, DamagePolicy)
    policy.reset(resident)
    return policy


def token(*gates: float, n_used: int = 2) -> Selection:
    order = sorted(range(len(gates)), key=lambda e: -gates[e])
    ranked = [gates[e] for e in order]
    return Selection(0, n_used, order, ranked, ranked)


def one_level(factor: float = 1.0, skip: float = 1.0) -> Calibration:
    removed = np.full((1, 4), skip)
    return replace(calibration(levels=("high",), low=removed, removed=removed), substitution=measured(factor=factor))


def test_each_use_gets_the_least_of_reading_replacing_and_skipping() -> None:
    gates = token(0.6, 0.3, 0.2, 0.1)  # of the second: squares 0.09
    # a read is 0.1, a skip 0.09 * 2 = 0.18, a replacement 0.18 * factor
    policy = damage(one_level(factor=0.5, skip=2.0), resident=[0, 2])
    assert policy.select(gates) == [0, 2] and policy.replacements == {2}
    assert policy.stats.substituted == 1 and policy.stats.expected_damage == pytest.approx(0.09)
    assert damage(one_level(factor=0.6, skip=2.0), resident=[0, 2]).select(gates) is None  # 0.108: reading is cheaper
    assert damage(one_level(factor=0.99, skip=0.5), resident=[0, 2]).select(gates) == [0, 2]  # 0.0446, a skip 0.045
    assert damage(one_level(factor=1.01, skip=0.5), resident=[0, 2]).select(gates) is None  # then it is skipped
    assert damage(one_level(factor=0.5, skip=2.0), resident=[0]).select(gates) is None  # nobody is there
    assert damage(one_level(factor=0.0), resident=[0, 1, 2]).select(gates) is None  # all are


def test_a_low_copy_counts_with_its_damage() -> None:
    two_levels = calibration(low=np.full((1, 4), 0.5), removed=np.full((1, 4), 2.0))
    known = replace(two_levels, substitution=measured(factor=0.1))
    gates = token(0.6, 0.3, 0.2, 0.1)  # low read: 0.045 + 0.04 = 0.085; replaced: 0.018, and the other's low 0.02
    policy = damage(known, resident=[0, 4 + LOW], n_levels=2)
    assert policy.select(gates) == [0, 2]
    assert policy.stats.expected_damage == pytest.approx(0.018 + 0.09 * (2 / 3) ** 2 * 0.5)
    with_own_low = damage(known, resident=[0, 2 + LOW, 4 + HIGH], n_levels=2)
    assert with_own_low.select(gates) == [0, 2]  # 0.018 against 0.045, its own low copy's


def test_the_lowest_ranks_get_the_best_replacements() -> None:
    policy = damage(one_level(factor=0.01), resident=[2, 3])
    assert policy.select(token(0.5, 0.45, 0.3, 0.2)) == [3, 2] and policy.stats.substituted == 2


def test_in_a_prompt_all_tokens_of_an_expert_are_replaced_or_none() -> None:
    rows = np.array([[0.6, 0.3, 0.2, 0.1], [0.6, 0.1, 0.3, 0.2], [0.6, 0.3, 0.1, 0.2]], np.float32)
    order = np.argsort(-rows, axis=1, kind="stable").astype(np.int32)
    asked = Selections(0, 2, order, rows, rows)
    # two tokens of expert 1: a read is 0.1 for both, skips 0.36, replacements 0.36 * factor
    policy = damage(one_level(factor=0.25, skip=2.0), resident=[0, 3])
    found = policy.select_many(asked)
    assert found is not None and found.tolist() == [[0, 3], [0, 3], [0, 3]]
    assert policy.stats.substituted == 3 and policy.stats.expected_damage == pytest.approx(3 * 0.09 * 2 * 0.25)
    found = damage(one_level(factor=0.3, skip=2.0), resident=[0, 3]).select_many(asked)
    assert found is not None and found.tolist() == [[0, 1], [0, 3], [0, 1]]
    assert damage(one_level(), resident=[0, 3]).select_many(asked._replace(gates=None)) is None


def test_without_reuse_every_expert_may_be_a_replacement_and_costs_no_read() -> None:
    policy = damage(one_level(factor=0.5, skip=2.0), reuse=False)
    assert policy.select(token(0.4, 0.3, 0.2, 0.1)) == [0, 2]  # the first: 0.16 against 0.1
    step = Step(0, [0, 2], [1, 1], [0.4, 0.01], [0.16, 0.0001])
    plan = policy.plan(step)
    assert plan is not None and SKIP not in plan.levels and policy.wishes(step) == [HIGH, HIGH]


def test_it_is_said_whether_experts_may_be_replaced() -> None:
    old, new = calibration(levels=("high",)), one_level()
    asked, off = PolicyOptions("damage"), PolicyOptions("damage", substitute="off")
    assert policy_selects(asked, new) and "depends on what was in memory" in policy_warning(asked, new)
    assert not policy_selects(asked, old) and not policy_selects(off, new) and not policy_warning(off, new)
    assert "experts may be replaced" in describe_options(asked, new)
    assert "does not know what that costs" in describe_options(asked, old)
    assert damage(old).selects is False and damage(new, substitute="off").selects is False
