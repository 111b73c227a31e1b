"""What lossy scheduling does to the numbers: levels, skips, gate weights, attention, each against another way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.runner.engine import Engine
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.policies.levels import HIGH, LevelPolicy
from random_models import Shape, write_random_model
from reference import GgmlTensor, logits_of_context, logits_with_look, stock_logits

ARCHS = ("olmoe", "qwen3moe", "deepseek2", "gpt-oss")  # plain, normalised, sigmoid with a bias and a scale, down bias
N_CTX = 256
Wish = Callable[[Step], list[int]]


def some_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 255, n)]


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


Seen = list[tuple[str, np.ndarray]]


def stock_values(path: Path, tokens: Sequence[int], prefixes: tuple[str, ...], n_batch: int) -> Seen:
    """(name, values) of the nodes whose names begin with one of `prefixes`, in the order stock llama.cpp makes them."""
    seen: Seen = []

    def note(tensor: GgmlTensor) -> None:
        seen.append((tensor.name.decode(), tensor.values()))

    logits_with_look(path, tokens, n_batch, prefixes, note, n_ctx=N_CTX)
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
        seen.experts.append(experts.copy())  # type: ignore[has-type]
        seen.weights.append(weights.copy())  # type: ignore[has-type]
        seen.inputs.append(x.copy())
        seen.attention.append(None if attention is None else attention.copy())  # type: ignore[has-type]

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
        return y * matrix(path, "output_norm.weight") @ matrix(path, "output.weight").T  # type: ignore[no-any-return]

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
