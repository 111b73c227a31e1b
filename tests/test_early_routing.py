"""Models that route before attention: the next layer's experts are announced when the layer before it is done."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from moe_edge.models.errors import EngineError
from moe_edge.runner.engine import Engine
from moe_edge.schedulers.layout import Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.lookahead.around import LookAheadPolicy, with_lookahead
from moe_edge.schedulers.lookahead.controller import Controller
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.replay.simulate import SimArena
from random_models import ARCHITECTURES, Shape, write_random_model
from reference import stock_logits
from test_lookahead import TOKENS, check_prefetch_counts, logits, small
from test_lookahead_rules import use

N_LAYERS = 4


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def early_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(n_layer=N_LAYERS, n_expert=16, n_used=3, sigmoid=request.param == "sigmoid")
    return write_random_model(tmp_path_factory.mktemp("early") / "m.gguf", "smallthinker", shape)


class Watch:
    """The steps of an engine and what was announced of them, passed on to its policy."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[Step] = []
        self.announced: list[tuple[int, Step]] = []  # (steps before it, the step announced)
        self.missed: list[int] = []  # layer of each expert that a step had to read
        self._policy = engine.policy
        self._announce = engine.native.announce
        engine.native.schedule, engine.native.announce = self._plan, self._plan_ahead

    def _plan(self, step: Step) -> StepPlan | None:
        cache, layout = self._policy.cache, self._policy._layout  # type: ignore[attr-defined]
        self.missed += [step.layer for e in step.experts if layout.first_unit[step.layer] + e not in cache]
        plan = self._policy.plan(step)
        self.steps.append(step)
        return plan

    def _plan_ahead(self, step: Step) -> Sequence[Prefetch]:
        self.announced.append((len(self.steps), step))
        return self._announce(step) if self._announce else ()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_only_models_that_route_before_attention_announce(random_model: Callable[[str], Path], arch: str) -> None:
    with small(random_model(arch), n_ubatch=4) as engine:
        assert engine.native.early_routers == (engine.layout.n_layers - 1 if arch == "smallthinker" else 0)
        assert engine.native.known_routers == engine.layout.n_layers
        # the plan was made with what a router needs: routers are seen before the memory is split
        assert engine.plan.fixed.scratch_bytes == engine.native.scratch_bytes(4, engine.model.n_expert_used, 1)
        engine.native.set_lookahead(1, 2)
        watch = Watch(engine)
        logits(engine, 1, TOKENS[:4])
        assert len(watch.announced) == (4 if arch == "smallthinker" else 0)


def test_without_look_ahead_nothing_is_announced(early_model: Path) -> None:
    with small(early_model) as engine:
        watch = Watch(engine)
        logits(engine, 1, TOKENS[:4])
        assert watch.steps and not watch.announced
        assert engine.counters().look_ahead_seconds == 0


@pytest.mark.parametrize(("n_ubatch", "threads"), [(1, 1), (1, 2), (3, 2), (16, 1), (64, 2)])
def test_what_is_announced_is_what_the_next_step_uses(early_model: Path, n_ubatch: int, threads: int) -> None:
    with small(early_model, 0.3, n_ubatch, n_threads=threads) as engine:
        use(engine, "single")
        watch = Watch(engine)
        logits(engine, n_ubatch)
    announced = {at: step for at, step in watch.announced}
    assert len(announced) == len(watch.announced)
    for at, step in enumerate(watch.steps):
        # which of several tokens the last layer keeps is not known before
        if step.layer == 0 or (step.layer == N_LAYERS - 1 and step.n_tokens > 1):
            assert at not in announced
            continue
        told = announced[at]
        assert (told.layer, told.experts, told.counts) == (step.layer, step.experts, step.counts)
        assert told.n_tokens == step.n_tokens
        assert np.allclose(told.weights, step.weights, atol=1e-5)  # smallthinker's add up to 1
        assert np.allclose(told.squares, step.squares, atol=1e-5)


@pytest.mark.parametrize("name", ["single", "stacked", "votes", "auto"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_every_read_ahead_is_used_and_no_bit_changes(early_model: Path, name: str, share: float) -> None:
    with small(early_model, share) as engine:
        off = logits(engine, 1)
        policy = use(engine, name)
        watch, before = Watch(engine), engine.counters()
        assert np.array_equal(logits(engine, 1), off)
        c = engine.counters().since(before)
        assert c.evictions > 50 and c.prefetched == policy.prefetched
        assert c.prefetch_useful == c.prefetched and c.prefetch_wasted == c.prefetch_cancelled == 0  # precision 1
        assert c.loads == len(watch.missed)
        if name != "auto":
            assert c.prefetched > 50
            assert set(watch.missed) == {0}  # recall 1, but for the first layer, which has none before it
        assert sorted(policy.resident) == engine.native.resident_units()
        assert c.peak_committed_bytes <= engine.plan.arena_bytes
        check_prefetch_counts(engine.counters(), len(policy.resident))
    assert np.array_equal(off, stock_logits(early_model, TOKENS, 1, 1, n_ctx=128))


@pytest.mark.parametrize(("n_ubatch", "threads"), [(4, 1), (16, 2), (60, 2)])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_micro_batches_are_announced_whole(early_model: Path, n_ubatch: int, threads: int, share: float) -> None:
    """More experts than the arena holds, too: as many as fit are read, and none in vain."""
    with small(early_model, share, n_ubatch, n_threads=threads) as engine:
        policy = use(engine, "single")
        watch = Watch(engine)
        got = logits(engine, n_ubatch)
        c = engine.counters()
        assert c.prefetch_useful == c.prefetched == policy.prefetched > 0
        assert c.prefetch_wasted == c.prefetch_cancelled == 0
        if share and n_ubatch == 4:
            assert set(watch.missed) == {0, N_LAYERS - 1}
        assert sorted(policy.resident) == engine.native.resident_units()
        assert c.peak_committed_bytes <= engine.plan.arena_bytes
    assert np.array_equal(got, stock_logits(early_model, TOKENS, n_ubatch, threads, n_ctx=128))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([(10**6, [])], "prefetches an expert that does not exist"),
        ([(40, [39])], "evicts an expert that is not in memory"),
        ([(u, []) for u in range(64)], "already in memory|exceeds the memory"),
    ],
)
def test_a_wrong_answer_is_refused_and_the_engine_goes_on(
    early_model: Path, answer: list[tuple[int, list[int]]], says: str
) -> None:
    with small(early_model, "floor") as engine:
        use(engine, "single")
        announce, engine.native.announce = engine.native.announce, lambda _step: answer  # type: ignore[assignment, return-value]
        with pytest.raises(EngineError, match=says):
            logits(engine, 1)

        def fail(_step: Step) -> list[tuple[int, list[int]]]:
            raise EngineError("no plan ahead")

        engine.native.announce = fail  # type: ignore[assignment]
        with pytest.raises(EngineError, match="no plan ahead"):
            logits(engine, 1)
        engine.native.announce = announce
        assert np.array_equal(logits(engine, 1), stock_logits(early_model, TOKENS, 1, 1, n_ctx=128))


# ---- the policy, without a model


LAYOUT = Layout((6,) * 4, 1, (10,) * 24)


def lookahead(arena_bytes: int, layout: Layout = LAYOUT) -> LookAheadPolicy:
    policy = with_lookahead(ExactLru(layout, arena_bytes), layout, "single")
    assert isinstance(policy, LookAheadPolicy)
    return policy


def step(layer: int, *experts: int, weights: tuple[float, ...] = (), n_tokens: int = 1) -> Step:
    return Step(layer, list(experts), [1] * len(experts), weights, [w * w for w in weights], n_tokens)


def test_the_next_steps_experts_displace_the_last_ones_but_not_each_other() -> None:
    policy = lookahead(30)
    policy.reset([6, 1, 2])  # layer 1's expert 0 is the oldest
    assert policy.plan(step(0, 1, 2)) is None
    assert policy.plan_ahead(step(1, 0, 3, 4)) == [(9, [1]), (10, [2])]
    assert policy.plan(step(1, 0, 3, 4)) is None and policy.prefetched == 2
    assert policy.plan_ahead(step(2, 0, 1, 2, 3)) == [(12, [6]), (13, [9]), (14, [10])]  # the fourth does not fit
    plan = policy.plan(step(2, 0, 1, 2, 3))
    assert plan is not None and plan.order == [0, 1, 2, 3] and plan.victims == [(), (), (), [12]]


def test_what_is_in_memory_is_not_announced_for_reading() -> None:
    policy = lookahead(60)
    policy.reset([6, 7, 20])
    assert policy.plan_ahead(step(1, 0, 1)) == []
    assert policy.plan_ahead(step(1, 0, 1, 2)) == [(8, [])]


def test_levels_are_wished_for_by_the_weights_announced() -> None:
    layout = Layout((4,) * 2, 2, (10, 4) * 8)

    class Wishful(ExactLru):
        def wishes(self, step: Step) -> list[int]:
            return [-1 if w < 0.1 else 1 if w < 0.4 else 0 for w in step.weights]

    policy = with_lookahead(Wishful(layout, 60), layout, "single")
    assert isinstance(policy, LookAheadPolicy)
    policy.reset([8 + 1])  # layer 1, expert 0, low
    assert policy.plan_ahead(step(1, 0, 2, 3, weights=(0.7, 0.25, 0.05))) == [(8, [9]), (8 + 4 + 1, [])]


def test_auto_reads_ahead_only_while_it_is_found_to_pay() -> None:
    policy = with_lookahead(ExactLru(LAYOUT, 60), LAYOUT, "auto")
    assert isinstance(policy, LookAheadPolicy)
    assert policy.plan_ahead(step(1, 0, 1)) == []
    policy.controller = Controller(4, 2, 10.0)
    assert policy.plan_ahead(step(1, 0, 1)) == []
    policy.controller.on = True
    assert policy.plan_ahead(step(1, 0, 1)) == [(6, []), (7, [])]


def test_levels_that_need_the_tokens_routing_wait_for_the_step() -> None:
    policy = lookahead(60)
    policy.inner.wants_routing = True  # type: ignore[misc]
    assert policy.plan_ahead(step(1, 0, 1, n_tokens=2)) == []
    assert policy.plan_ahead(step(1, 0, 1)) == [(6, []), (7, [])]


@pytest.mark.parametrize("rule", ["lru", "learned", "next-use", "decayed", "lru-admit", "hobbit"])
def test_announced_steps_miss_nothing_that_fits_and_exceed_nothing(rule: str) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        n_layers, n_experts, n_used = rng.randint(2, 5), rng.randint(3, 10), rng.randint(1, 3)
        sizes = tuple(rng.randint(1, 9) for _ in range(n_layers * n_experts))
        layout = Layout((n_experts,) * n_layers, 1, sizes)
        arena_bytes = rng.randint(max(sizes) * n_used, sum(sizes))
        inner = ExactLru(layout, arena_bytes)
        inner.use_cache(rule)
        policy = with_lookahead(inner, layout, "single")
        assert isinstance(policy, LookAheadPolicy)
        in_memory: set[int] = set()
        arena = SimArena(layout, list(sizes), arena_bytes, 10.0)
        for _ in range(40):
            for layer in range(n_layers):
                now = step(layer, *sorted(rng.sample(range(n_experts), n_used)))
                own = {layout.first_unit[layer] + e for e in now.experts}
                if layer:
                    fetched = policy.plan_ahead(now)
                    for unit, gone in fetched:
                        assert unit in own - in_memory and not own & set(gone) and set(gone) <= in_memory
                        in_memory = in_memory - set(gone) | {unit}
                        assert sum(sizes[u] for u in in_memory) <= arena_bytes
                    arena._prefetch(fetched, arena.clock)
                    assert own <= in_memory
                plan = policy.plan(now)
                assert layer == 0 or plan is None
                arena.execute(now, plan, 0.1)
                in_memory = set(arena.ready_at)
                assert set(policy.resident) == in_memory
        assert arena.prefetch_useful == arena.prefetched and arena.prefetch_wasted == 0
