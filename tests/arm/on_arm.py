"""On an emulated ARM machine: moe-edge against stock llama.cpp on the same one. `make arm` runs this, pytest does not.

The machine is named in MOE_EDGE_ARM_MACHINE (machine.py). Tiny models, few tokens and one thread mostly: an emulated
instruction costs some tens of real ones. Starting a Python costs the most, so the proof of a model in a child process
has a test of its own and the others do without.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from machine import MACHINES
from moe_edge.convert.convert import convert
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner import prove
from moe_edge.runner.capi import loaded_ggml_version
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.schedulers.options import PolicyOptions
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits

MARCH = MACHINES[os.environ["MOE_EDGE_ARM_MACHINE"]].march
# Rows of an expert on both sides of MANY_ROWS in native/ffn.h: 45 tokens choose 2 of 8 experts, a single one does too.
PROMPT = [int(t) for t in np.random.default_rng(5).integers(0, 255, 45)]
SMALL: dict[str, object] = {"n_ctx": 128, "n_ubatch": 64, "logits_all": True, "proof": prove.NOTHING}
REPACKS = "dotprod" in MARCH  # whether ggml has repacked forms for this processor


@pytest.fixture(autouse=True)
def time_for_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child that tries a model first has some minutes, which an emulated one beside other programs may exceed."""
    monkeypatch.setattr(prove, "START_SECONDS", 1200)


def logits(engine: Engine, tokens: list[int]) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, 64)


def check(path: Path, budget: str, stock: list[np.ndarray], n_threads: int = 1, **options: object) -> None:
    """Prefill and decode at a named budget have these bits; the budget holds, and evicts unless all is resident."""
    with open_engine(path, budget, n_threads=n_threads, **SMALL, **options) as engine:
        for tokens, expected in zip((PROMPT, PROMPT[:1]), stock, strict=True):
            ours = logits(engine, tokens)
            assert np.isfinite(ours).all() and np.array_equal(ours, expected), f"{budget}, {len(tokens)} tokens"
        c = engine.counters()
        assert 0 < c.peak_committed_bytes <= engine.plan.arena_bytes
        assert (c.evictions == 0) == (budget == "resident")


def stocks(path: Path, n_threads: int = 1, **options: Any) -> list[np.ndarray]:
    return [stock_logits(path, tokens, 64, n_threads, n_ctx=128, **options) for tokens in (PROMPT, PROMPT[:1])]


def test_this_is_the_processor_it_says_it_is() -> None:
    import llama_cpp

    assert platform.machine() == "aarch64" and loaded_ggml_version()
    info = llama_cpp.llama_print_system_info().decode()
    for flag, shown in (("dotprod", "DOTPROD = 1"), ("fp16", "FP16_VA = 1"), ("i8mm", "MATMUL_INT8 = 1")):
        assert (shown in info) == (flag in MARCH), info


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "deepseek2"])
def test_the_bits_are_stocks_at_every_budget(random_model: Callable[[str], Path], arch: str) -> None:
    path = random_model(arch)  # Q4_K, MXFP4, and a shared expert; dense weights of Q8_0, repacked where ggml does
    expected = stocks(path)
    for budget in BUDGETS:
        check(path, budget, expected)
    with open_engine(path, "floor", n_threads=1, **SMALL) as engine:
        assert (engine.plan.fixed.repacked_bytes > 0) == REPACKS


def test_without_repacking_the_bits_are_stocks_without(random_model: Callable[[str], Path]) -> None:
    path = random_model("olmoe")
    expected = stocks(path, repack="off")
    check(path, "floor", expected, repack="off")
    assert np.array_equal(expected[0], stocks(path)[0]) != REPACKS


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_every_dense_type_has_stocks_bits_at_the_floor(tmp_path: Path, kind: str) -> None:
    path = write_random_model(tmp_path / "m.gguf", "llama", dense_type=kind, expert_type="F16", tied=kind == "Q4_0")
    check(path, "floor", stocks(path))
    check(path, "middle", stocks(path, repack_experts=True))  # stock's own default: nothing ever repacks F16


def test_a_model_is_proved_in_a_child_process(random_model: Callable[[str], Path]) -> None:
    with open_engine(random_model("olmoe"), "floor", n_threads=1, n_ctx=64, n_ubatch=16) as engine:
        assert np.isfinite(logits(engine, PROMPT[:1])).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K", "IQ4_NL", "F16", "BF16"])
def test_every_expert_type_has_stocks_bits_at_the_floor(tmp_path: Path, kind: str) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", expert_type=kind)
    check(path, "floor", stocks(path))


def test_two_threads_have_stocks_bits(random_model: Callable[[str], Path]) -> None:
    path = random_model("qwen3moe")
    check(path, "middle", stocks(path, 2), n_threads=2)


def test_look_ahead_changes_no_bit(random_model: Callable[[str], Path]) -> None:
    path = random_model("olmoe")
    policy = PolicyOptions(lookahead="single")
    check(path, "middle", stocks(path), policy=policy)
    with open_engine(path, "middle", n_threads=1, **SMALL, policy=policy) as engine:
        for token in PROMPT[:12]:
            assert np.isfinite(logits(engine, [token])).all()
        assert engine.counters().prefetched > 0


def test_a_converted_pair_of_two_levels_is_exact_and_a_lossy_policy_uses_the_lower(tmp_path: Path) -> None:
    source = write_random_model(tmp_path / "m.gguf", "olmoe", Shape(n_used=3), expert_type="Q8_0")
    convert(source, tmp_path / "pair.gguf", low_type="Q4_0", threads=1)
    check(tmp_path / "pair.gguf", "floor", stocks(source))
    lossy = PolicyOptions("dymoe", retention=0.5)
    with open_engine(tmp_path / "pair.gguf", "floor", n_threads=1, **SMALL, policy=lossy) as engine:
        assert np.isfinite(logits(engine, PROMPT)).all()
        c = engine.counters()
        assert c.low_uses > 0 and c.evictions > 0 and c.peak_committed_bytes <= engine.plan.arena_bytes


def test_the_embedded_model_answers_alike_under_a_small_budget_and_without_one() -> None:
    texts = []
    for ram in (38 << 20, 512 << 20):
        options = EngineOptions(n_ctx=64, n_ubatch=16, n_threads=1, ram_bytes=ram, proof=prove.NOTHING)
        with Engine(tiny_model_path(), options) as engine:
            texts.append(generate(engine, "The king said", 10, Sampling(temp=0)).text)
    assert texts[0] == texts[1] != ""
