"""Regression guard: counts, not times. What a token costs in reads, bytes, calls and graphs on the embedded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.layout import Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions

N_LAYERS, TOP_K, PIECES = 4, 4, 3
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness"


def decode_one_by_one(engine: Engine, n_tokens: int) -> tuple[Counters, int]:
    """(counters, scheduler calls) of n_tokens single-token decodes after an empty cache was warmed by none."""
    calls = 0
    policy = engine.policy

    def count(step: Step) -> StepPlan | None:
        nonlocal calls
        calls += 1
        return policy.plan(step)

    engine.native.schedule = count
    tokens = engine.llama.tokenize(TEXT.encode(), add_bos=False)
    assert len(tokens) >= 20
    before = engine.counters()
    with engine.decoding():
        for i in range(n_tokens):
            engine.llama.eval([tokens[i % len(tokens)]])
    return engine.counters().since(before), calls


# budget -> (fewest, most) loads in 40 tokens. At the floor a layer keeps one expert, and hits nothing on this text.
# Measured 2026-11-26 with the default rule: 640, 133 (LRU: 158), 56; processors may differ by a choice or two.
GUARDS = {"floor": (620, 640), "middle": (110, 150), "resident": (50, 60)}


@pytest.mark.parametrize("budget", GUARDS)
def test_what_forty_tokens_cost(budget: str) -> None:
    with open_engine(tiny_model_path(), budget, n_ctx=256, n_ubatch=32, n_threads=2) as engine:
        c, calls = decode_one_by_one(engine, 40)
        unit_bytes = engine.layout.unit_bytes
    assert c.steps == 40 * N_LAYERS
    assert calls == c.steps  # one call of the scheduler for each MoE layer and token
    assert c.uses == c.steps * TOP_K
    assert c.hits + c.loads == c.uses
    fewest, most = GUARDS[budget]
    assert fewest <= c.loads <= most
    assert c.reads == c.loads * PIECES
    assert c.bytes_read <= c.loads * max(unit_bytes)
    # one graph when nothing is missing; one more for each arrival at most twice: its hidden rows, its down product
    assert c.steps <= c.graphs <= c.steps + 2 * c.loads


@pytest.mark.parametrize("rule", ["lru", "auto"])
def test_with_a_layer_less_than_the_working_set_lru_hits_nothing_and_the_default_does(rule: str) -> None:
    """Up to a layer less, what a layer's last step used last may be hit: the other layers fit. One expert more, as the
    working set is reckoned with the largest of each layer."""
    options = EngineOptions(n_ctx=256, n_ubatch=1, n_threads=2, policy=PolicyOptions(cache=rule))
    whole = Engine(tiny_model_path(), replace(options, ram_bytes=NO_LIMIT))
    good, layer_bytes = whole.plan.comfortable_bytes, (TOP_K + 1) * max(whole.layout.unit_bytes)
    whole.close()
    hits = []
    for ram_bytes in (good - layer_bytes, good):
        with Engine(tiny_model_path(), replace(options, ram_bytes=ram_bytes)) as engine:
            assert len(engine.plan.lines()) == (2 if ram_bytes < good else 1)
            hits.append(decode_one_by_one(engine, 40)[0].hits)
    assert (hits[0] == 0) == (rule == "lru") and hits[1] > 0


def test_a_long_prefill_reads_each_touched_expert_once_for_each_micro_batch() -> None:
    with open_engine(tiny_model_path(), "floor", n_ctx=512, n_ubatch=64, n_threads=2) as engine:
        tokens = engine.llama.tokenize((TEXT * 8).encode(), add_bos=False)[:128]
        with engine.decoding():
            engine.llama.eval(tokens)
        c = engine.counters()
    assert c.steps == 2 * N_LAYERS
    assert c.loads <= 2 * N_LAYERS * 16
    assert c.reads == c.loads * PIECES


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_tokens() -> None:
    def anonymous_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    with open_engine(tiny_model_path(), "middle", n_ctx=2048, n_ubatch=32, n_threads=2) as engine:
        decode_one_by_one(engine, 300)
        before = anonymous_kib()
        decode_one_by_one(engine, 600)
        assert anonymous_kib() - before < 512
