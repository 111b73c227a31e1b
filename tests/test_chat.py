"""Conversations: what begins anew with /clear, and what goes on."""

from __future__ import annotations

import io
from typing import Any

import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.chat import Chat
from moe_edge.runner.engine import Engine
from moe_edge.runner.generate import Sampling
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.lookahead.around import with_lookahead
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policy import make_policy


def chat_with(engine: Any, **more: Any) -> tuple[Chat, io.StringIO]:
    err = io.StringIO()
    return Chat(engine, out=io.StringIO(), err=err, **more), err


class FakeEngine:
    """What /clear needs of an Engine."""

    def __init__(self) -> None:
        self.metadata: dict[str, object] = {}  # a base model
        self.conversations = 0

    def new_conversation(self) -> None:
        self.conversations += 1


def test_clear_begins_a_conversation_and_no_other_command_does() -> None:
    engine = FakeEngine()
    chat, err = chat_with(engine)
    chat.conversation.add("user", "hello")
    assert chat.command("/help") and chat.command("/nonsense")
    assert engine.conversations == 0 and chat.conversation.text == "hello"
    assert chat.command("/clear")
    assert (engine.conversations, chat.conversation.text) == (1, "")
    assert err.getvalue().endswith("(forgotten)\n")
    assert not chat.command("/exit")
    assert engine.conversations == 1


@pytest.mark.parametrize("lookahead", ["off", "single"])
@pytest.mark.parametrize("name", ["exact", "dymoe", "hobbit"])
def test_every_policy_passes_it_on_to_its_eviction_rule(name: str, lookahead: str) -> None:
    layout = Layout((4, 4), 2, (10, 5) * 8)
    policy: Any = make_policy(PolicyOptions(name, cache="hobbit", lookahead=lookahead), layout, 80)
    policy.plan(Step(0, [0, 1], [1, 1], [0.5, 0.5], [0.25, 0.25]))
    resident = set(policy.resident)
    assert any(policy.cache._rule.score) and resident
    uses = policy.stats.uses
    policy.new_conversation()
    assert not any(policy.cache._rule.score)
    assert set(policy.resident) == resident and policy.stats.uses == uses == 2


def test_look_ahead_keeps_what_it_has_asked_for() -> None:
    layout = Layout((4, 4), 1, (10,) * 8)
    policy: Any = with_lookahead(ExactLru(layout, 80), layout, "single")
    policy.reset([0, 5])
    policy.new_conversation()
    assert set(policy.resident) == {0, 5}


def tiny_engine(**more: object) -> Engine:
    return open_engine(tiny_model_path(), "middle", n_ctx=256, n_ubatch=32, n_threads=2, **more)


def test_a_new_conversation_restarts_the_counts_and_the_kv_cache_and_keeps_the_experts() -> None:
    with tiny_engine(policy=PolicyOptions(cache="hobbit"), warm_start=True) as engine:
        chat, _ = chat_with(engine, n_tokens=20, sampling=Sampling(temp=0))
        rule: Any = engine.policy.cache._rule
        first = chat.reply("In the beginning God created")
        assert first is not None and max(rule.score) > 0 and engine.llama.n_tokens > 0
        warm = engine._warm
        assert warm is not None
        resident, counted = engine.native.resident_units(), warm.usage.tokens_now
        chat.command("/clear")
        assert max(rule.score) == 0 and engine.llama.n_tokens == 0
        assert engine.native.resident_units() == sorted(engine.policy.resident) == resident
        assert warm.usage.tokens_now == counted > 20  # what a warm start keeps is not forgotten
        again = chat.reply("In the beginning God created")
        assert again is not None and again.reused_tokens == 0
        assert again.text == first.text != ""
        assert again.counters.loads < first.counters.loads
        assert sorted(engine.policy.resident) == engine.native.resident_units()


def test_a_turn_that_goes_on_is_no_new_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_engine(policy=PolicyOptions(cache="hobbit")) as engine:
        chat, _ = chat_with(engine, n_tokens=5, sampling=Sampling(temp=0))
        monkeypatch.setattr(engine, "new_conversation", lambda: pytest.fail("told"))
        chat.reply("In the beginning")
        second = chat.reply(" and then")
        assert second is not None and second.reused_tokens > 0
