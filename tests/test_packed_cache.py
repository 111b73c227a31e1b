"""The packed cache: experts kept as they are stored give stock's bits, within the budget, and are not read again."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.errors import MoeEdgeError, UsageError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.store import open_model
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure import packed_split
from moe_edge.runner.measure.record import load_trace, record_trace, save_trace
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.estimate import MachineSpeeds
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import BOTH, EXPONENTS, MANTISSAS, window_bytes
from moe_edge.schedulers.replay.simulate import simulate_policy
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits
from test_exact import some_tokens
from test_memory_limit import ALLOWANCE, Cgroup, cgroup  # noqa: F401  (a fixture)
from test_store import flip_byte

IN_CGROUP = """
import json, sys
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
options = EngineOptions(
    ram_bytes=int(sys.argv[2]), n_ctx=640, n_threads=1, proof="nothing", n_ubatch=64, packed_cache="60%"
)
with Engine(sys.argv[1], options) as engine, engine.decoding():
    engine.llama.eval([(7 * i * i + 3) % 250 for i in range(80)])
    for token in range(3, 43):
        engine.llama.eval([token])
    print(json.dumps({**vars(engine.counters()), "arena": engine.plan.arena_bytes}))
"""
WIDE = Shape(n_layer=3, n_ff=128, n_expert=64, n_used=4)  # 192 experts: many more than the window of 16


def packed_model(tmp_path: Path, expert_type: str, packed_as: str = "planes", **more: Any) -> tuple[Path, Path]:
    """(stock, packed) of one random model."""
    stock = write_random_model(tmp_path / "stock.gguf", "qwen3moe", WIDE, expert_type=expert_type, **more)
    convert(stock, tmp_path / "m.gguf", pack=packed_as)
    return stock, tmp_path / "m.gguf"


@lru_cache(maxsize=1)
def fixed_bytes(path: Path, options: EngineOptions) -> int:
    return sizes_of(path, options).plan.fixed.total_bytes


def engine_with(path: Path, share: float, packed: str, policy: PolicyOptions | None = None, **more: Any) -> Engine:
    """An engine with this share of the experts' bytes for experts."""
    options = EngineOptions(n_ctx=640, n_threads=1, logits_all=True, proof="nothing", **more)
    ram = fixed_bytes(path, options) + int(share * open_model(path).expert_bytes)
    return Engine(path, replace(options, ram_bytes=ram, packed_cache=packed, policy=policy or PolicyOptions()))


def decoded(engine: Engine, tokens: list[int], n_ubatch: int) -> tuple[np.ndarray, Counters]:
    with engine, engine.decoding():
        llama = engine.llama
        rows = logits_of_context(llama._ctx.ctx, llama._model.model, tokens, n_ubatch)
        return rows, engine.counters()


@pytest.mark.parametrize(
    ("expert_type", "packed_as"), [("BF16", "planes"), ("F16", "planes"), ("Q8_0", "planes"), ("BF16", "zstd")]
)
def test_every_logit_is_stocks_with_packed_experts_in_memory(
    tmp_path: Path, expert_type: str, packed_as: str
) -> None:
    stock, packed = packed_model(tmp_path, expert_type, packed_as)
    hits = 0
    for n_ubatch, n in ((1, 30), (64, 100)):
        expected = stock_logits(stock, some_tokens(n), n_ubatch, 1, n_ctx=640)
        for share, asked in ((0.12, "35%"), (0.5, "80%"), (1.2, "50%")):
            engine = engine_with(packed, share, asked, n_ubatch=n_ubatch)
            rows, c = decoded(engine, some_tokens(n), n_ubatch)
            assert np.array_equal(rows, expected), (share, asked, n_ubatch)
            assert c.committed_bytes <= engine.plan.whole_bytes and c.peak_packed_bytes <= engine.plan.packed_bytes
            assert engine.plan.whole_bytes + engine.plan.packed_bytes == engine.plan.arena_bytes
            if share > 1:
                assert engine.plan.packed_bytes == 0 == c.evictions
            else:
                assert c.evictions > 0 and c.peak_packed_bytes > 0 and c.hits + c.loads == c.uses
                hits += c.packed_hits
    assert hits > 0


def test_what_is_packed_in_memory_is_not_read(tmp_path: Path) -> None:
    _, packed = packed_model(tmp_path, "BF16")
    tokens = some_tokens(120)
    without, off = decoded(engine_with(packed, 0.5, "off", n_ubatch=1), tokens, 1)
    rows, on = decoded(engine_with(packed, 0.5, "85%", n_ubatch=1), tokens, 1)
    assert np.array_equal(rows, without)
    assert on.bytes_read < 0.95 * off.bytes_read
    assert on.packed_hits > 100 and on.unread_bytes > 0
    stored = sum(-(-p.stored_bytes // 4096) * 4096 for p in open_model(packed).pieces[:3])
    assert on.unread_bytes + on.bytes_read == pytest.approx(on.loads * stored, rel=0.02)


@pytest.mark.parametrize(("lookahead", "low"), [("stacked", ""), ("votes", "Q4_0")])
def test_reading_ahead_with_parts_does_not_change_bits(tmp_path: Path, lookahead: str, low: str) -> None:
    """Experts of more than a part of a speculative read (512 KiB), so that reads stop, go on, and are given up."""
    stock = write_random_model(
        tmp_path / "s.gguf", "qwen3moe", Shape(n_layer=3, n_embd=512, n_ff=1024, n_expert=16, n_used=2),
        expert_type="BF16",
    )  # fmt: skip
    convert(stock, tmp_path / "m.gguf", pack="planes", low_type=low or None)
    tokens = some_tokens(24)
    expected = stock_logits(stock, tokens, 1, 1, n_ctx=640)
    policy = PolicyOptions("exact", lookahead=lookahead)
    rows, c = decoded(engine_with(tmp_path / "m.gguf", 0.75, "50%", policy, n_ubatch=1), tokens, 1)
    assert np.array_equal(rows, expected)
    assert c.prefetched > 0 and c.packed_hits > 0 and c.evictions > 0


@pytest.mark.parametrize("packed_as", ["planes", "zstd"])
def test_parts_of_experts_are_held_and_only_the_rest_is_read(tmp_path: Path, packed_as: str) -> None:
    """Whatever the scheduler holds of any expert, whole or a part, the bits are the same, and it is not read."""
    stock, packed = packed_model(tmp_path, "BF16", packed_as)
    tokens = some_tokens(60)
    expected = stock_logits(stock, tokens, 1, 1, n_ctx=640)
    engine = engine_with(packed, 0.9, "80%", n_ubatch=1)
    random, masks, held = np.random.default_rng(5), dict[int, int](), dict[int, int]()
    with engine, engine.decoding():
        sizes = engine.native.packed_sizes()

        def forced() -> dict[int, int]:
            """Parts at random, dropped and taken at random, as many as fit."""
            changes = {}
            for unit in random.choice(engine.native.n_units, 4, replace=False).tolist():
                mask = int(random.choice(4, p=(0.1, 0.2, 0.2, 0.5)))
                used = sum(
                    n for u, m in {**masks, unit: mask}.items() for b, n in enumerate(sizes.part_bytes[u]) if m >> b & 1
                )
                if used <= engine.plan.packed_bytes:
                    masks[unit] = changes[unit] = mask
            return changes

        engine.native.part_changes = forced
        llama = engine.llama
        rows = logits_of_context(llama._ctx.ctx, llama._model.model, tokens, 1)
        held, c = engine.native.held_parts(), engine.counters()
    assert np.array_equal(rows, expected)
    assert c.exponent_hits > 5 and c.mantissa_hits > 5 and c.packed_hits > 5
    assert set(held.values()) == {EXPONENTS, MANTISSAS, BOTH}
    assert all(mask & ~masks[unit] == 0 for unit, mask in held.items()), "it holds what it was not told to"


def test_a_new_policy_has_the_places_of_parts_that_never_came(tmp_path: Path) -> None:
    """As after a read ahead that was given up. Without that the next plans had no room, and the reply ended."""
    _, packed = packed_model(tmp_path, "BF16")
    for drops in (True, False):
        engine = engine_with(packed, 0.5, "50%", n_ubatch=1)
        with engine, engine.decoding():
            sizes = engine.native.packed_sizes()
            n_fit = engine.plan.packed_bytes // sizes.largest_bytes
            engine.native.part_changes = lambda n_fit=n_fit: dict.fromkeys(range(n_fit), BOTH)
            engine.llama.eval([1])
            if not drops:
                engine.native.drop_empty_parts = lambda: None  # type: ignore[method-assign]
            engine.set_policy(PolicyOptions())
            held = engine.native.held_parts()
            policy: Any = engine.policy
            assert len(held) < n_fit and policy.packed.used_bytes == sum(sum(sizes.part_bytes[u]) for u in held)
            with nullcontext() if drops else pytest.raises(RuntimeError):
                for token in some_tokens(60):
                    engine.llama.eval([token])
            if not drops:
                assert "exceeds the memory of the packed cache" in str(engine.native.take_error())


def test_the_two_parts_are_all_of_an_expert_and_what_is_saved_is_what_is_held(tmp_path: Path) -> None:
    _, packed = packed_model(tmp_path, "BF16", down_type="Q8_0")
    with engine_with(packed, 0.5, "50%") as engine:
        sizes, block = engine.native.packed_sizes(), 4096
        pieces = open_model(packed).pieces
        for unit, ((exponents, mantissas), saved) in enumerate(zip(sizes.part_bytes, sizes.saved_bytes, strict=True)):
            stored = sum(p.stored_bytes for p in pieces[3 * unit : 3 * unit + 3])
            assert 0 < exponents < mantissas  # a third and two thirds of two BF16 matrices; Q8_0 has no cut
            assert stored <= exponents + mantissas <= stored + 8 * block
            assert saved[0] == 0 and saved[EXPONENTS] <= exponents and saved[MANTISSAS] <= mantissas
            assert stored <= saved[BOTH] < stored + 3 * block


def test_a_damaged_piece_is_a_sentence_with_a_packed_cache_too(tmp_path: Path) -> None:
    _, packed = packed_model(tmp_path, "BF16")
    model = open_model(packed)
    flip_byte(model.files[0], model.pieces[0].offset + 1)
    engine = engine_with(packed, 0.6, "50%")
    with engine:
        with pytest.raises(MoeEdgeError) as error, engine.decoding():
            engine.llama.eval(some_tokens(200))
        assert "is packed with a header of another matrix" in str(error.value) and "of expert 0" in str(error.value)
        assert 0 not in engine.native.held_parts()
        policy: Any = engine.policy
        assert {u: policy.packed.held(u) for u in engine.native.held_parts()} == engine.native.held_parts()


def test_what_cannot_be_is_refused_with_numbers_that_work(tmp_path: Path) -> None:
    stock, packed = packed_model(tmp_path, "BF16")
    with pytest.raises(UsageError, match=r"does not fit: .* it can have .* to .*--packed-cache auto"):
        engine_with(packed, 0.5, "95%")
    with pytest.raises(UsageError, match="there is no room"):
        engine_with(packed, 0.02, "50%")
    with pytest.raises(UsageError, match="needs packed experts; convert the model with --pack planes"):
        engine_with(stock, 0.5, "50%")
    for nonsense in ("half", "120%", "-3"):
        with pytest.raises(UsageError, match="packed-cache"):
            engine_with(packed, 0.5, nonsense)
    assert read_gguf(packed).kv["general.architecture"] == "qwen3moe"


def test_the_window_holds_what_a_step_streams_through(tmp_path: Path) -> None:
    _, packed = packed_model(tmp_path, "BF16")
    with engine_with(packed, 0.5, "60%") as engine:
        assert engine.plan.whole_bytes >= window_bytes(engine.layout)
        assert "of it for packed ones" in engine.lines()[0]


@pytest.mark.parametrize("one_by_one", [True, False], ids=["decode", "prefill"])
def test_a_simulation_counts_what_the_engine_counts(tmp_path: Path, one_by_one: bool) -> None:
    _, packed = packed_model(tmp_path, "BF16")
    tokens = some_tokens(80)
    for share, asked in ((0.2, "40%"), (0.5, "80%")):
        with engine_with(packed, share, asked, n_ubatch=32) as engine:
            trace = record_trace(engine, tokens, one_by_one=one_by_one)
            c, plan = engine.counters(), engine.plan
        assert trace.recorded is not None and plan.packed_bytes > 0
        found = simulate_policy(trace, PolicyOptions(), plan.arena_bytes, packed_bytes=plan.packed_bytes)
        names = ("uses", "hits", "loads", "evictions", "bytes_read", "packed_hits", "exponent_hits", "mantissa_hits")
        assert {n: getattr(found, n) for n in names} == {n: getattr(c, n) for n in names}, (share, asked)
        save_trace(tmp_path / "t.npz", trace)
        assert load_trace(tmp_path / "t.npz").packed_sizes() == trace.packed_sizes() != None  # noqa: E711
    without = simulate_policy(trace, PolicyOptions(), plan.arena_bytes)
    if one_by_one:
        assert found.bytes_read < without.bytes_read and found.packed_hits > 0


@pytest.mark.cgroup
@pytest.mark.skipif(sys.platform != "linux", reason="memory cgroups are Linux's")
def test_the_budget_holds_with_a_packed_cache(tmp_path: Path, cgroup: Cgroup) -> None:  # noqa: F811
    shape = Shape(n_layer=2, n_embd=512, n_ff=512, n_expert=48, n_used=4)
    stock = write_random_model(tmp_path / "s.gguf", "qwen3moe", shape, expert_type="BF16")
    convert(stock, tmp_path / "m.gguf", pack="planes")
    fixed = fixed_bytes(tmp_path / "m.gguf", EngineOptions(n_ctx=640, n_threads=1, proof="nothing", n_ubatch=64))
    ram = fixed + int(0.5 * open_model(tmp_path / "m.gguf").expert_bytes)
    cgroup.limit(ram + ALLOWANCE)
    done = cgroup.run([sys.executable, "-c", IN_CGROUP, str(tmp_path / "m.gguf"), str(ram)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packed_hits"] > 0 < found["evictions"] and found["peak_packed_bytes"] > 0.4 * found["arena"]
    assert found["peak_committed_bytes"] + found["peak_packed_bytes"] <= found["arena"]
    assert cgroup.peak_bytes() <= ram + ALLOWANCE


def test_auto_asks_the_planner_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = packed_model(tmp_path, "BF16")
    monkeypatch.setattr(packed_split, "unpack_bytes_per_second", lambda *_: 4e9)
    speeds = MachineSpeeds(disk=2e7, memory=1e10, compute=1e10, prefill=1e10)
    for kept, words in ((speeds, "planned to decode"), (None, "moe-edge doctor measures them"),
                        (replace(speeds, disk=1e12), "whole experts are as fast")):  # fmt: skip
        monkeypatch.setattr(packed_split, "kept_speeds", lambda *_, kept=kept, **__: kept)
        engine = engine_with(packed, 0.7, "auto", packed_planner=packed_split.auto_split)
        assert any(words in line for line in engine.lines()), engine.lines()
        assert (engine.plan.packed_bytes > 0) == (kept is speeds)
        engine.close()
