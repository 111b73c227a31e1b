"""Every architecture of the table gives the bits of stock llama.cpp, with all experts evicted at once and with none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from every_architecture import N_USED, ROWS, Row, write_tiny_model
from moe_edge.convert.convert import convert
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.models.families import ARCHITECTURES
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.prove import NOTHING
from reference import stock_logits

# Tried by hand only: no tiny model of them that stock llama.cpp decodes is made here yet.
BY_HAND = {"arctic", "deepseek4", "dots3note"}
TOKENS = [(7 * i * i + 3) % 300 for i in range(40)]
N_UBATCH = 16


def test_every_entry_of_the_table_has_a_model_or_is_named_here() -> None:
    assert set(ROWS) | BY_HAND == set(ARCHITECTURES) and not set(ROWS) & BY_HAND


def last_logits(engine: Engine) -> Any:
    row = llama_cpp.llama_get_logits_ith(engine.llama._ctx.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(engine.llama.n_vocab(),)).copy()


@pytest.mark.parametrize("name", ROWS)
def test_the_bits_are_those_of_stock(tmp_path: Path, name: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", name)
    want = stock_logits(path, TOKENS, n_ubatch=N_UBATCH, n_threads=1, n_ctx=64, all_positions=False)[-1]
    assert np.isfinite(want).all() and want.std() > 0.1
    options: dict[str, Any] = {
        "n_threads": 1, "n_ctx": 64, "n_ubatch": N_UBATCH, "flash_attn": False, "proof": NOTHING,
    }  # fmt: skip
    with pytest.raises(BudgetTooSmall) as refused:
        Engine(path, EngineOptions(ram_bytes=1, **options))
    floor = refused.value.needed_bytes
    for ram_bytes in (floor, floor + (1 << 30)):
        with Engine(path, EngineOptions(ram_bytes=ram_bytes, **options)) as engine, engine.decoding():
            engine.llama.eval(TOKENS)
            assert np.array_equal(last_logits(engine), want)
            counts = engine.counters()
            assert counts.uses >= N_USED and (counts.evictions > 0) == (ram_bytes == floor)


@pytest.mark.parametrize("name", ["glm4moe", "deepseek2", "qwen35moe"])
@pytest.mark.parametrize("converted", [False, True])
def test_layers_for_drafts_are_neither_counted_nor_computed(tmp_path: Path, name: str, converted: bool) -> None:
    """A model with one more layer, of multi-token prediction: the same memory as without, and the bits of stock."""
    keys = ROWS[name].keys
    plain = write_tiny_model(tmp_path / "plain.gguf", name)
    drafts = write_tiny_model(
        tmp_path / "drafts.gguf", name, Row({**keys, "block_count": 3, "nextn_predict_layers": 1})
    )
    if converted:
        convert(drafts, tmp_path / "out.gguf")
    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 64, "n_ubatch": N_UBATCH, "flash_attn": False, "proof": NOTHING}
    sizes = []
    for path in (plain, tmp_path / "out.gguf" if converted else drafts):
        with Engine(path, EngineOptions(ram_bytes=1 << 30, **options)) as engine:
            sizes.append((engine.layout.n_experts, engine.model.expert_bytes))
            if path != plain:
                want = stock_logits(drafts, TOKENS, n_ubatch=N_UBATCH, n_threads=1, n_ctx=64, all_positions=False)[-1]
                with engine.decoding():
                    engine.llama.eval(TOKENS)
                    assert np.array_equal(last_logits(engine), want)
    assert sizes[0] == sizes[1]
