"""The bench of cache rules counts what the engine counts, and the renormalised model is the one it says it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import renormalised
import rules
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.runner.calibrate.observe import spread_chunks
from moe_edge.runner.measure.record import record_trace
from moe_edge.schedulers.replay.belady import simulate_belady
from moe_edge.schedulers.replay.simulate import simulate_policy
from random_models import Shape, write_random_model
from reference import stock_logits
from test_simulate import EXACT, TEXT

TOKENS = [(7 * i * i + 3) % 250 for i in range(40)]


def test_loads_of_micro_batches_sum_up_to_the_replays() -> None:
    with open_engine(tiny_model_path(), "middle", n_ctx=48, n_ubatch=16, n_threads=1) as engine:
        trace, again = (record_trace(engine, TEXT, n, one_by_one=n == 60) for n in (60, 40))
        arena = engine.plan.arena_bytes
    for each in (trace, again):
        loads = rules.loads_of(each, rules.of_rule("learned"), arena)
        assert len(loads) == len(each.batch_tokens)
        assert sum(loads) == simulate_policy(each, EXACT, arena, atomic=True).loads
        assert sum(loads) == sum(rules.loads_of(each, rules.of_constants(0.7, 0.05, 0.25), arena))
        assert sum(loads) != sum(rules.loads_of(each, rules.of_constants(0.1, 0.4, 0.9), arena))
    assert sum(rules.loads_of(trace, rules.of_belady(trace), arena)) == simulate_belady(trace, arena, atomic=True).loads
    both = rules.joined(trace, again)
    found = rules.loads_of(both, rules.of_rule("learned"), arena)
    assert found[:60] == rules.loads_of(trace, rules.of_rule("learned"), arena) and len(found) == len(both.batch_tokens)


def test_behind_a_prompt_the_replay_counts_what_the_engine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "PROMPT", 80)
    monkeypatch.setattr(rules, "DECODED", 8)
    chunks = spread_chunks(np.arange(4 * 88, dtype=np.int32).reshape(4, 88) % 250, 3 * 88)
    rows = rules.behind_a_prompt(tiny_model_path(), chunks, (0.5,))
    for row in rows:
        assert len(row["counted"]) == 2 and min(row["counted"]) > 0
        if not row["atomic"]:
            assert row["replayed"] == row["counted"]


def test_weights_that_sum_up_to_one_are_normalised_to_themselves(tmp_path: Path) -> None:
    """With all experts in use softmax sums up to one: the rewritten model has the logits of the first."""
    source = write_random_model(
        tmp_path / "s.gguf", "olmoe", Shape(n_layer=2, n_expert=4, n_used=4), expert_type="F32", dense_type="F32"
    )
    renormalised.renormalise(source, tmp_path / "n.gguf", [1.0, 1.0])
    assert read_gguf(tmp_path / "n.gguf").kv["general.architecture"] == "minimax-m2"
    a, b = (stock_logits(path, TOKENS, 8, 1) for path in (source, tmp_path / "n.gguf"))
    assert np.abs(a - b).max() < 1e-4 * np.abs(a).max()
    few = write_random_model(
        tmp_path / "f.gguf", "olmoe", Shape(n_layer=2, n_expert=8, n_used=2), expert_type="F32", dense_type="F32"
    )
    renormalised.renormalise(few, tmp_path / "m.gguf", [1.0, 1.0])
    a, b = (stock_logits(path, TOKENS, 8, 1) for path in (few, tmp_path / "m.gguf"))
    assert np.abs(a - b).max() > 1e-2 * np.abs(a).max()
    with pytest.raises(UnknownName, match="is minimax-m2; worked out for olmoe only"):
        renormalised.renormalise(tmp_path / "n.gguf", tmp_path / "x.gguf", [1.0, 1.0])


def test_dropping_is_costed_by_hand() -> None:
    weights, y = np.array([[0.75, 0.25]]), np.eye(2, dtype=np.float32)[None]
    # Without the first, the second grows by 0.75: 0.75^2 + 0.75^2 over 0.75^2.
    assert renormalised.dropped(weights, y).tolist() == [2.0, 2.0]
    assert renormalised.dropped(weights, np.ones((1, 2, 1), np.float32)).tolist() == [0.0, 0.0]
