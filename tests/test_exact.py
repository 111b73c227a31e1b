"""Exactness: the same bits at every budget, and the bits of stock llama.cpp on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from moe_edge.convert.convert import convert
from moe_edge.runner.generate import Sampling, generate
from moe_edge.schedulers.options import PolicyOptions
from random_models import ARCHITECTURES, Shape, write_random_model
from reference import logits_of_context, stock_context, stock_logits

RUN_SETTINGS = [(8, 1), (64, 2), (512, 3)]  # micro-batch, threads
PROMPT_LENGTHS = (1, 9, 65, 600)


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 255, n)]


def engine_logits(path: Path, budget: str, lengths: tuple[int, ...], n_ubatch: int, n_threads: int) -> list[np.ndarray]:
    """All logits of one prompt of each length, [n_tokens, n_vocab]; checks that the budget forced evictions or not."""
    out = []
    engine = open_engine(path, budget, n_ctx=640, n_ubatch=n_ubatch, n_threads=n_threads, logits_all=True)
    with engine, engine.decoding():
        for n in lengths:
            llama = engine.llama
            out.append(logits_of_context(llama._ctx.ctx, llama._model.model, some_tokens(n), n_ubatch))
        c = engine.counters()
        assert c.committed_bytes <= engine.plan.arena_bytes
        if budget == "resident":
            assert c.evictions == 0
        else:
            assert c.evictions > 0, "this budget was meant to force evictions"
    return out


@pytest.mark.parametrize(("n_ubatch", "n_threads"), RUN_SETTINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_logit_is_the_same_at_every_budget_and_is_stock_llama_cpps(
    random_model: Callable[[str], Path], arch: str, n_ubatch: int, n_threads: int
) -> None:
    path = random_model(arch)
    lengths = PROMPT_LENGTHS
    stock = [stock_logits(path, some_tokens(n), n_ubatch, n_threads, n_ctx=640) for n in lengths]
    for budget in BUDGETS:
        logits = engine_logits(path, budget, lengths, n_ubatch, n_threads)
        for n, ours, theirs in zip(lengths, logits, stock, strict=True):
            assert np.isfinite(ours).all()
            assert np.array_equal(ours, theirs), f"{budget}, {n} tokens: differs by {np.abs(ours - theirs).max()}"


@pytest.mark.parametrize("expert_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q2_K", "Q6_K", "IQ4_NL"])
def test_every_expert_type_gives_stock_bits_at_the_floor(tmp_path: Path, expert_type: str) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", expert_type=expert_type)
    (ours,) = engine_logits(path, "floor", (100,), 64, 2)
    assert np.array_equal(ours, stock_logits(path, some_tokens(100), 64, 2, n_ctx=640))


def test_projections_of_different_types_give_stock_bits(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe", expert_type="Q4_K", down_type="Q8_0")
    (ours,) = engine_logits(path, "floor", (100,), 64, 2)
    assert np.array_equal(ours, stock_logits(path, some_tokens(100), 64, 2, n_ctx=640))


def test_many_experts_and_odd_widths_give_stock_bits(tmp_path: Path) -> None:
    shape = Shape(n_layer=3, n_embd=512, n_ff=160, n_expert=32, n_used=4)
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", shape, expert_type="Q8_0")
    (ours,) = engine_logits(path, "floor", (300,), 128, 2)
    assert np.array_equal(ours, stock_logits(path, some_tokens(300), 128, 2, n_ctx=640))


def test_a_group_larger_than_the_work_area_gives_stock_bits_whatever_its_rest(tmp_path: Path) -> None:
    """Both experts get every token; 4 MiB of work area hold some 107 rows of this width, so the lengths leave rests."""
    shape = Shape(n_layer=1, n_embd=1024, n_ff=1536, n_expert=2, n_used=2)
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", shape)
    lengths = (*range(100, 116), 216, 330)
    for n, ours in zip(lengths, engine_logits(path, "resident", lengths, 512, 2), strict=True):
        assert np.array_equal(ours, stock_logits(path, some_tokens(n), 512, 2, n_ctx=640)), f"{n} tokens"


def test_split_files_are_read_in_place(tmp_path: Path) -> None:
    whole = write_random_model(tmp_path / "w.gguf", "olmoe")
    first = write_random_model(tmp_path / "s.gguf", "olmoe", split=True)
    assert "-00001-of-" in first.name
    (ours,) = engine_logits(first, "floor", (50,), 64, 2)
    assert np.array_equal(ours, stock_logits(whole, some_tokens(50), 64, 2, n_ctx=640))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_converted_pair_gives_the_bits_of_its_source(
    random_model: Callable[[str], Path], tmp_path: Path, arch: str
) -> None:
    source = random_model(arch)
    convert(source, tmp_path / "pair.gguf")
    (ours,) = engine_logits(tmp_path / "pair.gguf", "floor", (120,), 64, 2)
    assert np.array_equal(ours, stock_logits(source, some_tokens(120), 64, 2, n_ctx=640))


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss"])
def test_greedy_text_is_the_same_at_every_budget(random_model: Callable[[str], Path], arch: str) -> None:
    texts = set()
    for budget in BUDGETS:
        with open_engine(random_model(arch), budget, n_ctx=256, n_ubatch=32, n_threads=2) as engine:
            texts.add(generate(engine, "Once upon a time", 40, Sampling(temp=0)).text)
    assert len(texts) == 1 and texts != {""}


def test_two_models_and_two_contexts_in_one_process_do_not_mix(random_model: Callable[[str], Path]) -> None:
    a, b = random_model("olmoe"), random_model("qwen3moe")
    tokens = some_tokens(30)
    options = {"n_ctx": 128, "n_ubatch": 16, "n_threads": 2, "logits_all": True}
    with (
        open_engine(a, "floor", **options) as ea,
        open_engine(b, "middle", **options) as eb,
        open_engine(a, "resident", **options) as ec,
    ):
        for engine, path in ((ea, a), (eb, b), (ec, a), (ea, a)):
            with engine.decoding():
                ours = logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, 16)
            assert np.array_equal(ours, stock_logits(path, tokens, 16, 2, n_ctx=128))


@pytest.mark.parametrize("arch", ["olmoe", "gpt-oss", "smallthinker"])
def test_a_graph_that_comes_node_by_node_gives_the_same_bits(random_model: Callable[[str], Path], arch: str) -> None:
    """With an eval callback llama.cpp hands over one node at a time: the weighted sum is then not one pass."""
    import llama_cpp

    path, tokens, seen = random_model(arch), some_tokens(40), []
    policy = PolicyOptions(lookahead="single")

    @llama_cpp.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def look(_node: object, ask: bool, _user: object) -> bool:
        seen.append(ask)
        return True

    with open_engine(path, "floor", n_ctx=128, n_ubatch=16, n_threads=2, logits_all=True, policy=policy) as engine:
        model = engine.llama._model.model
        with stock_context(model, n_ctx=128, n_batch=16, n_ubatch=16, cb_eval=look) as context:
            ours = logits_of_context(context, model, tokens, 16)
    assert len(seen) > 100
    assert np.array_equal(ours, stock_logits(path, tokens, 16, 2, n_ctx=128))


def test_a_skeleton_without_the_engine_gives_no_plausible_text(random_model: Callable[[str], Path]) -> None:
    engine = open_engine(random_model("olmoe"), "floor", n_ctx=64)
    skeleton = engine.model.skeleton
    engine.close()
    assert np.isnan(stock_logits(skeleton, some_tokens(5), 8, 1, n_ctx=64)).all()
