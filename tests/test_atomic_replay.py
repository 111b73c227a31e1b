"""A step as one event: so it is in the engine for single tokens, and in a replay for prompts and Belady, if asked."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BudgetTooSmall, EngineError
from moe_edge.runner.measure.record import record_trace, save_trace
from moe_edge.runner.measure.simulation import SimBudget, even_budgets, policies_named, run_simulations
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.replay.atomic import largest_step_bytes
from moe_edge.schedulers.replay.belady import simulate_belady
from moe_edge.schedulers.replay.simulate import simulate, simulate_policy
from random_models import Shape, write_random_model
from test_cli import run
from test_simulate import EXACT, TEXT, Fixed, agrees_with_the_engine, counts, one_layer, random_steps

# ---- against the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["floor", "middle"])
@pytest.mark.parametrize("rule", RULES)
def test_the_engine_takes_a_tokens_step_for_one_event_under_every_rule(rule: str, budget: str) -> None:
    """Its own counts are those of the replay that checks every plan for it."""
    options = PolicyOptions(cache=rule)
    with open_engine(tiny_model_path(), budget, n_ctx=48, n_ubatch=16, n_threads=1) as engine:
        trace = record_trace(engine, TEXT, 80, policy=options)
    streamed = agrees_with_the_engine(trace, options)
    assert trace.recorded is not None and streamed.evictions > 0
    atomic = simulate_policy(trace, options, trace.recorded.arena_bytes, atomic=True)
    assert counts(atomic) == counts(streamed)


def test_the_engine_streams_a_prompt_and_the_atomic_replay_does_not(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "wide.gguf", "olmoe", Shape(n_layer=3, n_expert=48, n_used=4))
    with open_engine(path, "middle", n_ctx=96, n_ubatch=32, n_threads=1) as engine:
        trace = record_trace(engine, [(7 * i * i + 3) % 250 for i in range(96)], one_by_one=False)
    assert trace.recorded is not None
    streamed = agrees_with_the_engine(trace, EXACT)
    atomic = simulate_policy(trace, EXACT, trace.recorded.arena_bytes, atomic=True)
    assert atomic.uses == streamed.uses and atomic.loads != streamed.loads
    arena_bytes = trace.recorded.arena_bytes
    best, best_atomic = (simulate_belady(trace, arena_bytes, atomic=each).loads for each in (False, True))
    assert best <= streamed.loads and best < best_atomic <= atomic.loads


# ---- by hand, and against all choices ----------------------------------------------------------------------


def test_belady_may_not_give_up_an_expert_of_its_own_step() -> None:
    # arena of 2. Streamed, 0 goes when it has been used for the second time, and 1 stays to be hit; atomic, 1 goes.
    trace = one_layer([0, 1], [0, 2], [1, 3])
    assert simulate_belady(trace, 20).loads == 4
    assert simulate_belady(trace, 20, atomic=True).loads == 5
    assert simulate_belady(trace, 40, atomic=True).loads == 4


def atomic_loads(steps: Sequence[Sequence[int]], n_slots: int) -> int:
    """The fewest loads over every choice of victims, each step's experts in memory together."""

    @functools.cache
    def best(at: int, memory: frozenset[int]) -> int:
        if at == len(steps):
            return 0
        step = frozenset(steps[at])
        loads, others = len(step - memory), memory - step
        n_kept = min(len(others), n_slots - len(step))
        return loads + min(best(at + 1, step | set(kept)) for kept in itertools.combinations(sorted(others), n_kept))

    return best(0, frozenset())


def test_atomic_belady_is_the_best_of_all_choices_ties_included() -> None:
    above_streamed = 0
    for seed in range(400):
        rng = random.Random(seed)
        n_used = rng.randint(1, 3)
        trace, steps, n_slots = random_steps(rng, n_used)
        n_slots = max(n_slots, n_used)
        found = simulate_belady(trace, n_slots, atomic=True).loads
        assert found == atomic_loads(steps, n_slots), (seed, steps, n_slots)
        assert found <= simulate_policy(trace, EXACT, n_slots, atomic=True).loads
        above_streamed += found > simulate_belady(trace, n_slots).loads
    assert above_streamed > 50


# ---- what is refused ---------------------------------------------------------------------------------------


def test_an_arena_that_does_not_hold_a_step_is_refused_with_the_number() -> None:
    trace = one_layer([0, 1, 2], [1, 2, 3])
    assert largest_step_bytes(trace) == 30
    for run_it in (
        lambda: simulate_policy(trace, EXACT, 20, atomic=True),
        lambda: simulate_belady(trace, 20, atomic=True),
        lambda: run_simulations(trace, [SimBudget(20)], policies_named("exact"), atomic=True),
    ):
        with pytest.raises(BudgetTooSmall, match="largest step") as e:
            run_it()
        assert e.value.needed_bytes == 30
    assert even_budgets(trace, 2, atomic=True) == [SimBudget(30), SimBudget(40)]
    assert even_budgets(trace, 2)[0].arena_bytes < 30  # what the engine can do with


def test_a_plan_that_gives_up_its_own_expert_is_refused_and_a_change_of_level_is_not() -> None:
    trace = one_layer([0, 1])
    own = StepPlan([0, 1], [0, 0], [[], [0]])
    with pytest.raises(EngineError, match="an expert of a step for another of the same step"):
        simulate(trace, lambda *_: Fixed(own), 20, resident=(2,), atomic=True)  # type: ignore[arg-type]
    other = StepPlan([0, 1], [0, 0], [[], [2]])
    assert simulate(trace, lambda *_: Fixed(other), 20, resident=(2,), atomic=True).loads == 2  # type: ignore[arg-type]
    two = replace(one_layer([0, 1], n_experts=2), n_levels=2, unit_bytes=np.full(4, 10), read_bytes=np.full(4, 10))
    promoted = StepPlan([0, 1], [0, 0], [[1], [3]])  # both low copies go, each for its own expert
    assert simulate(two, lambda *_: Fixed(promoted), 20, resident=(1, 3), atomic=True).evictions == 2  # type: ignore[arg-type]


# ---- the command -------------------------------------------------------------------------------------------


def test_simulate_takes_steps_for_events_when_asked(tmp_path: Path) -> None:
    with open_engine(tiny_model_path(), "middle", n_ctx=48, n_ubatch=16, n_threads=1) as engine:
        trace = record_trace(engine, TEXT, 60)
    save_trace(tmp_path / "t.npz", trace)
    said = {}
    for option in ((), ("--atomic",)):
        done = run("simulate", tmp_path / "t.npz", "--policy", "exact", "--cache", "lru,learned", "--json", *option)
        assert done.returncode == 0, done.stderr
        said[bool(option)] = json.loads(done.stdout)
    assert said[True]["atomic"] and not said[False]["atomic"]
    of_policies = {
        at: [(r["arena_bytes"], r["cache"], r["loads"]) for r in s["rows"] if r["cache"]] for at, s in said.items()
    }
    assert of_policies[True] == of_policies[False]  # one token at a time: the same
    bounds = {at: [r["loads"] for r in s["rows"] if r["cache"] is None] for at, s in said.items()}
    assert all(a >= b for a, b in zip(bounds[True], bounds[False], strict=True)) and bounds[True] != bounds[False]
    text = run("simulate", tmp_path / "t.npz", "--policy", "exact", "--atomic").stdout
    assert "every step is one event" in text
