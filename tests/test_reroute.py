"""Experts chosen by a policy: llama.cpp's own gate weights follow, in every architecture, and nothing else changes.

The other way to the same numbers is stock llama.cpp, whose ranking of the experts is rewritten by an eval callback.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_architecture import ROWS, write_tiny_model
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import EngineError, UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.prove import NOTHING
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.layout import Layout, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.levels import HIGH, IntArray, LevelPolicy
from reference import GgmlTensor, logits_of_context, logits_with_look

TOKENS = [(7 * i * i + 3) % 250 for i in range(40)]
N_CTX, N_UBATCH = 64, 16
PLAIN = {"n_ctx": N_CTX, "n_ubatch": N_UBATCH, "n_threads": 1, "flash_attn": False, "proof": NOTHING}
REFUSED = {"grovemoe": "uses its choice of experts for more"}


def swap_last(order: Sequence[int], n_used: int) -> list[int]:
    """The model's choice, but the first expert that was left out in place of the last one when that is an odd one."""
    kept = list(order[:n_used])
    return [*kept[:-1], order[n_used]] if kept[-1] % 2 and len(order) > n_used else kept


class Steered(LevelPolicy):
    """Every token's experts as `choose` says, in the order it gives them."""

    name = "steered"
    wants_routing = wants_attention = False
    selects = True

    def __init__(
        self, layout: Layout, arena_bytes: int, choose: Callable[[Sequence[int], int], list[int]] = swap_last
    ) -> None:
        super().__init__(layout, arena_bytes)
        self.choose, self.seen = choose, [0, 0]

    def select(self, selection: Selection) -> list[int]:
        assert list(selection.scores) == sorted(selection.scores, reverse=True)
        self.seen[0] += 1
        return self.choose(selection.order, selection.n_used)[::-1]

    def select_many(self, selections: Selections) -> IntArray:
        ranked = np.take_along_axis(selections.scores, selections.order, 1)
        assert (np.diff(ranked[np.isfinite(ranked).all(1)], axis=1) <= 0).all()
        self.seen[1] += 1
        rows = [self.choose(row, selections.n_used)[::-1] for row in selections.order.tolist()]
        return np.array(rows, np.int32)

    def plan(self, step: Step) -> StepPlan | None:
        return self.serve(step, [HIGH] * len(step.experts))


def steer(engine: Engine, choose: Callable[[Sequence[int], int], list[int]] = swap_last) -> Steered:
    policy = Steered(engine.layout, engine.plan.arena_bytes, choose)
    engine._use(policy)
    return policy


def ours(engine: Engine, tokens: Sequence[int], n_batch: int = N_UBATCH) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, n_batch)


def steered_stock(path: Path, tokens: Sequence[int], n_batch: int, n_used: int) -> np.ndarray:
    """Stock llama.cpp with each row of each ranking changed by swap_last."""

    def swap(tensor: GgmlTensor) -> None:
        for row in range(tensor.ne[1]):
            order = (ctypes.c_int32 * tensor.ne[0]).from_address(tensor.data + row * tensor.nb[1])
            order[:n_used] = swap_last(order[:], n_used)

    return logits_with_look(path, tokens, n_batch, ("ffn_moe_argsort",), swap, n_ctx=N_CTX)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in REFUSED])
def test_chosen_experts_get_the_gate_weights_of_llama_cpp(tmp_path: Path, name: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", name)
    with Engine(path, EngineOptions(ram_bytes=NO_LIMIT, logits_all=True, **PLAIN)) as engine:  # type: ignore[arg-type]
        exact = ours(engine, TOKENS)
        assert engine.counters().substituted_uses == 0
        policy = steer(engine)
        engine.new_conversation()
        changed = ours(engine, TOKENS)
        assert policy.seen[1] > 0 and engine.counters().substituted_uses > 0
        assert np.array_equal(changed, steered_stock(path, TOKENS, N_UBATCH, engine.model.n_expert_used))
        assert not np.array_equal(changed, exact)
        engine.set_policy(PolicyOptions())
        engine.new_conversation()
        assert np.array_equal(ours(engine, TOKENS), exact)  # nothing is claimed any more


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_does_not_let_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", name)
    rerouting = EngineOptions(ram_bytes=NO_LIMIT, policy=PolicyOptions("reroute"), **PLAIN)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"reroute cannot choose experts of a '{name}' model: block 0 {REFUSED[name]}"):
        Engine(path, rerouting).__enter__()


@pytest.mark.parametrize("name", ["olmoe", "deepseek2", "gpt-oss"])
def test_the_budget_changes_no_bit_of_a_choice_that_does_not_depend_on_it(
    tmp_path: Path, name: str
) -> None:
    """Evictions are forced: the arena has room for one expert."""
    path = write_tiny_model(tmp_path / "m.gguf", name)
    rows = []
    for ram in (NO_LIMIT, 0):
        with Engine(path, EngineOptions(ram_bytes=NO_LIMIT, logits_all=True, **PLAIN)) as probe:  # type: ignore[arg-type]
            fixed, one = probe.plan.fixed.total_bytes, max(probe.layout.unit_bytes)
        ram = ram or fixed + one + (1 << 16)
        with Engine(path, EngineOptions(ram_bytes=ram, logits_all=True, **PLAIN)) as engine:  # type: ignore[arg-type]
            steer(engine)
            rows.append(np.concatenate([ours(engine, TOKENS), ours(engine, TOKENS[:5], 1)]))
            assert (engine.counters().evictions > 0) == (ram != NO_LIMIT)
            assert engine.counters().committed_bytes <= engine.plan.arena_bytes
    assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("wrong", [[0, 0], [0, 99], [-1, 0]])
def test_a_choice_that_is_none_fails_the_decode_and_the_next_one_works(wrong: list[int]) -> None:
    options = EngineOptions(ram_bytes=NO_LIMIT, logits_all=True, **PLAIN)  # type: ignore[arg-type]
    with Engine(tiny_model_path(), options) as engine:
        policy = steer(engine, lambda order, n_used: [*wrong, *order[: n_used - 2]])
        for tokens in ([1], [1, 2, 3]):
            with pytest.raises(EngineError, match=r"selected expert .*is not one of 16 or is selected twice"):
                ours(engine, tokens)
        policy.choose = swap_last
        ours(engine, [1, 2, 3])


# ---- the policy, in the engine


def tight(policy: PolicyOptions, share: float = 0.3, **more: Any) -> Engine:
    """The embedded model with a share of its experts in memory."""
    options = {"n_ctx": 256, "n_threads": 1, "logits_all": True, **more}
    probe = Engine(tiny_model_path(), EngineOptions(ram_bytes=NO_LIMIT, **options))
    ram = probe.plan.fixed.total_bytes + int(share * probe.layout.total_bytes)
    probe.close()
    return Engine(tiny_model_path(), EngineOptions(ram_bytes=ram, policy=policy, **options))


def reply_of(engine: Engine, prompt: str = "The king said", n: int = 24) -> Any:
    return generate(engine, prompt, n, Sampling(0.8, seed=5))


def test_strength_0_gives_the_bits_of_exact() -> None:
    rows = []
    for policy in (PolicyOptions(), PolicyOptions("reroute", strength=0.0)):
        with tight(policy) as engine:
            rows.append(np.concatenate([ours(engine, TOKENS), ours(engine, TOKENS[:9], 1)]))
            assert engine.counters().substituted_uses == 0 and engine.counters().evictions > 0
    assert np.array_equal(rows[0], rows[1])


def test_a_policy_that_takes_the_model_s_own_choice_gives_the_bits_of_exact() -> None:
    with tight(PolicyOptions()) as engine:
        want = np.concatenate([ours(engine, TOKENS), ours(engine, TOKENS[:9], 1)])
    with tight(PolicyOptions()) as engine:
        policy = steer(engine, lambda order, n_used: list(order[:n_used]))
        assert np.array_equal(np.concatenate([ours(engine, TOKENS), ours(engine, TOKENS[:9], 1)]), want)
        assert min(policy.seen) > 0 and engine.counters().substituted_uses == 0


@pytest.mark.parametrize("score_range", ["mean", "token"])
def test_rerouting_reads_less_and_says_how_much_was_substituted(score_range: str) -> None:
    with tight(PolicyOptions()) as engine:
        exact = reply_of(engine)
        assert "substituted" not in exact.line() and exact.counters.substituted_uses == 0
    with tight(PolicyOptions("reroute", strength=0.3, score_range=score_range)) as engine:
        lossy = reply_of(engine)
        assert any("the reply depends on what was in memory" in line for line in engine.lines())
        assert lossy.counters.substituted_uses > 0
        assert f"{lossy.counters.substituted_uses} uses substituted" in lossy.line()
        assert lossy.to_json(engine)["substituted_uses"] == lossy.counters.substituted_uses
        assert lossy.counters.bytes_read < 0.9 * exact.counters.bytes_read
        # what comes from memory reads nothing: with every expert kept there is nothing to replace
        again = reply_of(engine)
        assert again.counters.loads < again.counters.uses


def test_the_same_seed_prompt_and_empty_cache_give_the_same_text_and_another_history_need_not() -> None:
    policy, texts, counts = PolicyOptions("reroute", strength=0.5, keep_top=0), [], []
    for history in ("", "", "In the beginning God created the heaven and the earth."):
        with tight(policy) as engine:
            if history:
                reply_of(engine, history)
                engine.new_conversation()
            reply = reply_of(engine)
            texts.append(reply.text)
            counts.append(reply.counters.substituted_uses)
    assert texts[0] == texts[1] and counts[0] == counts[1] > 0
    assert counts[2] != counts[0]


@pytest.mark.parametrize("lookahead", ["votes", "single"])
def test_look_ahead_goes_with_it(lookahead: str) -> None:
    with tight(PolicyOptions("reroute", strength=0.2, lookahead=lookahead)) as engine:
        reply = reply_of(engine)
        c = reply.counters
        assert c.substituted_uses > 0 and c.prefetched > 0 and c.committed_bytes <= engine.plan.arena_bytes
        assert sorted(engine.policy.resident) == engine.native.resident_units()


def test_all_in_memory_means_no_substitution() -> None:
    with tight(PolicyOptions("reroute", strength=1.0), share=1.1) as engine:
        engine.native.preload(range(len(engine.layout.unit_bytes)))
        engine.policy.reset(engine.native.resident_units())
        assert reply_of(engine).counters.substituted_uses == 0
