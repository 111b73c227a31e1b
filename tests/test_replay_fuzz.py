"""Random models, budgets, micro-batches, rules, packed caches, look-ahead: a replay counts what the engine counts.

What of it depends on when a read is done is left out: which of the reads ahead are given up, so their bytes, and with
a packed cache what of them is kept packed. Each engine is traced twice, so that the second time begins with a full one.
MOE_EDGE_FUZZ_REPLAYS and MOE_EDGE_FUZZ_SEED: more of them, and others; `make fuzz`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moe_edge.convert.convert import convert
from moe_edge.models.store.store import open_model
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.record import load_trace, record_trace, save_trace
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.lookahead.around import MOST_TOKENS
from moe_edge.schedulers.lookahead.prompt import PROMPT_TOKENS
from moe_edge.schedulers.lookahead.rules import LOOKAHEADS
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import most_packed_bytes
from moe_edge.schedulers.replay.simulate import simulate_policy
from random_models import Shape, write_random_model

N = int(os.environ.get("MOE_EDGE_FUZZ_REPLAYS", "0")) or 24
FIRST = int(os.environ.get("MOE_EDGE_FUZZ_SEED", "0")) * N
SURE = ("uses", "hits", "loads", "evictions", "low_uses", "skipped_uses", "prefetched")
BY_READS = ("bytes_read", "packed_hits", "exponent_hits", "mantissa_hits")
SHAPES = (
    ("qwen3moe", Shape(n_layer=3, n_ff=64, n_expert=48, n_used=4), "BF16", "planes"),
    ("olmoe", Shape(n_layer=4, n_ff=64, n_expert=72, n_used=8), "Q4_0", None),
    ("qwen3moe", Shape(n_layer=3, n_ff=64, n_expert=24, n_used=2), "Q8_0", None),
    ("deepseek2", Shape(n_layer=3, n_ff=64, n_expert=32, n_used=3), "F16", "planes"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for i, (arch, shape, expert_type, pack) in enumerate(SHAPES):
        path = write_random_model(folder / f"{i}.gguf", arch, shape, expert_type=expert_type)
        if pack:
            convert(path, path := folder / f"{i}-packed.gguf", pack=pack, threads=1)
        paths.append(path)
    return paths


def random_case(rng: random.Random, models: list[Path]) -> tuple[Path, EngineOptions, int]:
    """(model, how it is loaded, tokens)."""
    path = rng.choice(models)
    # `auto` goes by the clock, as it decides by how fast reads are
    ahead = rng.choice(["off", "off", *(name for name in LOOKAHEADS if name not in ("off", "auto"))])
    policy = PolicyOptions(rng.choice(["exact", "exact", "exact", "hobbit"]), cache=rng.choice(RULES), lookahead=ahead)
    options = EngineOptions(
        n_ctx=rng.choice([128, 320]), n_threads=1, proof="nothing", policy=policy,
        n_ubatch=rng.choice([1, MOST_TOKENS, 7, 33, PROMPT_TOKENS, 100]),
    )  # fmt: skip
    share = rng.choice([rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.95)])
    model, fixed = open_model(path), sizes_of(path, options)
    ram = fixed.plan.fixed.total_bytes + int(share * model.expert_bytes)
    options = replace(options, ram_bytes=ram)
    most = most_packed_bytes(fixed.layout, int(share * model.expert_bytes) - 65536)
    if path.stem.endswith("packed") and rng.random() < 0.8 and most > 1 << 19:
        options = replace(options, packed_cache=str(rng.randint(1 << 19, most)))
    return path, options, rng.randint(20, 240)


def texts(rng: random.Random, n_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """(tokens, whether one by one) of two texts, one after the other."""
    for _ in range(2):
        yield [rng.randrange(250) for _ in range(n_tokens)], rng.random() < 0.3


@pytest.mark.parametrize("seed", range(FIRST, FIRST + N))
def test_a_replay_counts_what_the_engine_counted(seed: int, models: list[Path], tmp_path: Path) -> None:
    rng = random.Random(seed)
    path, options, n_tokens = random_case(rng, models)
    policy = options.policy
    looks = (3, 8) if policy.lookahead != "off" else None
    with Engine(path, options) as engine:
        for tokens, one_by_one in texts(rng, n_tokens):
            before = engine.counters()
            trace = record_trace(engine, tokens, one_by_one=one_by_one, policy=policy, look_ahead=looks)
            counted, plan = engine.counters().since(before), engine.plan
            save_trace(tmp_path / "t.npz", trace)
            trace = load_trace(tmp_path / "t.npz")
            began = trace.recorded
            assert began is not None
            found = simulate_policy(
                trace, policy, plan.arena_bytes, resident=began.resident, packed_bytes=plan.packed_bytes,
                held=began.held,
            )  # fmt: skip
            names = SURE if counted.prefetched else SURE + BY_READS
            assert {n: getattr(found, n) for n in names} == {n: getattr(counted, n) for n in names}
            if counted.prefetched and not plan.packed_bytes:
                largest = int(np.max(trace.read_bytes))
                assert counted.bytes_read <= (counted.loads + counted.prefetched) * largest
                assert found.bytes_read <= (counted.loads + counted.prefetched) * largest
