"""A scale for each expert beside gate, up or down (NVFP4 checkpoints, gemma4): the bits of stock llama.cpp."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BadFile
from moe_edge.models.store.store import open_model
from moe_edge.schedulers.layout import Step, StepPlan
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits

SMALL = Shape(n_layer=3, n_embd=128, n_ff=64, n_expert=8, n_used=3)
ALL = ("gate", "up", "down")


def some_tokens(n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(1).integers(0, 255, n)]


def check(path: Path, source: Path, budget: str, lengths: Sequence[int], n_ubatch: int, **options: object) -> None:
    """Every logit of a prompt of each length is stock's, and the budget forced evictions unless all fits."""
    with (
        open_engine(path, budget, n_ctx=512, n_ubatch=n_ubatch, n_threads=1, logits_all=True, **options) as engine,
        engine.decoding(),
    ):
        llama = engine.llama
        for n in lengths:
            ours = logits_of_context(llama._ctx.ctx, llama._model.model, some_tokens(n), n_ubatch)
            stock = stock_logits(source, some_tokens(n), n_ubatch, 1, n_ctx=512)
            assert np.isfinite(ours).all()
            assert np.array_equal(ours, stock), f"{budget}, {n} tokens: differs by {np.abs(ours - stock).max()}"
        assert (engine.counters().evictions == 0) == (budget == "resident")


@pytest.mark.parametrize("scales", [("gate",), ("up",), ("down",), ("gate", "up"), ALL], ids="-".join)
@pytest.mark.parametrize("arch", ["qwen3moe", "llama"])
def test_scales_give_stock_bits_at_every_budget(tmp_path: Path, arch: str, scales: tuple[str, ...]) -> None:
    path = write_random_model(tmp_path / "m.gguf", arch, SMALL, expert_type="Q8_0", scales=scales)
    plain = write_random_model(tmp_path / "p.gguf", arch, SMALL, expert_type="Q8_0")
    assert not np.array_equal(*(stock_logits(p, some_tokens(9), 32, 1, n_ctx=512) for p in (path, plain)))  # type: ignore[arg-type]
    for budget in BUDGETS:
        check(path, path, budget, (1, 9, 150), 32)
    check(path, path, "floor", (300,), 256)


def test_a_converted_pair_keeps_its_scales(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", SMALL, expert_type="Q8_0", scales=ALL)
    convert(path, tmp_path / "pair.gguf")
    check(tmp_path / "pair.gguf", path, "floor", (9, 150), 32)


def test_nvfp4_experts_with_scales_give_stock_bits(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", SMALL, expert_type="NVFP4", scales=ALL)
    for budget in BUDGETS:
        check(path, path, budget, (1, 9, 150), 64)


def first_layers_gate_weights(path: Path) -> list[float]:
    """The gate weights the scheduler is told of at the first MoE layer, for one token."""
    seen: list[list[float]] = []
    with open_engine(path, "floor", n_ctx=64, n_ubatch=1, n_threads=1) as engine, engine.decoding():
        plan = engine.native.schedule

        def watch(step: Step) -> StepPlan | None:
            seen.append(list(step.weights))
            return plan(step)  # type: ignore[misc]

        engine.native.schedule = watch
        engine.llama.eval(some_tokens(1))
    return seen[0]


@pytest.mark.parametrize("scales", [("down",), ALL], ids="-".join)
def test_the_scheduler_is_told_the_gate_weights_and_not_the_scales(tmp_path: Path, scales: tuple[str, ...]) -> None:
    plain = write_random_model(tmp_path / "p.gguf", "qwen3moe", SMALL)
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", SMALL, scales=scales)
    told = first_layers_gate_weights(path)
    assert told == first_layers_gate_weights(plain)
    assert abs(sum(told) - 1) < 1e-5  # qwen3moe normalizes them


def test_a_scale_of_another_shape_or_type_is_named(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", SMALL, scales=("up",))
    data = path.read_bytes()
    name = b"blk.1.ffn_up_exps.scale"
    at = data.index(name) + len(name) + 4  # number of dimensions, then the one dimension and the type
    (tmp_path / "bad.gguf").write_bytes(data[:at] + struct.pack("<QI", SMALL.n_expert // 2, 0) + data[at + 12 :])
    with pytest.raises(BadFile, match=r"'blk\.1\.ffn_up_exps\.scale' is \[4\] of type F32, expected F32"):
        open_model(tmp_path / "bad.gguf")
