"""A lossy KV cache is asked for by name, is smaller in the plan, and is told with every reply."""

from __future__ import annotations

from pathlib import Path

import pytest
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.kv.identity import difference
from moe_edge.runner.kv.state_file import load_state, read_header, write_state

PROMPT = "The king said that the old man was in the house by the sea"


def opened(k: str = "f16", v: str = "f16", flash: bool | None = None) -> Engine:
    options = EngineOptions(ram_bytes=1 << 30, n_threads=1, cache_type_k=k, cache_type_v=v, flash_attn=flash)
    return Engine(tiny_model_path(), options)


@pytest.mark.parametrize(("k", "v"), [("q8_0", "q8_0"), ("q4_0", "f16"), ("q8_0", "q4_0")])
def test_a_smaller_cache_is_planned_told_and_goes_to_disk(tmp_path: Path, k: str, v: str) -> None:
    with opened(flash=True) as plain:
        whole, ours = plain.plan.fixed.kv_bytes, plain.identity()
        exact = generate(plain, PROMPT, 4, Sampling(temp=0))
        assert "KV cache" not in exact.line() and not any("lossy" in line for line in plain.lines())
    with opened(k, v) as engine:
        assert engine.flash_attn and engine.plan.fixed.kv_bytes < 0.8 * whole
        assert "cache_type" in difference(ours, engine.identity())
        result = generate(engine, PROMPT, 4, Sampling(temp=0))
        said = f"KV cache in {k if k == v else f'{k} and {v}'}"
        assert said in result.line() and f"lossy: {said}" in engine.lines()
        assert result.to_json(engine)["cache_type_k"] == k
        n = engine.llama.n_tokens
        write_state(tmp_path / "s", engine.llama, engine.checkpoints, {})
        engine.new_conversation()
        load_state(read_header(tmp_path / "s"), engine.llama, engine.checkpoints)
        assert engine.llama.n_tokens == n


def test_what_cannot_be_is_a_wrong_call() -> None:
    with pytest.raises(UsageError, match="needs flash attention"):
        opened("q8_0", flash=False)
    with pytest.raises(UnknownName, match="q5_7"):
        opened("q5_7")
