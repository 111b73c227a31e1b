"""Look-ahead: the routers' scores, reads that nobody waits for yet, and the rules that choose them."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import budget_bytes
from moe_edge.models.errors import EngineError, UnknownName
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.schedulers.layout import Ahead, ExpertKey, Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.lookahead.around import LookAheadPolicy, with_lookahead
from moe_edge.schedulers.lookahead.rules import make_rule
from moe_edge.schedulers.lookahead.rules.rule import Predicted
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policy import Policy
from moe_edge.schedulers.replay.simulate import SimArena
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 255, 60)]


def logits(engine: Engine, n_ubatch: int, tokens: list[int] = TOKENS) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, n_ubatch)


def small(path: Path, budget: str | float = "middle", n_ubatch: int = 1, **more: object) -> Engine:
    """budget: a name of conftest's, or a share of the way from the floor to all resident."""
    options = EngineOptions(n_ctx=128, n_ubatch=n_ubatch, **{"n_threads": 1, "logits_all": True, **more})  # type: ignore
    if isinstance(budget, str):
        return Engine(path, replace(options, ram_bytes=budget_bytes(path, budget, options)))
    floor, whole = (budget_bytes(path, name, options) for name in ("floor", "resident"))
    return Engine(path, replace(options, ram_bytes=floor + int(budget * (whole - floor))))


class RandomPrefetch:
    """The exact policy, and prefetches of absent units chosen by chance, some of them evicted in flight."""

    def __init__(self, inner: ExactLru, n_units: int, seed: int) -> None:
        self._inner, self._n_units, self._rng = inner, n_units, random.Random(seed)
        self.asked = 0

    def plan(self, step: Step) -> StepPlan | None:
        plan = self._inner.plan(step)
        step.later = True
        return plan

    def meanwhile(self, step: Step) -> list[Prefetch]:
        self._inner.meanwhile(step)
        cache, layout = self._inner.cache, self._inner._layout
        of_step = {layout.first_unit[step.layer] + e for e in step.experts}
        prefetch: list[Prefetch] = []
        taken = set(of_step)
        for _ in range(self._rng.choice((0, 0, 1, 2, 5))):
            absent = [u for u in range(self._n_units) if u not in cache and u not in taken]
            if not absent:
                break
            unit, victims = self._rng.choice(absent), []
            need = layout.unit_bytes[unit]
            free = [u for u in cache.resident if u not in taken]
            self._rng.shuffle(free)
            if cache.used_bytes - sum(layout.unit_bytes[u] for u in free) + need > cache.arena_bytes:
                break
            while cache.used_bytes + need > cache.arena_bytes:
                cache.remove(victim := free.pop())
                victims.append(victim)
            assert cache.add(unit) == []
            prefetch.append(Prefetch(unit, victims))
            taken.update((unit, *victims))
        self.asked += len(prefetch)
        return prefetch


def check_prefetch_counts(c: Counters, resident: int) -> None:
    assert c.hits + c.loads == c.uses
    assert c.loads + c.prefetched - c.evictions == resident
    gone = c.prefetch_useful + c.prefetch_wasted + c.prefetch_cancelled
    assert gone <= c.prefetched <= gone + resident
    assert c.prefetch_late <= c.prefetch_useful
    assert c.prefetch_bytes <= c.bytes_read and c.wasted_bytes <= c.bytes_read


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_prefetched_the_bits_are_the_same(random_model: Callable[[str], Path], seed: int) -> None:
    rng = random.Random(seed)
    arch = rng.choice(["olmoe", "qwen3moe", "gpt-oss", "deepseek2-fused"])
    n_ubatch, threads = rng.choice([1, 1, 1, 4, 16]), rng.choice([1, 2])
    path = random_model(arch)
    options = {"n_threads": threads, "n_io_threads": rng.choice([1, 2, 4])}
    with small(path, rng.choice([0.15, 0.3, 0.5]), n_ubatch, **options) as engine:
        policy = engine.policy
        assert isinstance(policy, ExactLru)
        chance = RandomPrefetch(policy, engine.native.n_units, seed)
        engine.native.schedule, engine.native.meanwhile = chance.plan, chance.meanwhile
        got = logits(engine, n_ubatch)
        assert chance.asked > 0 or n_ubatch > 1
        assert sorted(policy.resident) == engine.native.resident_units()
        c = engine.counters()
        assert c.prefetched == chance.asked
        assert c.committed_bytes <= engine.plan.arena_bytes
        check_prefetch_counts(c, len(policy.resident))
        assert c.prefetch_failed == 0
    assert np.array_equal(got, stock_logits(path, TOKENS, n_ubatch, threads, n_ctx=128))


def prefetching(engine: Engine, prefetch: Callable[[Step], object]) -> None:
    """Let the engine's policy fetch ahead, whatever the step."""

    def plan(step: Step) -> StepPlan | None:
        plan = engine.policy.plan(step)
        step.later = True
        return plan

    engine.native.schedule = plan
    engine.native.meanwhile = lambda step: [Prefetch(*each) for each in prefetch(step)]  # type: ignore[attr-defined]


def own(engine: Engine, step: Step) -> int:
    return engine.layout.first_unit[step.layer] + step.experts[0]


@pytest.mark.parametrize(
    ("prefetch", "says"),
    [
        (lambda e, s: [(10**6, [])], "prefetches an expert that does not exist"),
        (lambda e, s: [(own(e, s), [])], "or that the present step uses"),
        (lambda e, s: [(15, [own(e, s)])], "evicts an expert of the present step for one that is not needed"),
        (lambda e, s: [(15, [14])], "evicts an expert that is not in memory"),
        (lambda e, s: [(u, []) for u in range(8, 16)], "exceeds the memory"),
        (lambda e, s: [(15, []), (15, [])], "prefetches an expert that is already in memory"),
    ],
)
def test_a_wrong_prefetch_is_refused_and_the_engine_goes_on(
    random_model: Callable[[str], Path], prefetch: Callable[[Engine, Step], object], says: str
) -> None:
    path = random_model("olmoe")
    with small(path, "middle" if "already" in says else "floor") as engine:
        prefetching(engine, lambda step: prefetch(engine, step))
        with pytest.raises(EngineError, match=says):
            logits(engine, 1)
        engine._use(engine.policy)
        assert np.array_equal(logits(engine, 1), stock_logits(path, TOKENS, 1, 1, n_ctx=128))


def test_a_failed_read_ahead_fails_no_step_that_does_not_need_it_and_is_counted(tmp_path: Path) -> None:
    """The file is cut within its last expert: fetched ahead it fails silently, needed it fails the decode."""
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    whole = tmp_path / "whole.gguf"
    shutil.copy(path, whole)
    with small(path, "resident") as engine:
        want = logits(engine, 1)
    with small(path, "resident") as engine:
        unit = max(range(8, 16), key=lambda u: engine.model.pieces[3 * u].offset)
        last = max(engine.model.pieces[3 * unit : 3 * unit + 3], key=lambda p: p.offset)
        os.truncate(path, last.offset + 100)
        done = False

        def plan(step: Step) -> StepPlan | None:
            if done and engine.counters().prefetch_failed == 0:  # the reader has nothing else to do meanwhile
                time.sleep(0.2)
            plan = engine.policy.plan(step)
            step.later = step.layer == 0 and not done
            return plan

        def meanwhile(step: Step) -> list[Prefetch]:
            nonlocal done
            done = True
            assert unit not in engine.policy.cache and engine.policy.cache.add(unit) == []
            return [Prefetch(unit, [])]

        engine.native.schedule, engine.native.meanwhile = plan, meanwhile
        with pytest.raises(EngineError, match="cut short"):
            for at in range(len(TOKENS)):
                with engine.decoding():
                    engine.llama.eval([TOKENS[at]])
        assert engine.counters().prefetch_failed >= 1
        assert engine.counters().steps > 2  # the steps before went well
        with open(path, "r+b") as f, open(whole, "rb") as w:
            w.seek(last.offset)
            f.seek(last.offset)
            f.write(w.read())
        engine._use(engine.policy)
        assert np.array_equal(logits(engine, 1), want)


# ---- the routers' scores


@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe", "llama", "deepseek2", "granitemoe", "gpt-oss"])
def test_every_router_is_seen(random_model: Callable[[str], Path], arch: str) -> None:
    with small(random_model(arch)) as engine:
        assert engine.native.known_routers == engine.layout.n_layers


def test_scores_are_the_next_routers_on_this_input(tmp_path: Path) -> None:
    import gguf

    path = write_random_model(tmp_path / "m.gguf", "olmoe", Shape(n_layer=4))
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def floats(name: str) -> np.ndarray:
        return np.array(tensors[name].data, np.float64)

    seen: list[tuple[int, np.ndarray, list[Ahead]]] = []
    with small(path) as engine:
        engine.native.set_lookahead(3, 4)
        inputs: list[np.ndarray] = []
        engine.native.observe = lambda _layer, _routing, x: inputs.append(x.copy())

        def plan(step: Step) -> StepPlan | None:
            assert step.ask_ahead is not None
            seen.append((step.layer, inputs[-1], list(step.ask_ahead(2))))
            return engine.policy.plan(step)

        engine.native.schedule = plan
        logits(engine, 1, TOKENS[:5])
    assert len(seen) == 20
    for layer, x, ahead in seen:
        assert [a.distance for a in ahead] == [1, 2][: 3 - layer]
        for a in ahead:
            there = layer + a.distance
            scale = floats(f"blk.{there}.ffn_norm.weight") / floats(f"blk.{layer}.ffn_norm.weight")
            z = floats(f"blk.{there}.ffn_gate_inp.weight") @ (x[0].astype(np.float64) * scale)
            p = np.exp(z - z.max())
            p /= p.sum()
            assert a.experts == np.argsort(-p, kind="stable")[:4].tolist()
            assert np.allclose(a.scores, p[a.experts], atol=1e-5)


def test_off_steps_cannot_ask_and_large_micro_batches_get_no_answer(random_model: Callable[[str], Path]) -> None:
    asks: list[object] = []
    with small(random_model("olmoe"), n_ubatch=32) as engine:
        def plan(step: Step) -> StepPlan | None:
            asks.append(step.ask_ahead and list(step.ask_ahead(1)))
            return engine.policy.plan(step)

        engine.native.schedule = plan
        logits(engine, 32)
        assert asks == [None] * 4
        engine.native.set_lookahead(1, 2)
        logits(engine, 32)
        assert asks[4:] == [[]] * 4
        assert engine.counters().look_ahead_seconds >= 0
        with pytest.raises(EngineError, match="look-ahead of 9 layers and 2 experts: the limits are 8 and 8"):
            engine.native.set_lookahead(9, 2)


# ---- the rules, without a model


LAYOUT = Layout((6,) * 4, 1, (10,) * 24)


def ahead(*best: tuple[int, ...]) -> list[Ahead]:
    """Experts of the layers behind this one, best first, with falling scores."""
    return [Ahead(d + 1, list(experts), [0.5 / (i + 1) for i in range(len(experts))]) for d, experts in enumerate(best)]


def pairs(predicted: list[Predicted]) -> list[tuple[int, int]]:
    return [(p.layer, p.expert) for p in predicted]


def test_single_takes_the_best_of_the_next_layer() -> None:
    rule = make_rule("single")
    assert pairs(rule.predict(1, ahead((4, 2, 0), (1, 3, 5)), 2, 2, lambda *_: False)) == [(2, 4), (2, 2)]


def test_stacked_goes_on_to_the_first_layer_that_would_miss() -> None:
    rule = make_rule("stacked")
    said = ahead((4, 2), (1, 3), (5, 0))
    assert pairs(rule.predict(0, said, 2, 2, lambda *_: False)) == [(1, 4), (1, 2)]
    assert pairs(rule.predict(0, said, 2, 2, lambda layer, _: layer == 1)) == [(1, 4), (1, 2), (2, 1), (2, 3)]


def test_votes_want_agreement_and_put_it_first() -> None:
    rule = make_rule("votes")
    no = lambda *_: False  # noqa: E731
    assert pairs(rule.predict(0, ahead((1, 2), (3, 4), (5, 0)), 2, 2, no)) == [(1, 1), (1, 2)]  # one voter
    # layer 2 by 2 voters: both name 4; layer 3 by 2: both name 5
    assert pairs(rule.predict(1, ahead((2, 4), (5, 1)), 2, 2, no)) == [(2, 4), (3, 5)]
    assert pairs(rule.predict(2, ahead((0, 5)), 2, 2, no)) == [(3, 5), (3, 0)]  # 3 of 3 votes before 2 of 3
    assert pairs(rule.predict(0, ahead((3, 2)), 2, 2, no)) == [(1, 3), (1, 2)]  # the next token: forgotten


def test_an_unknown_look_ahead_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown look-ahead 'vote'; known: off, single, stacked, votes, auto"):
        with_lookahead(ExactLru(LAYOUT, 80), LAYOUT, "vote")


def test_off_is_the_policy_itself() -> None:
    policy = ExactLru(LAYOUT, 80)
    assert with_lookahead(policy, LAYOUT, "off") is policy
    one_layer = Layout((4,), 1, (10,) * 4)
    assert with_lookahead(policy, one_layer, "single") is policy


def step_that_sees(layer: int, experts: list[int], *best: tuple[int, ...]) -> Step:
    said = ahead(*best)
    return Step(layer, experts, [1] * len(experts), ask_ahead=lambda depth: said[:depth])


def both(policy: Policy, step: Step) -> tuple[StepPlan | None, list[Prefetch]]:
    """The plan, and what is fetched ahead."""
    plan = policy.plan(step)
    return plan, list(policy.meanwhile(step)) if step.later else []


def test_a_guess_displaces_neither_the_step_nor_what_is_predicted() -> None:
    policy = with_lookahead(ExactLru(LAYOUT, 50), LAYOUT, "single")
    policy.reset([6, 20, 21, 0])  # layer 1's expert 0 is the oldest, and predicted
    plan, prefetch = both(policy, step_that_sees(0, [0, 1], (0, 3)))
    assert plan == ([0, 1], [0, 0], [(), []])
    assert prefetch == [(9, [20])]  # layer 1's expert 3 for the oldest of the others
    assert policy.plan(step_that_sees(1, [0, 3], ())) is None


def test_a_wrong_guess_makes_room_for_the_next_one() -> None:
    policy = with_lookahead(ExactLru(LAYOUT, 60), LAYOUT, "single")
    policy.reset([20, 21, 22, 0])
    assert both(policy, step_that_sees(0, [0, 1], (3,)))[1] == [(9, [])]
    plan, prefetch = both(policy, step_that_sees(1, [4, 5], (2,)))  # 9 was wrong
    assert plan is not None and plan.victims == [[20], [21]] and prefetch == [(14, [9])]


def test_a_predicted_low_wish_fetches_the_low_copy_and_a_high_one_replaces_it() -> None:
    layout = Layout((4,) * 2, 2, (10, 4) * 8)

    class Wishful(ExactLru):
        def wishes(self, step: Step) -> list[int]:
            return [1 if w < 0.4 else 0 for w in step.weights]

    policy = with_lookahead(Wishful(layout, 60), layout, "single")
    policy.reset([8 + 1])  # layer 1, expert 0, low
    prefetch = both(policy, step_that_sees(0, [0, 1], (0, 2)))[1]
    assert prefetch == [(8, [9]), (8 + 4 + 1, [])]  # weights 2/3 and 1/3


@pytest.mark.parametrize("name", ["single", "stacked", "votes", "auto"])
def test_no_plan_evicts_what_is_absent_predicted_or_needed_nor_exceeds_the_arena(name: str) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        n_layers, n_experts, n_used = rng.randint(2, 5), rng.randint(3, 10), rng.randint(1, 3)
        sizes = tuple(rng.randint(1, 9) for _ in range(n_layers * n_experts))
        layout = Layout((n_experts,) * n_layers, 1, sizes)
        arena_bytes = rng.randint(max(sizes) * n_used, sum(sizes))
        inner = ExactLru(layout, arena_bytes)
        policy = with_lookahead(inner, layout, name)
        arena = SimArena(layout, list(sizes), arena_bytes, rng.choice([1.0, 10.0, 100.0]))
        assert isinstance(policy, LookAheadPolicy)
        policy.measure = arena.measure
        for _ in range(60):
            for layer in range(n_layers):
                experts = sorted(rng.sample(range(n_experts), n_used))
                wide = min(n_experts, 2 * n_used)
                best = [tuple(rng.sample(range(n_experts), wide)) for _ in range(n_layers - 1 - layer)]
                plan, prefetch = both(policy, step_that_sees(layer, experts, *best))
                own = {layout.unit(ExpertKey(layer, e)) for e in experts}
                for unit, gone in prefetch:
                    assert unit not in own and not own & set(gone)
                arena.execute(Step(layer, experts, [1] * n_used), plan, 0.1, prefetch)
                assert set(policy.resident) == set(arena.ready_at) and arena.used_bytes == policy.used_bytes
        assert arena.prefetch_useful + arena.prefetch_wasted + arena.prefetch_cancelled <= arena.prefetched


def test_a_cancelled_guess_counts_only_the_bytes_that_were_read() -> None:
    layout = Layout((3, 3), 1, (40,) * 6)
    arena = SimArena(layout, [31] * 6, 240, 31.0)  # a unit takes 1 s, its pieces are 11, 10 and 10 bytes

    def run(layer: int, expert: int, prefetch: list[tuple[int, list[int]]], seconds: float) -> int:
        arena.execute(Step(layer, [expert], [1]), StepPlan([0], [0], [()]), seconds, prefetch)  # type: ignore[arg-type]
        return arena.bytes_read

    # 0 is there at 1 s; then 3 and 4 are fetched until 2.5 s: three pieces of 3, two begun of 4
    assert run(0, 0, [(3, []), (4, [])], 1.5) == 31
    assert run(1, 0, [], 0.0) == 31 + 31 + 21  # 3 is used, the rest of 4 cancelled
    assert (arena.prefetch_useful, arena.prefetch_late) == (1, 0)
    assert run(0, 1, [(5, [4])], 0.0) == 83 + 31 and arena.prefetch_cancelled == 1
    assert run(1, 2, [], 0.0) == 114 + 31 and arena.prefetch_late == 1  # needed before it began: read whole
    assert run(0, 0, [(4, [])], 0.0) == 145 and arena.clock == arena.disk_free_at  # no time left: not begun
