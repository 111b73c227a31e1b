"""What lossy scheduling does to the numbers: levels, skips, gate weights, attention, each against another way to it."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.convert import convert
from moe_edge.convert.quantize import dequantize
from moe_edge.convert.source import open_source
from moe_edge.convert.stacked import write_stacked
from moe_edge.models.errors import EngineError
from moe_edge.models.formats.ggml_types import BY_NAME
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.experts import MatrixKey
from moe_edge.models.store.store import open_model
from moe_edge.runner.engine import Engine
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.levels import HIGH, LOW, LevelPolicy
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits, stock_model

ARCHS = ("olmoe", "qwen3moe", "deepseek2", "gpt-oss")  # plain, normalised, sigmoid with a bias and a scale, down bias
HIGH_TYPE, LOW_TYPE = "Q8_0", "Q4_0"
N_CTX = 256
Wish = Callable[[Step], list[int]]


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 255, n)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """sources(architecture) -> a random stock GGUF with experts of HIGH_TYPE, 3 used of 8."""
    folder = tmp_path_factory.mktemp("sources")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            write_random_model(path, arch, Shape(n_used=3), expert_type=HIGH_TYPE)
        return path

    return make


@pytest.fixture(scope="module")
def stores(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """stores(architecture) -> that model with two levels."""
    folder = tmp_path_factory.mktemp("stores")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            convert(sources(arch), path, low_type=LOW_TYPE, threads=1)
        return path

    return make


def loaded(path: Path, budget: str = "resident", n_ubatch: int = 64, **options: object) -> Engine:
    return open_engine(path, budget, n_ctx=N_CTX, n_ubatch=n_ubatch, n_threads=1, logits_all=True, **options)


def logits(engine: Engine, tokens: Sequence[int], n_batch: int = 64) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, n_batch)


def stock(path: Path, tokens: Sequence[int], n_batch: int = 64, flash: bool = False) -> np.ndarray:
    return stock_logits(path, tokens, n_batch, 1, n_ctx=N_CTX, flash_attention=flash)


class Forced(LevelPolicy):
    """Every step's levels as `wish` says."""

    name = "forced"
    wants_routing = wants_attention = False

    def __init__(self, layout: Layout, arena_bytes: int, wish: Wish) -> None:
        super().__init__(layout, arena_bytes, reuse=False)
        self.wish = wish

    def plan(self, step: Step) -> StepPlan | None:
        return self.serve(step, self.wish(step))


def force(engine: Engine, wish: Wish) -> Forced:
    policy = Forced(engine.layout, engine.plan.arena_bytes, wish)
    engine._use(policy)
    return policy


# ---- another way to what llama.cpp's graph holds -----------------------------------------------------------


class GgmlTensor(ctypes.Structure):
    """ggml.h, struct ggml_tensor of ggml 0.25."""

    _fields_ = [
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]  # fmt: skip

    def values(self) -> np.ndarray:
        """A copy, in numpy's order of dimensions."""
        kind = {0: np.float32, 26: np.int32}[self.type]
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(kind).itemsize
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.data))
        return np.ndarray(shape, kind, raw, 0, strides).copy()


Seen = list[tuple[str, np.ndarray]]


def stock_values(path: Path, tokens: Sequence[int], prefixes: tuple[str, ...], n_batch: int) -> Seen:
    """(name, values) of the nodes whose names begin with one of `prefixes`, in the order stock llama.cpp makes them."""
    seen: Seen = []

    @llama_cpp.ggml_backend_sched_eval_callback
    def look(address: int, ask: bool, _user: object) -> bool:
        tensor = GgmlTensor.from_address(address)
        wanted = tensor.name.decode().startswith(prefixes)
        if wanted and not ask:
            seen.append((tensor.name.decode(), tensor.values()))
        return wanted or not ask

    with stock_model(path) as model:
        p = llama_cpp.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = N_CTX, n_batch, n_batch, 1, 1
        p.flash_attn_type, p.cb_eval = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, look
        context = llama_cpp.llama_init_from_model(model, p)
        logits_of_context(context, model, tokens, n_batch)
        llama_cpp.llama_free(context)
    return seen


@dataclass
class Watched:
    """Copies of what the engine hands out, a step an item."""

    layers: list[int] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    inputs: list[np.ndarray] = field(default_factory=list)
    attention: list[np.ndarray | None] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def watch(engine: Engine) -> Watched:
    seen, plan = Watched(), engine.native.schedule
    assert plan is not None

    def note(layer: int, routing: object, x: np.ndarray) -> None:
        experts, weights, attention = routing  # type: ignore[misc]
        seen.layers.append(layer)
        seen.experts.append(experts.copy())
        seen.weights.append(weights.copy())
        seen.inputs.append(x.copy())
        seen.attention.append(None if attention is None else attention.copy())

    def keep(step: Step) -> StepPlan | None:
        seen.steps.append(step)
        return plan(step)

    engine.native.observe, engine.native.schedule = note, keep
    return seen


# ---- gate weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_the_gate_weights_are_those_of_llama_cpps_graph(sources: Callable[[str], Path], arch: str) -> None:
    tokens = some_tokens(40)
    with loaded(sources(arch), n_ubatch=32) as engine:
        seen = watch(engine)
        logits(engine, tokens, 32)  # 32, then 8
        numbers = [layer.layer for layer in engine.model.layers]
    nodes = stock_values(sources(arch), tokens, ("ffn_moe_weights", "ffn_moe_topk"), 32)
    at = 0
    for batch in (32, 8):
        for _ in numbers:
            name = f"-{numbers[seen.layers[at]]}"
            shown = [(n, v) for n, v in nodes if n.split(" ")[0].endswith(name)]
            topk = [v for n, v in shown if n.startswith("ffn_moe_topk") and v.size == batch * 3][-1]
            final = [v for n, v in shown if n.startswith("ffn_moe_weights") and v.size == batch * 3][-1]
            assert np.array_equal(seen.experts[at], topk.reshape(batch, 3))
            assert np.array_equal(seen.weights[at], final.reshape(batch, 3))
            at += 1
    assert at == len(seen.layers)


@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe"])
def test_the_gate_weights_are_the_softmax_of_the_router(sources: Callable[[str], Path], arch: str) -> None:
    router = read_gguf(sources(arch)).tensors["blk.1.ffn_gate_inp.weight"]
    raw = sources(arch).read_bytes()[router.offset : router.offset + router.nbytes]
    matrix = np.frombuffer(raw, np.float32).reshape(8, 256)
    with loaded(sources(arch)) as engine:
        seen = watch(engine)
        logits(engine, some_tokens(20))
    at = seen.layers.index(1)
    scores = seen.inputs[at].astype(np.float64) @ matrix.T
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    best = np.argsort(-p, axis=1)[:, :3]
    g = np.take_along_axis(p, best, 1)
    if arch == "qwen3moe":
        g /= g.sum(1, keepdims=True)
        assert seen.weights[at].sum(1) == pytest.approx(np.ones(20), abs=1e-6)
    assert np.array_equal(best, seen.experts[at])
    assert np.allclose(g, seen.weights[at], rtol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 30])
@pytest.mark.parametrize("arch", ["deepseek2", "gpt-oss"])
def test_a_step_carries_counts_sums_and_squares_of_its_experts(
    sources: Callable[[str], Path], arch: str, n_tokens: int
) -> None:
    with loaded(sources(arch)) as engine:
        seen = watch(engine)
        logits(engine, some_tokens(n_tokens))
    for step, experts, weights in zip(seen.steps, seen.experts, seen.weights, strict=True):
        of = [weights[experts == e].astype(np.float64) for e in step.experts]
        assert list(step.experts) == sorted(set(experts.ravel().tolist()))
        assert list(step.counts) == [len(g) for g in of]
        assert np.allclose(step.weights, [g.sum() for g in of], rtol=1e-5)
        assert np.allclose(step.squares, [np.square(g).sum() for g in of], rtol=1e-5)


# ---- skips -------------------------------------------------------------------------------------------------


def without_experts(source: Path, to: Path, gone: Sequence[tuple[int, int]]) -> Path:
    """The stock model with the down projections of some (layer, expert) all zero."""
    data, tensors = bytearray(source.read_bytes()), read_gguf(source).tensors
    for layer, expert in gone:
        entry = tensors[f"blk.{layer}.ffn_down_exps.weight"]
        size = entry.nbytes // entry.shape[2]
        at = entry.offset + expert * size
        data[at : at + size] = bytes(size)
    to.write_bytes(data)
    return to


@pytest.mark.parametrize("n_batch", [1, 64])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_skipped_expert_gives_the_output_without_it(
    sources: Callable[[str], Path], stores: Callable[[str], Path], tmp_path: Path, arch: str, n_batch: int
) -> None:
    """Of gpt-oss a skip takes the product away and leaves the bias behind it, as zero weights do."""
    tokens, skipped = some_tokens(50), {(0, 2), (0, 5), (1, 1)}
    for path in (sources(arch), stores(arch)):
        with loaded(path) as engine:
            policy = force(engine, lambda s: [SKIP if (s.layer, e) in skipped else HIGH for e in s.experts])
            ours = logits(engine, tokens, n_batch)
            numbers = [layer.layer for layer in engine.model.layers]
            assert engine.counters().skipped_uses == policy.stats.skipped_uses > 0
        gone = [(numbers[layer], e) for layer, e in skipped if layer < len(numbers)]
        theirs = stock(without_experts(sources(arch), tmp_path / "m.gguf", gone), tokens, n_batch)
        assert np.array_equal(ours, theirs)


def with_top_k(source: Path, to: Path, arch: str, n_used: int) -> Path:
    """The stock model with another number of experts used for each token."""
    data, key = bytearray(source.read_bytes()), f"{arch}.expert_used_count".encode()
    at = data.index(key) + len(key)
    assert data[at : at + 8] == b"\x04\0\0\0\x03\0\0\0"  # u32 3
    data[at + 4] = n_used
    to.write_bytes(data)
    return to


def keep_heaviest(n: int) -> Wish:
    def wish(step: Step) -> list[int]:
        rank = np.argsort(np.argsort(-np.array(step.weights), kind="stable"))
        return [HIGH if r < n else SKIP for r in rank]

    return wish


@pytest.mark.parametrize("n_kept", [1, 2])
def test_skipping_the_lightest_experts_is_a_smaller_top_k(
    sources: Callable[[str], Path], tmp_path: Path, n_kept: int
) -> None:
    """Bit for bit, as olmoe's gate weights do not depend on k."""
    tokens = some_tokens(20)
    with loaded(sources("olmoe")) as engine:
        force(engine, keep_heaviest(n_kept))
        ours = logits(engine, tokens, 1)
    assert np.array_equal(ours, stock(with_top_k(sources("olmoe"), tmp_path / "m.gguf", "olmoe", n_kept), tokens, 1))


@pytest.mark.parametrize("n_kept", [1, 2])
def test_renormalised_skips_are_a_smaller_top_k_of_a_normalising_model(tmp_path: Path, n_kept: int) -> None:
    tokens, shape = some_tokens(20), Shape(n_used=3)
    path = write_random_model(tmp_path / "whole.gguf", "qwen3moe", shape, expert_type="F32", dense_type="F32")
    with loaded(path) as engine:
        force(engine, keep_heaviest(n_kept))
        plain = logits(engine, tokens, 1)
        engine.native.set_renormalise(True)
        ours = logits(engine, tokens, 1)
    theirs = stock(with_top_k(path, tmp_path / "m.gguf", "qwen3moe", n_kept), tokens, 1)
    size = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 1e-5 * size
    assert np.abs(plain - theirs).max() > 1e-2 * size


@pytest.mark.parametrize("arch", ["olmoe", "deepseek2"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_what_is_skipped_in_prefill_is_taken_over_token_by_token(tmp_path: Path, arch: str, renormalise: bool) -> None:
    """The layer's output computed by numpy from what stock llama.cpp's experts gave, then norm and logits."""
    n_layer = 2 if arch == "deepseek2" else 1  # its first is dense
    shape = Shape(n_layer=n_layer, n_used=3)
    path = write_random_model(tmp_path / "m.gguf", arch, shape, expert_type="F32", dense_type="F32")
    tokens, skipped, last = some_tokens(40), {1, 4, 6}, n_layer - 1
    with loaded(path) as engine:
        force(engine, lambda s: [SKIP if e in skipped else HIGH for e in s.experts])
        engine.native.set_renormalise(renormalise)
        seen = watch(engine)
        ours = logits(engine, tokens)
    prefixes = ("ffn_moe_down", "ffn_inp", "ffn_shexp", "result_output")
    nodes = dict(stock_values(path, tokens, tuple(f"{p}-{last}" for p in prefixes[:3]) + prefixes[3:], 64))
    experts, g = seen.experts[0], seen.weights[0].astype(np.float64)
    gone = np.isin(experts, list(skipped))
    kept = np.where(gone, 0, g)
    if renormalise:
        sums = kept.sum(1, keepdims=True)
        kept *= np.where(sums > 0, g.sum(1, keepdims=True) / np.where(sums > 0, sums, 1), 0)
    assert gone.any() and not gone.all()

    def after(weights: np.ndarray) -> np.ndarray:
        y = nodes[f"ffn_inp-{last}"].reshape(40, 256).astype(np.float64)
        y = y + np.einsum("tj,tjn->tn", weights, nodes[f"ffn_moe_down-{last}"].reshape(40, 3, 256))
        y += nodes[f"ffn_shexp-{last}"].reshape(40, 256) if arch == "deepseek2" else 0
        y /= np.sqrt(np.square(y).mean(1, keepdims=True) + 1e-6)
        return y * matrix(path, "output_norm.weight") @ matrix(path, "output.weight").T

    theirs = nodes["result_output"].reshape(40, -1)
    size = np.abs(theirs).max()
    assert np.abs(after(g) - theirs).max() < 1e-4 * size, "this arithmetic is llama.cpp's"
    assert np.abs(after(kept) - ours).max() < 1e-4 * size
    assert np.abs(theirs - ours).max() > 1e-2 * size


def matrix(path: Path, name: str) -> np.ndarray:
    """An F32 tensor."""
    entry = read_gguf(path).tensors[name]
    raw = path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    return np.frombuffer(raw, np.float32).reshape(entry.shape[::-1])


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
        assert np.allclose(seen.attention[i], want, rtol=1e-4, atol=1e-7)
        if arch == "qwen3moe" and i < 2:  # nothing precedes: each query shares out 1 in each of 4 heads
            shared = np.asarray(seen.attention[i]) * np.arange(n, 0, -1)
            assert shared.sum() == pytest.approx(4 * n, rel=1e-4)
            assert seen.attention[i][-1] == pytest.approx(values[0, :, -1, n - 1].sum(), rel=1e-4)


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
