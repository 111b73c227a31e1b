"""Low copies in the engine: the numbers are those of the types, budgets and attention as promised."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import BUDGETS, LOW_TYPE, open_engine
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.convert import convert
from moe_edge.convert.quantize import dequantize
from moe_edge.convert.stacked import write_stacked
from moe_edge.models.errors import EngineError
from moe_edge.models.formats.ggml_types import BY_NAME
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.experts import MatrixKey
from moe_edge.models.store.store import open_model
from moe_edge.schedulers.layout import SKIP, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.levels import HIGH, LOW
from random_models import Shape, write_random_model
from test_lossy import ARCHS, force, loaded, logits, some_tokens, stock, stock_values, watch

# ---- levels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_expert_low_has_the_bits_of_a_model_of_the_low_type(
    sources: Callable[[str], Path], stores: Callable[[str], Path], tmp_path: Path, arch: str
) -> None:
    tokens = some_tokens(60)
    low = write_stacked(sources(arch), tmp_path / "low.gguf", LOW_TYPE)
    for budget in ("floor", "resident"):
        with loaded(stores(arch), budget) as engine:
            policy = force(engine, lambda s: [LOW] * len(s.experts))
            for n_batch in (1, 64):
                assert np.array_equal(logits(engine, tokens, n_batch), stock(low, tokens, n_batch))
            c = engine.counters()
            assert c.low_uses == c.uses == policy.stats.low_uses and c.committed_bytes <= engine.plan.arena_bytes


def test_low_and_high_experts_side_by_side_are_those_of_a_model_so_mixed(
    sources: Callable[[str], Path], stores: Callable[[str], Path], tmp_path: Path
) -> None:
    """F32 stock models of both levels' weights: each expert's own level decides, not the rounding of activations."""
    tokens = some_tokens(40)
    lowered = {0: {0, 3, 4}, 1: {1, 2, 7}}
    with loaded(stores("olmoe")) as engine:
        force(engine, lambda s: [LOW if e in lowered[s.layer] else HIGH for e in s.experts])
        ours = logits(engine, tokens)
    chosen = {(layer, e): LOW for layer, experts in lowered.items() for e in experts}
    right = stock(unquantized(stores("olmoe"), tmp_path / "right.gguf", chosen), tokens)
    wrong = stock(unquantized(stores("olmoe"), tmp_path / "wrong.gguf", {}), tokens)
    error, other = np.abs(ours - right).mean(), np.abs(ours - wrong).mean()
    assert error < other / 4


def unquantized(store: Path, to: Path, level_of: dict[tuple[int, int], int], arch: str = "olmoe") -> Path:
    """A stock F32 model with the weights of a store's experts at their levels (default high); its dense part random."""
    write_random_model(to, arch, Shape(n_used=3), expert_type="F32")
    data, tensors, model = bytearray(to.read_bytes()), read_gguf(to).tensors, open_model(store)
    pieces = iter(model.pieces)
    for layer in model.layers:
        for expert in range(layer.n_expert):
            for level in range(len(model.levels)):
                for projection in layer.projections:
                    p = next(pieces)
                    if level != level_of.get((layer.layer, expert), HIGH):
                        continue
                    with open(model.files[p.file], "rb") as f:
                        f.seek(p.offset)
                        rows = dequantize(f.read(p.nbytes), p.type, p.cols).astype(np.float32)
                    entry = tensors[f"blk.{layer.layer}.ffn_{projection}_exps.weight"]
                    at = entry.offset + expert * rows.nbytes
                    data[at : at + rows.nbytes] = rows.tobytes()
    to.write_bytes(data)
    return to


@pytest.mark.parametrize("budget", BUDGETS)
def test_dymoe_at_retention_1_is_exact_to_the_bit(
    sources: Callable[[str], Path], stores: Callable[[str], Path], budget: str
) -> None:
    tokens = some_tokens(60)
    for arch in ("qwen3moe", "gpt-oss"):
        for path in (sources(arch), stores(arch)):
            with loaded(path, budget, policy=PolicyOptions("dymoe", retention=1.0)) as engine:
                assert engine.policy.name == "dymoe"
                for n_batch in (1, 64):
                    assert np.array_equal(logits(engine, tokens, n_batch), stock(sources(arch), tokens, n_batch))
                c = engine.counters()
                assert (c.low_uses, c.skipped_uses) == (0, 0) and (budget == "resident") == (c.evictions == 0)


LOSSY = [
    PolicyOptions("dymoe", retention=0.5),
    PolicyOptions("dymoe", retention=0.5, low_level="skip", renormalise=True),
    PolicyOptions("dymoe", retention=0.3, reuse=False, prefill_importance="attention"),
    PolicyOptions("hobbit", t1=0.3, t2=0.6),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", LOSSY, ids=lambda o: "-".join([o.name, *(str(value) for _, value in o.turned())]))
def test_the_engine_counts_what_the_policy_decided_within_the_memory(
    stores: Callable[[str], Path], budget: str, options: PolicyOptions
) -> None:
    with loaded(stores("deepseek2"), budget, policy=options) as engine:
        for n_batch in (64, 1):
            before, stats = engine.counters(), engine.policy.stats.copy()
            assert np.isfinite(logits(engine, some_tokens(60, n_batch), n_batch)).all()
            c, s = engine.counters().since(before), engine.policy.stats.since(stats)
            assert (c.low_uses, c.skipped_uses) == (s.low_uses, s.skipped_uses)
            assert c.uses + c.skipped_uses == s.uses and s.low_uses + s.skipped_uses > 0
            assert sorted(engine.policy.resident) == engine.native.resident_units()
            units = engine.native.resident_units()
            assert len({u // 2 for u in units}) == len(units), "two levels of one expert"
        assert c.committed_bytes <= c.peak_committed_bytes <= engine.plan.arena_bytes


# ---- experts of different sizes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts' projections each have a random type, with a low level."""
    folder = tmp_path_factory.mktemp("mixed")
    source = write_random_model(folder / "m.gguf", "olmoe", Shape(n_used=3), expert_type="F16")
    rng = np.random.default_rng(5)
    kinds = [BY_NAME[name].id for name in ("Q4_0", "Q5_1", "Q8_0", "F16", "IQ4_NL")]
    homes: dict[MatrixKey, int] = {key: int(rng.choice(kinds)) for key in open_source(source).experts}
    convert(source, folder / "c.gguf", types=ExpertTypes(low="Q4_0", homes=homes), threads=1)
    return folder / "c.gguf"


def test_experts_of_different_types_give_the_same_bits_at_every_budget(mixed: Path, tmp_path: Path) -> None:
    tokens = some_tokens(80)
    found: dict[int, list[np.ndarray]] = {1: [], 64: []}
    for budget in BUDGETS:
        with loaded(mixed, budget) as engine:
            assert len({p.type for p in engine.model.pieces}) == 5 and len(set(engine.layout.unit_bytes[::2])) > 4
            for n_batch, rows in found.items():
                rows.append(logits(engine, tokens, n_batch))
            c = engine.counters()
            assert c.committed_bytes <= c.peak_committed_bytes <= engine.plan.arena_bytes
            assert (budget == "resident") == (c.evictions == 0)
    for rows in found.values():
        assert np.array_equal(rows[0], rows[2]) and np.array_equal(rows[1], rows[2])
    near = stock(unquantized(mixed, tmp_path / "f32.gguf", {}), tokens)
    assert np.abs(found[64][0] - near).mean() < 0.1 * near.std(), "each expert has its own weights"


@dataclass
class Lru:
    """Least recently used by bytes, written anew: hits renewed in order, then misses, each evicting what it must."""

    sizes: Sequence[int]
    room: int
    units: OrderedDict[int, int] = field(default_factory=OrderedDict)
    loads: int = 0
    evictions: int = 0

    def use(self, wanted: Sequence[int]) -> None:
        for u in [u for u in wanted if u in self.units]:
            self.units.move_to_end(u)
        for u in [u for u in wanted if u not in self.units]:
            while sum(self.units.values()) + self.sizes[u] > self.room:
                self.units.popitem(last=False)
                self.evictions += 1
            self.units[u] = self.sizes[u]
            self.loads += 1


@pytest.mark.parametrize("budget", ["floor", "middle"])
def test_experts_of_different_sizes_evict_no_more_than_their_bytes_require(mixed: Path, budget: str) -> None:
    with loaded(mixed, budget, policy=PolicyOptions(cache="lru")) as engine:
        seen = watch(engine)
        for n_batch in (64, 1):
            logits(engine, some_tokens(120, 3), n_batch)
        lru = Lru(engine.layout.unit_bytes, engine.plan.arena_bytes)
        for step in seen.steps:
            first = engine.layout.first_unit[step.layer]
            lru.use([first + 2 * e for e in step.experts])
        c = engine.counters()
        assert (c.loads, c.evictions) == (lru.loads, lru.evictions) and c.evictions > 0
        assert c.loads - c.evictions == len(lru.units) == len(engine.native.resident_units())
        assert c.peak_committed_bytes <= engine.plan.arena_bytes
        if budget == "middle":
            assert c.hits > c.loads, "half of the experts fit: they are used again"


def test_two_levels_under_a_lossy_policy_evict_no_more_than_their_bytes_require(mixed: Path) -> None:
    """The plan replayed on a count of bytes: a unit goes only when the next would not fit, or for its other level."""
    with loaded(mixed, "middle", policy=PolicyOptions("dymoe", retention=0.5)) as engine:
        plan, sizes, room = engine.native.schedule, engine.layout.unit_bytes, engine.plan.arena_bytes
        held: dict[int, int] = {}
        assert plan is not None

        def check(step: Step) -> StepPlan | None:
            made = plan(step)
            if made is None:
                return None
            for i, level, victims in zip(made.order, made.levels, made.victims, strict=True):
                unit = engine.layout.first_unit[step.layer] + 2 * step.experts[i] + level
                if level == SKIP or unit in held:
                    assert not victims
                    continue
                for v in victims:
                    assert v == unit ^ 1 or sum(held.values()) + sizes[unit] > room, "evicted for nothing"
                    del held[v]
                held[unit] = sizes[unit]
                assert sum(held.values()) <= room
            return made

        engine.native.schedule = check
        for n_batch in (64, 1):
            logits(engine, some_tokens(120, 3), n_batch)
        assert sorted(held) == engine.native.resident_units() and engine.counters().evictions > 0


# ---- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_watching_attention_changes_no_bit(sources: Callable[[str], Path], arch: str, flash: bool) -> None:
    tokens = some_tokens(100)
    with loaded(sources(arch), flash_attn=flash) as engine:
        engine.native.watch_attention()
        seen = watch(engine)
        assert np.array_equal(logits(engine, tokens), stock(sources(arch), tokens, flash=flash))
    n_layers = max(seen.layers) + 1
    assert [a is not None for a in seen.attention] == [True] * 2 * n_layers  # 64 tokens, then 36
    for attention, experts in zip(seen.attention, seen.experts, strict=True):
        assert attention is not None and len(attention) == len(experts) and (attention >= 0).all()
        assert (attention > 0).all() or (arch == "gpt-oss" and flash), "none but those outside its sliding window"


def received(p: np.ndarray, first_cell: int, n_queries: int | None = None) -> np.ndarray:
    """Mean over the queries at or behind each token of what they gave it: p is [n_head, n_tokens, n_kv]."""
    n_tokens = p.shape[1]
    first = n_tokens - min(n_queries or n_tokens, n_tokens)
    out = []
    for t in range(n_tokens):
        queries = range(max(t, first), n_tokens)
        out.append(sum(p[:, q, first_cell + t].sum() for q in queries) / len(queries))
    return np.array(out)


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_attention_received_is_that_of_llama_cpps_softmax(sources: Callable[[str], Path], arch: str) -> None:
    """Also in the second micro-batch, whose tokens lie behind the first's in the KV cache."""
    tokens, n = some_tokens(96), 48
    with loaded(sources(arch), n_ubatch=n) as engine:
        engine.native.watch_attention()
        seen = watch(engine)
        logits(engine, tokens, n)
    nodes = stock_values(sources(arch), tokens, ("kq_soft_max",), n)
    assert len(nodes) == len(seen.attention) == 4
    for i, (_, values) in enumerate(nodes):
        assert seen.layers[i] == i % 2
        want = received(values[0].astype(np.float64), 0 if i < 2 else n)
        assert np.allclose(seen.attention[i], want, rtol=1e-4, atol=1e-7)  # type: ignore[arg-type]
        if arch == "qwen3moe" and i < 2:  # nothing precedes: each query shares out 1 in each of 4 heads
            shared = np.asarray(seen.attention[i]) * np.arange(n, 0, -1)
            assert shared.sum() == pytest.approx(4 * n, rel=1e-4)
            assert seen.attention[i][-1] == pytest.approx(values[0, :, -1, n - 1].sum(), rel=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("n", [40, 96])
def test_flash_attention_shows_what_the_last_32_queries_gave(sources: Callable[[str], Path], n: int) -> None:
    tokens = some_tokens(n)
    with loaded(sources("qwen3moe"), n_ubatch=96, flash_attn=True) as engine:
        engine.native.watch_attention()
        seen = watch(engine)
        logits(engine, tokens, 96)
    values = stock_values(sources("qwen3moe"), tokens, ("kq_soft_max-0",), 96)[0][1]
    want = received(values[0].astype(np.float64), 0, 32)
    assert seen.attention[0] is not None and np.allclose(seen.attention[0], want, rtol=1e-2)


def test_few_tokens_are_not_watched_and_a_full_cache_is(sources: Callable[[str], Path]) -> None:
    """A conversation: 40 tokens, 10, 33 behind what is in the cache."""
    with loaded(sources("qwen3moe")) as engine:
        engine.native.watch_attention()
        seen = watch(engine)
        with engine.decoding():
            for n in (40, 10, 33):
                engine.llama.eval(some_tokens(n, n))
    assert [None if a is None else len(a) for a in seen.attention[::2]] == [40, None, 33]
    last = seen.attention[-1]
    assert last is not None and (last > 0).all() and last[-1] < 4


def test_the_attention_policy_gets_what_it_asks_for(sources: Callable[[str], Path]) -> None:
    options = PolicyOptions("dymoe", retention=0.5, low_level="skip", prefill_importance="attention")
    with loaded(sources("qwen3moe"), policy=options) as engine:
        seen = watch(engine)
        logits(engine, some_tokens(64))
        assert all(step.routing is not None and step.routing.attention is not None for step in seen.steps)
        assert engine.policy.stats.skipped_uses > 0


def test_renormalising_is_refused_where_the_weighted_sum_is_not_the_engines(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "gpt-oss.gguf", "gpt-oss")
    policy = PolicyOptions("dymoe", retention=0.5, low_level="skip", renormalise=True)
    with open_engine(path, "resident", n_ctx=128, n_ubatch=32, n_threads=1, policy=policy) as engine:
        with pytest.raises(EngineError, match="cannot be renormalised"), engine.decoding():
            engine.llama.eval([1, 2, 3])
        engine.set_policy(PolicyOptions("dymoe", retention=0.5, low_level="skip"))
        with engine.decoding():
            engine.llama.eval([1, 2, 3])
        assert engine.counters().skipped_uses > 0
