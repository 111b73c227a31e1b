"""Simulated counts against the engine's own, LRU and times worked by hand, Belady against all choices there are."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.convert.convert import convert
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BudgetTooSmall, EngineError, UsageError
from moe_edge.runner.measure.record import record_trace
from moe_edge.runner.measure.simulation import SimBudget, policies_named, run_simulations
from moe_edge.runner.measure.simulation_plot import curve_label
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import SKIP, ExpertKey, Layout, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.replay.belady import has_one_size, simulate_belady
from moe_edge.schedulers.replay.simulate import Costs, Planner, SimResult, simulate, simulate_policy
from moe_edge.schedulers.replay.trace import Trace
from test_prediction import ahead_trace
from test_trace import decode_trace, prefill_trace

EXACT = PolicyOptions()
SKIPPING = PolicyOptions("dymoe", retention=0.6, low_level="skip")
TEXT = b"In the beginning God created the heaven and the earth. And the earth was without form, and void. " * 6
COUNTS = ("uses", "hits", "loads", "evictions", "bytes_read", "low_uses", "skipped_uses")


def one_layer(*steps: Sequence[int], n_experts: int = 4, unit_bytes: int = 10) -> Trace:
    """One layer, decode: the experts of each token."""
    return decode_trace([[list(step)] for step in steps], [n_experts], unit_bytes)


def counts(r: SimResult) -> tuple[int, ...]:
    return tuple(getattr(r, name) for name in COUNTS)


# ---- against the engine ------------------------------------------------------------------------------------


def agrees_with_the_engine(trace: Trace, options: PolicyOptions) -> SimResult:
    recorded = trace.recorded
    assert recorded is not None and recorded.policy == options.name
    result = simulate_policy(trace, options, recorded.arena_bytes, resident=recorded.resident)
    assert counts(result) == tuple(getattr(recorded, name) for name in COUNTS)
    return result


@pytest.mark.parametrize("options", [EXACT, SKIPPING, PolicyOptions("hobbit")], ids=lambda o: o.name)
@pytest.mark.parametrize("one_by_one", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("budget", ["floor", "middle", "resident"])
def test_counts_equal_the_engines_on_the_embedded_model(
    budget: str, one_by_one: bool, options: PolicyOptions
) -> None:
    with open_engine(tiny_model_path(), budget, n_ctx=48, n_ubatch=16, n_threads=1) as engine:
        trace = record_trace(engine, TEXT, 80, one_by_one=one_by_one, policy=options)
        again = record_trace(engine, TEXT, 20, one_by_one=one_by_one, policy=options)  # the arena is not empty now
    result = agrees_with_the_engine(trace, options)
    assert again.recorded is not None and again.recorded.resident
    agrees_with_the_engine(again, options)
    assert result.tokens == 80 and result.steps == trace.n_steps
    assert (result.evictions == 0) == (budget == "resident")
    if options != EXACT:
        assert result.skipped_uses > 0


@pytest.mark.parametrize("rule", RULES)
def test_counts_equal_the_engines_under_every_cache_rule(rule: str) -> None:
    options = PolicyOptions(cache=rule)
    with open_engine(tiny_model_path(), "middle", n_ctx=48, n_ubatch=16, n_threads=1) as engine:
        for one_by_one in (True, False):
            trace = record_trace(engine, TEXT, 64, one_by_one=one_by_one, policy=options)
            assert agrees_with_the_engine(trace, options).evictions > 0


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "gpt-oss"])
@pytest.mark.parametrize("budget", ["floor", "middle", "resident"])
def test_counts_equal_the_engines_on_random_models(
    random_model: Callable[[str], Path], arch: str, budget: str
) -> None:
    with open_engine(random_model(arch), budget, n_ctx=64, n_ubatch=16, n_threads=1) as engine:
        tokens = np.random.default_rng(0).integers(0, 250, 60).tolist()
        for one_by_one in (True, False):
            agrees_with_the_engine(record_trace(engine, tokens, one_by_one=one_by_one), EXACT)


@pytest.mark.parametrize("options", [PolicyOptions("dymoe", retention=0.5), PolicyOptions("hobbit")], ids=str)
def test_counts_equal_the_engines_with_two_levels(
    random_model: Callable[[str], Path], tmp_path: Path, options: PolicyOptions
) -> None:
    convert(random_model("qwen3moe"), tmp_path / "m.gguf", "Q4_K", low_type="Q2_K")
    with open_engine(tmp_path / "m.gguf", "middle", n_ctx=64, n_ubatch=16, n_threads=1) as engine:
        tokens = np.random.default_rng(0).integers(0, 250, 60).tolist()
        for one_by_one in (True, False):
            result = agrees_with_the_engine(
                record_trace(engine, tokens, one_by_one=one_by_one, policy=options), options
            )
            assert result.low_uses > 0


def test_counts_equal_the_engines_when_attention_chooses() -> None:
    options = replace(SKIPPING, prefill_importance="attention")  # type: ignore[call-arg]
    with open_engine(tiny_model_path(), "middle", n_ctx=96, n_ubatch=48, n_threads=1) as engine:
        trace = record_trace(engine, TEXT, 96, one_by_one=False, policy=options, attention=True)
    assert trace.attention is not None
    agrees_with_the_engine(trace, options)


# ---- by hand -----------------------------------------------------------------------------------------------


def test_lru_by_hand() -> None:
    # arena of 2: 0 miss, 1 miss, 0 hit, 2 miss (1 goes), 0 hit, 1 miss (2 goes)
    r = simulate_policy(one_layer([0], [1], [0], [2], [0], [1]), EXACT, 20)
    assert counts(r) == (6, 2, 4, 2, 40, 0, 0)
    assert (r.tokens, r.steps, r.arena_bytes, r.hit_rate, r.bytes_per_token) == (6, 6, 20, 2 / 6, 40 / 6)


def test_bytes_are_those_read_not_those_resident() -> None:
    trace = replace(one_layer([0], [3]), read_bytes=np.array([10, 10, 10, 7], np.int64))
    assert simulate_policy(trace, EXACT, 20).bytes_read == 17


def test_what_is_resident_at_the_start_is_not_read() -> None:
    r = simulate_policy(one_layer([0, 1], [0, 2]), EXACT, 20, resident=(1, 0))
    assert counts(r) == (4, 3, 1, 1, 10, 0, 0)


def test_a_step_stalls_for_its_own_read_and_not_for_a_hit() -> None:
    # read 1 s, compute 0.25 s, between layers 0.5 s: 1 + 0.25 + 0.5, then 0.25 + 0.5
    r = simulate_policy(one_layer([0], [0]), EXACT, 20, Costs(10, use_seconds=0.25, other_seconds=0.5))
    assert (r.stall_seconds, r.seconds, r.tok_s) == (1.0, 2.5, 0.8)


def test_reads_queue_while_hits_are_computed() -> None:
    # hit done at 0.25; reads done at 1 and 2, computed at 1.25 and 2.25
    r = simulate_policy(one_layer([0, 1, 2]), EXACT, 30, Costs(10, use_seconds=0.25), resident=(0,))
    assert (r.hits, r.stall_seconds, r.seconds) == (1, 1.5, 2.25)
    # with slow computing the reads hide behind it
    r = simulate_policy(one_layer([0, 1, 2]), EXACT, 30, Costs(10, use_seconds=4.0), resident=(0,))
    assert (r.stall_seconds, r.seconds) == (0.0, 12.0)


def test_a_read_waits_for_the_victim_that_its_step_still_computes() -> None:
    # arena of 2: 0 arrives at 1, computed at 4; 1 at 2, computed at 7; 2 takes the place of 0 at 4, arrives at 5
    r = simulate_policy(one_layer([0, 1, 2]), EXACT, 20, Costs(10, use_seconds=3.0))
    assert (r.stall_seconds, r.seconds, r.evictions) == (1.0, 10.0, 1)
    # reads of 10 s: 0 there at 10, computed at 25; 1 there at 20, computed at 40; 2 asked for at 25, there at 35
    r = simulate_policy(one_layer([0, 1, 2]), EXACT, 20, Costs(1, use_seconds=15.0))
    assert (r.stall_seconds, r.seconds) == (10.0, 55.0)


def test_measured_seconds_are_spread_over_the_experts_of_a_step() -> None:
    trace = prefill_trace()  # computing 0..5 s and other 1..6 s of six steps
    arena = 6 * 4096
    everything = Costs(1e12)
    r = simulate_policy(trace, EXACT, arena, everything, resident=range(6))
    assert r.seconds == pytest.approx(15 + 21) and r.stall_seconds == 0
    costs = replace(everything, use_seconds=0.5, other_seconds=0.0)
    half = simulate_policy(trace, EXACT, arena, costs, resident=range(6))
    assert half.seconds == pytest.approx(0.5 * half.uses)
    default = simulate_policy(one_layer([0]), EXACT, 20, resident=(0,))
    assert default.seconds == 10 / 10e9


class Fixed:
    """Answers every step with the same plan."""

    def __init__(self, plan: StepPlan | None) -> None:
        self._plan = plan

    def plan(self, step: Step) -> StepPlan | None:
        return self._plan

    def reset(self, resident: Iterable[int]) -> None:
        pass


REFUSED: dict[str, tuple[StepPlan | None, str]] = {
    "not all": (StepPlan([0], [0], [()]), "not a permutation"),
    "twice": (StepPlan([0, 0], [0, 0], [(), ()]), "not a permutation"),
    "level": (StepPlan([0, 1], [0, 1], [(), ()]), "level 1 of 1"),
    "skip": (StepPlan([0, 1], [0, SKIP], [(), [0]]), "evicts experts for one that it skips"),
    "hit": (StepPlan([0, 1], [0, 0], [[3], ()]), "evicts experts for one that is already in memory"),
    "absent": (StepPlan([0, 1], [0, 0], [(), [2]]), "evicts an expert that is not in memory"),
    "full": (StepPlan([0, 1], [0, 0], [(), ()]), "exceeds the memory of the expert arena"),
    "none": (None, "exceeds the memory of the expert arena"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_the_engine_would_refuse_is_refused(name: str) -> None:
    plan, sentence = REFUSED[name]

    def make(_layout: Layout, _arena_bytes: int) -> Planner:
        return Fixed(plan)  # type: ignore[return-value]

    with pytest.raises(EngineError, match=sentence):
        simulate(one_layer([0, 1]), make, 20, resident=(0, 3))
    good = StepPlan([1, 0], [0, 0], [[3], ()])
    r = simulate(one_layer([0, 1]), lambda *_: Fixed(good), 20, resident=(0, 3))  # type: ignore[arg-type]
    assert counts(r) == (2, 1, 1, 1, 10, 0, 0)


# ---- Belady ------------------------------------------------------------------------------------------------


def best_loads(steps: Sequence[Sequence[int]], n_slots: int) -> int:
    """The fewest loads over every order within a step and every choice of victims."""

    @functools.cache
    def best(at: int, memory: frozenset[int], todo: frozenset[int]) -> int:
        if not todo:
            return best(at + 1, memory, frozenset(steps[at + 1])) if at + 1 < len(steps) else 0
        results = []
        for expert in todo:
            rest = todo - {expert}
            if expert in memory:
                results.append(best(at, memory, rest))
            elif len(memory) < n_slots:
                results.append(1 + best(at, memory | {expert}, rest))
            else:
                results += [1 + best(at, (memory - {gone}) | {expert}, rest) for gone in memory]
        return min(results)

    return best(0, frozenset(), frozenset(steps[0]))


def bypass_loads(trace: Trace, n_slots: int) -> int:
    """The fewest loads when an expert may go right after its step: with one slot more, what must stay can go there."""
    steps = [{trace.layout().unit(ExpertKey(step.layer, e)) for e in step.experts} for _, step in trace.steps()]
    memory: set[int] = set()
    loads = 0
    for at, step in enumerate(steps):
        loads += len(step - memory)
        later = {u: next((i for i in range(at + 1, len(steps)) if u in steps[i]), len(steps)) for u in memory | step}
        memory = set(sorted(later, key=later.__getitem__)[:n_slots])
    return loads


def random_steps(rng: random.Random, n_used: int) -> tuple[Trace, list[list[int]], int]:
    n_experts = rng.randint(n_used + 1, 6)
    steps = [sorted(rng.sample(range(n_experts), n_used)) for _ in range(rng.randint(4, 10))]
    return one_layer(*steps, n_experts=n_experts, unit_bytes=1), steps, rng.randint(2, max(2, n_experts - 1))


def test_belady_by_hand() -> None:
    # 0, 1, 2 in turn, arena of 2: LRU never hits. Belady: 2 takes the place of 1 (needed after 0), 0 hits, 1 takes the
    # place of 0 (never again), 2 hits
    trace = one_layer([0], [1], [2], [0], [1], [2])
    assert counts(simulate_policy(trace, EXACT, 20)) == (6, 0, 6, 4, 60, 0, 0)
    assert counts(simulate_belady(trace, 20)) == (6, 2, 4, 2, 40, 0, 0)


def test_belady_starts_from_what_is_resident() -> None:
    trace = one_layer([0], [1], [0])
    assert counts(simulate_belady(trace, 20, resident=(0, 3))) == (3, 2, 1, 1, 10, 0, 0)


def test_belady_is_the_best_of_all_choices_with_one_expert_a_step() -> None:
    for seed in range(300):
        trace, steps, n_slots = random_steps(random.Random(seed), 1)
        assert simulate_belady(trace, n_slots).loads == best_loads(steps, n_slots), (seed, steps, n_slots)


def test_belady_is_the_best_of_all_choices_but_for_rare_ties() -> None:
    above = 0
    for seed in range(600):
        rng = random.Random(seed)
        trace, steps, n_slots = random_steps(rng, rng.randint(2, 3))
        best, found = best_loads(steps, n_slots), simulate_belady(trace, n_slots).loads
        assert best <= found <= best + 1, (seed, steps, n_slots)
        above += found > best
    assert above <= 3


def test_belady_lies_between_the_bounds_without_mandatory_load_and_no_policy_reads_less() -> None:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.gumbel(size=(60, 3, 8)) + rng.gumbel(size=(1, 3, 8)) * 2, -1)[..., :2]
    trace = decode_trace(experts.tolist(), [8, 8, 8])
    for n_slots in (3, 4, 6, 9, 12, 18, 24):
        best = simulate_belady(trace, 10 * n_slots)
        assert best.uses == best.hits + best.loads == 60 * 3 * 2
        assert bypass_loads(trace, n_slots) <= best.loads <= bypass_loads(trace, n_slots - 1)
        assert best.loads <= simulate_policy(trace, EXACT, 10 * n_slots).loads


def test_belady_serves_prefill_and_several_sizes() -> None:
    trace = prefill_trace()
    assert simulate_belady(trace, 6 * 4096).loads == 6 and has_one_size(trace)
    sizes = np.array([10, 20, 30, 40], np.int64)
    uneven = replace(one_layer([0, 3], [1, 2], [0, 3], [1, 2]), unit_bytes=sizes, read_bytes=sizes)
    r = simulate_belady(uneven, 60)
    assert not has_one_size(uneven) and r.uses == 8 and 5 <= r.loads <= simulate_policy(uneven, EXACT, 60).loads
    with pytest.raises(BudgetTooSmall, match="one expert needs 40 bytes but the expert arena has 30"):
        simulate_belady(uneven, 30)


def test_belady_uses_the_high_level_of_two() -> None:
    trace = one_layer([0], [1], [0], n_experts=2)
    sizes = np.array([10, 4] * 2, np.int64)
    two = replace(trace, n_levels=2, unit_bytes=sizes, read_bytes=sizes)
    assert counts(simulate_belady(two, 20)) == (3, 1, 2, 0, 20, 0, 0) and has_one_size(two)


# ---- table, JSON, picture ----------------------------------------------------------------------------------


def test_rows_for_every_budget_and_policy_with_belady_first() -> None:
    trace = one_layer([0], [1], [2], [0], [1], [2])
    s = run_simulations(trace, [SimBudget(20), SimBudget(40, 1000)], policies_named("exact"), Costs(10, 0.25, 0.0))
    assert [(r.policy, r.arena_bytes, r.ram_bytes, r.loads) for r in s.rows] == [
        ("belady", 20, None, 4), ("exact", 20, None, 6), ("belady", 40, 1000, 3), ("exact", 40, 1000, 3),
    ]  # fmt: skip
    row = s.rows[1]
    assert (row.reads_to_belady, row.hit_rate, row.bytes_per_token, row.arena_share) == (1.5, 0.0, 10.0, 0.5)
    assert (row.stall_ms_per_token, row.tok_s) == (1000.0, 0.8)
    assert s.belady_exact and s.decode_only and s.tokens == 6
    again = json.loads(json.dumps(s.to_json()))
    assert again["rows"][1]["loads"] == 6 and again["costs"]["disk_bytes_per_second"] == 10
    lines = s.text().splitlines()
    head = "policy cache --ram experts share hits MB/token stall ms tok/s reads/belady"
    assert lines[2].split() == head.split()
    assert lines[4].split()[:3] == ["exact", "learned", "(auto)"] and lines[4].split()[-1] == "1.500"
    assert "heuristic" not in s.text() and not s.notes and s.prediction is None


def moving_trace() -> Trace:
    """Three experts in turn for 60 tokens, then three others, and so on: what was used often is not used again."""
    rng = random.Random(0)
    phases = [rng.sample(range(12), 3) for _ in range(20)]
    return one_layer(*[[phase[i % 3]] for phase in phases for i in range(60)], n_experts=12)


def test_every_cache_rule_has_a_row_the_best_is_marked_and_a_default_far_above_it_is_named() -> None:
    trace = moving_trace()
    s = run_simulations(trace, [SimBudget(30), SimBudget(120)], policies_named("exact", caches="all"))
    first, last = s.rows[: len(s.rows) // 2], s.rows[len(s.rows) // 2 :]
    others = [rule for rule in RULES if rule not in ("auto", "learned")]
    assert [row.cache for row in first] == [None, "learned", *others]
    assert [row.cache for row in first if row.is_default] == ["learned"]
    for row in first[1:]:
        assert row.cache is not None and (row.policy, row.lookahead) == ("exact", "off")
        alone = simulate_policy(trace, PolicyOptions(cache=row.cache), 30)
        assert (row.loads, row.reads_to_belady) == (alone.loads, alone.loads / first[0].loads)
    best = next(row for row in first if row.best)
    assert best.loads == min(row.loads for row in first[1:]) and sum(row.best for row in first) == 1
    default = first[1]
    assert default.loads > 1.15 * best.loads
    more = default.loads / best.loads - 1
    assert s.notes == (
        f"exact, experts 0.0 MiB: the default cache rule, learned, reads {more:.0%} more than {best.cache}",
    )
    assert s.notes[0] in s.text().splitlines()
    assert not any(row.best for row in last)  # all alike when everything fits
    marked = [line.split()[1] for line in s.text().splitlines() if line.endswith(" best")]
    assert marked == [best.cache]
    assert json.loads(json.dumps(s.to_json()))["rows"][1]["cache"] == "learned"


def test_a_rule_named_twice_has_one_row_and_one_below_the_best_by_little_no_note() -> None:
    trace = one_layer([0], [1], [2], [0], [1], [2])
    s = run_simulations(trace, [SimBudget(20)], policies_named("exact", caches="auto,lru,learned"))
    assert [row.cache for row in s.rows] == [None, "learned", "lru"] and s.notes == ()
    assert curve_label(s.rows[0]) == "belady" and curve_label(s.rows[1]) == "exact, learned"
    assert curve_label(replace(s.rows[1], lookahead="votes")) == "exact, learned, votes"


def test_a_simulation_with_look_ahead_has_its_rows_and_the_quality_of_the_predictions() -> None:
    trace = ahead_trace()
    s = run_simulations(
        trace, [SimBudget(60), SimBudget(180)], policies_named("exact", lookaheads="off,single"), Costs(10, 9.0, 9.0)
    )
    assert [row.lookahead for row in s.rows] == ["off", "off", "single"] * 2
    row = s.rows[-1]
    # ahead are read 2 and 0 of layer 1, 0 and 1 of layer 2, and for the second token 1 of layer 1: all used in the end
    assert (row.prefetched, row.prefetch_useful, row.loads, row.reads_to_belady) == (5, 5, 5, 1.0)
    assert (s.rows[-2].prefetched, s.rows[-2].loads) == (0, 10)
    assert s.prediction is not None and s.prediction.arena_bytes == (60, 180) and s.prediction.cache == "learned"
    assert s.prediction.rows[0].recall == 0.5 and len(s.prediction.rows[0].miss_recall) == 2
    lines = s.text().splitlines()
    assert "look-ahead" in lines[2].split() and lines[-6].split()[:4] == ["1", "2", "50.0%", "50.0%"]
    assert json.loads(json.dumps(s.to_json()))["prediction"]["rows"][1]["precision"] == 4 / 9


def test_look_ahead_on_a_trace_without_scores_is_refused_with_the_command_that_records_them() -> None:
    with pytest.raises(UsageError, match=r"of by-hand has no look-ahead scores.*--lookahead-depth 3"):
        run_simulations(one_layer([0]), [SimBudget(20)], policies_named("exact", lookaheads="stacked"))


def test_a_policy_that_chooses_experts_is_simulated_without_that_and_it_is_said() -> None:
    trace = one_layer([0, 1], [2, 3], [0, 1])
    s = run_simulations(trace, [SimBudget(20)], policies_named("exact,reroute"), belady=False)
    assert [row.loads for row in s.rows] == [6, 6]
    assert "reroute: a trace has the experts that were chosen, not the scores of the others" in s.notes[0]
    assert s.notes[0] in s.text().splitlines()
    weak = policies_named("reroute", PolicyOptions("reroute", strength=0.0))
    assert not run_simulations(trace, [SimBudget(20)], weak, belady=False).notes


def test_policies_the_model_cannot_serve_are_left_out_and_named() -> None:
    trace = one_layer([0, 1], [2, 3])
    s = run_simulations(trace, [SimBudget(20)], policies_named("all"), belady=False)
    assert [r.policy for r in s.rows] == ["exact"] * (len(RULES) - 1) + ["hobbit", "reroute"]
    assert s.rows[0].reads_to_belady is None
    assert s.left_out[0].startswith("dymoe: the model has no low level; convert it with --low")
    assert [line.split(":")[0] for line in s.left_out] == ["dymoe", "damage"]
    assert "left out: dymoe" in s.text()
    with pytest.raises(UsageError, match="nothing to simulate: dymoe: the model has no low level"):
        run_simulations(trace, [SimBudget(20)], policies_named("dymoe"), belady=False)


def test_shares_of_low_and_skipped_uses_are_of_all_uses() -> None:
    trace = one_layer(*[[0, 1]] * 10)
    s = run_simulations(trace, [SimBudget(40)], policies_named("dymoe", PolicyOptions(retention=0.5, low_level="skip")))
    row = s.rows[1]
    assert row.policy == "dymoe retention=0.5 low_level=skip"
    assert 0 < row.skipped_share < 1 and row.low_share == 0


def test_an_arena_below_the_floor_is_refused_with_the_floor() -> None:
    with pytest.raises(BudgetTooSmall, match="one expert for each MoE layer") as e:
        run_simulations(one_layer([0]), [SimBudget(19)], policies_named("exact"))
    assert e.value.needed_bytes == 20
