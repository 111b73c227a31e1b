"""The look-ahead rules in the engine: what they fetch, what the state says, what a trace keeps."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.capi import Counters
from moe_edge.runner.chat import Chat
from moe_edge.runner.engine import Engine
from moe_edge.runner.generate import Generation, LookAheadState, Sampling, generate
from moe_edge.runner.measure.record import record_trace
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.lookahead.around import LookAheadPolicy, with_lookahead
from moe_edge.schedulers.lookahead.controller import Controller, Reach
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.replay.simulate import simulate
from test_lookahead import LAYOUT, TOKENS, logits, small

# ---- the rules in the engine


def use(engine: Engine, name: str) -> LookAheadPolicy:
    policy = with_lookahead(ExactLru(engine.layout, engine.plan.arena_bytes), engine.layout, name)
    assert isinstance(policy, LookAheadPolicy)
    engine._use(policy)
    return policy


@pytest.mark.parametrize("name", ["single", "stacked", "votes", "auto"])
def test_look_ahead_changes_no_bit(name: str) -> None:
    path = tiny_model_path()
    tokens = [int(t) for t in np.random.default_rng(3).integers(0, 2000, 120)]
    with small(path, 0.3) as engine:
        want = logits(engine, 1, tokens)
        policy = use(engine, name)
        before = engine.counters()
        engine.llama._ctx.kv_cache_clear()
        assert np.array_equal(logits(engine, 1, tokens), want)
        c = engine.counters().since(before)
        assert c.prefetched == policy.prefetched
        assert name == "auto" or (c.prefetched > 50 and c.prefetch_useful > 0)
        assert c.hits + c.loads == c.uses
        assert sorted(policy.resident) == engine.native.resident_units()
        assert engine.counters().committed_bytes <= engine.plan.arena_bytes


@pytest.mark.parametrize("name", ["single", "stacked", "votes"])
def test_a_simulation_counts_what_the_engine_counts(name: str) -> None:
    tokens = [int(t) for t in np.random.default_rng(5).integers(0, 2000, 80)]
    with small(tiny_model_path(), 0.3, logits_all=False) as engine:
        width = 2 * engine.model.n_expert_used
        trace = record_trace(engine, tokens, look_ahead=(3, width))
        policy = use(engine, name)
        policy.reset(start := engine.policy.resident)
        before = engine.counters()
        for token in tokens:
            with engine.decoding():
                engine.llama.eval([token])
        c = engine.counters().since(before)

    def make(layout: Layout, arena_bytes: int) -> LookAheadPolicy:
        made = with_lookahead(ExactLru(layout, arena_bytes), layout, name)
        assert isinstance(made, LookAheadPolicy)
        return made

    s = simulate(trace, make, engine.plan.arena_bytes, resident=start)
    assert s.prefetched > 0
    assert (s.uses, s.hits, s.loads, s.evictions, s.prefetched) == (c.uses, c.hits, c.loads, c.evictions, c.prefetched)


def test_a_trace_keeps_what_the_routers_said(random_model: Callable[[str], Path]) -> None:
    with small(random_model("olmoe"), logits_all=False) as engine:
        trace = record_trace(engine, TOKENS[:10], look_ahead=(3, 4))
        assert trace.ahead_experts is not None and trace.ahead_experts.shape == (10, 2, 3, 4)
        assert (trace.ahead_experts[:, 0, 0] >= 0).all() and (trace.ahead_experts[:, 1] == -1).all()
        steps = [s for _, s in trace.steps(with_ahead=True)]
    assert steps[0].ask_ahead is not None and len(steps[0].ask_ahead(3)) == 1
    assert list(steps[0].ask_ahead(3)[0].experts) == trace.ahead_experts[0, 0, 0].tolist()
    assert steps[1].ask_ahead is not None and steps[1].ask_ahead(3) == []


# ---- what the user is told


COUNTS = Counters(
    prefetched=120, prefetch_useful=80, prefetch_late=3, prefetch_wasted=20, prefetch_cancelled=15, prefetch_failed=1,
    prefetch_bytes=5 << 20, wasted_bytes=1 << 19,
)  # fmt: skip
KEYS = (
    "prefetched", "prefetch_useful", "prefetch_late", "prefetch_wasted", "prefetch_cancelled", "prefetch_failed",
    "prefetch_bytes", "wasted_bytes",
)  # fmt: skip


def test_a_reply_tells_what_became_of_the_experts_that_were_prefetched() -> None:
    counts = "120 experts prefetched, 80 useful (3 late), 20 wasted, 15 cancelled, 1 failed; 5.0 MiB prefetched, "
    reply = Generation(counters=COUNTS, lookahead=LookAheadState("votes"))
    assert reply.line().splitlines()[1:] == [f"[look-ahead votes: {counts}0.5 MiB wasted]"]
    off = LookAheadState("auto", False, 1, ((2, 2), (2, 2), (2, 2)))
    assert off.text(COUNTS) == f"look-ahead auto (off after 1 trial): {counts}0.5 MiB wasted"
    on = LookAheadState("auto", True, 3, ((2, 2), (1, 4), (3, 1)))
    assert on.text(COUNTS).startswith("look-ahead auto (on after 3 trials, depth x width 2x2 1x4 3x1): 120 experts ")


def test_without_look_ahead_a_reply_says_nothing_of_it() -> None:
    line = Generation(counters=replace(COUNTS, prefetched=0)).line()
    assert "\n" not in line and "ahead" not in line and "prefetch" not in line
    assert LookAheadState.of(ExactLru(LAYOUT, 80)) is None


def test_the_state_is_that_of_the_controller() -> None:
    policy = with_lookahead(ExactLru(LAYOUT, 80), LAYOUT, "auto")
    assert isinstance(policy, LookAheadPolicy)
    assert LookAheadState.of(policy) == LookAheadState("auto", False, 0, ())  # no token yet
    policy.controller = Controller(4, 2, 10.0)
    policy.controller.trials = 2
    policy.controller.settings[1] = Reach(3, 1)
    assert LookAheadState.of(policy) == LookAheadState("auto", False, 2, ((1, 1), (3, 1), (1, 1)))
    policy.controller._set(True)
    state = LookAheadState.of(policy)
    assert state is not None and state.pays
    assert LookAheadState.of(with_lookahead(ExactLru(LAYOUT, 80), LAYOUT, "votes")) == LookAheadState("votes")


@pytest.mark.parametrize("name", ["off", "single", "auto"])
def test_line_and_json_carry_the_engines_counts(name: str) -> None:
    policy = PolicyOptions(lookahead=name)
    with small(tiny_model_path(), 0.3, n_ubatch=32, logits_all=False, policy=policy) as engine:
        first = generate(engine, "In the beginning God created", 40, Sampling(temp=0))
        done = generate(engine, "And the king said unto him", 40, Sampling(temp=0))
        facts = json.loads(json.dumps(done.to_json(engine)))
        total, largest = engine.counters(), engine.layout.largest_bytes(0)
    assert [facts[key] for key in KEYS] == [getattr(done.counters, key) for key in KEYS]
    both = {key: getattr(first.counters, key) + facts[key] for key in KEYS}
    under_way = total.prefetch_bytes - both.pop("prefetch_bytes")  # read since the reply ended
    assert both == {key: getattr(total, key) for key in both} and 0 <= under_way <= 8 * largest
    if name == "off":
        assert facts["lookahead"] is None and not any(facts[key] for key in KEYS) and "\n" not in done.line()
        return
    assert facts["lookahead"]["name"] == name and f"[look-ahead {name}" in done.line()
    assert f": {facts['prefetched']} experts prefetched, {facts['prefetch_useful']} useful (" in done.line()
    if name == "single":
        assert facts["prefetched"] > 0 and facts["prefetch_useful"] > 0 and facts["prefetch_bytes"] > 0
        assert facts["lookahead"] == {"name": "single", "pays": None, "trials": None, "settings": None}
    else:
        assert facts["lookahead"]["trials"] >= 0 and len(facts["lookahead"]["settings"]) == 3


def test_chats_statistics_add_up_the_session() -> None:
    policy = PolicyOptions(lookahead="single")
    with small(tiny_model_path(), 0.3, n_ubatch=32, logits_all=False, policy=policy) as engine:
        chat = Chat(engine, 20, Sampling(temp=0), io.StringIO(), io.StringIO())
        chat.reply("In the beginning")
        assert chat.last is not None
        reply = chat.last.counters.prefetched
        chat.reply("And the king said")
        assert chat.last is not None
        last = chat.last.counters.prefetched
        said = chat.stats()
    assert last > 0 and reply > 0
    assert f"[look-ahead single: {last} experts prefetched" in said
    assert f"session: look-ahead single: {reply + last} experts prefetched" in said
