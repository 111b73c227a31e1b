"""The model-running half of a calibration: what the experts get to see on a text, and how much each layer matters.

Runs the reference (the source model as it is) under the exact policy. What follows from it is arithmetic on weights:
runner/calibrate/calibrate.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from moe_edge.models.formats.floats import Float64Array
from moe_edge.runner.calibrate.substitution import SAMPLED, Ranking, WatchRanking
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import IntArray, eval_options
from moe_edge.runner.measure.logits import ReferenceLogits, bos_token, cut_chunks, logits_pass, read_text, tokenize_text
from moe_edge.schedulers.layout import Routing
from moe_edge.schedulers.options import PolicyOptions

CHUNK = 512  # tokens
# Noise of 20 % of a layer's output, about what three bits a weight do: at less, flips of the routers' choice make up
# most of the KLD, and it grows slower than its square (docs/LOG.md).
NOISE = 0.2


@dataclass(frozen=True)
class LayerView:
    """What one MoE layer saw, n tokens: inputs float16 [n, n_embd], experts int32 and weights float32 [n, n_used]."""

    inputs: npt.NDArray[np.float16]
    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    def rows_of(self, expert: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(inputs float32 [m, n_embd], gate weights [m]) of the tokens routed to one expert."""
        tokens, slots = np.nonzero(self.experts == expert)
        return self.inputs[tokens].astype(np.float32), self.weights[tokens, slots]


@dataclass(frozen=True)
class Observed:
    """text_sha256, n_tokens: the text as it was used. layers: by position. sensitivity [L]: see Calibration.

    rankings, gating: of each layer, see runner/calibrate/substitution.py; empty for a model whose graph hides them.
    """

    text_sha256: str
    n_tokens: int
    layers: tuple[LayerView, ...]
    sensitivity: Float64Array
    rankings: tuple[Ranking, ...] = ()
    gating: tuple[tuple[int, float], ...] = ()


@contextlib.contextmanager
def observe(
    model: Path,
    text: Path,
    *,
    n_tokens: int,
    sensitivity_tokens: int,
    options: EngineOptions | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Observed]:
    """Run a model over n_tokens spread over a text, in chunks of 512; inside, what it saw is at hand on disk.

    sensitivity_tokens: how many of them to run again for each layer with its output disturbed.
    Raises UsageError for a text shorter than one chunk, MissingFile, and whatever the engine raises.
    """
    data = read_text(text)
    o = eval_options(model, options or EngineOptions(), CHUNK)
    with tempfile.TemporaryDirectory(prefix="moe-edge-calibrate-") as folder, Engine(model, o) as engine:
        tokens = tokenize_text(engine, data)
        chunks = spread_chunks(cut_chunks(tokens, CHUNK, bos=bos_token(engine)), n_tokens)
        rankings = _rankings(engine, chunks.size)
        layers = _watch(engine, chunks, Path(folder), tell)
        gating = tuple(engine.native.gating(layer) for layer in range(len(layers))) if rankings else ()
        engine.set_policy(PolicyOptions())
        few = spread_chunks(chunks, sensitivity_tokens)
        sensitivity = measure_sensitivity(engine, few, NOISE, tell=tell)
        engine.close()
        yield Observed(
            hashlib.sha256(data).hexdigest(), chunks.size, layers, sensitivity,
            rankings.rankings() if rankings else (), gating,
        )  # fmt: skip


def _rankings(engine: Engine, n_tokens: int) -> WatchRanking | None:
    """Exact, with the rankings of a sample of tokens kept; None where the graph does not show them."""
    if engine.native.why_not_selecting():
        return None
    watch = WatchRanking(engine.layout, engine.plan.arena_bytes, max(1, n_tokens // SAMPLED))
    engine._use(watch)
    return watch


def spread_chunks(chunks: IntArray, n_tokens: int) -> IntArray:
    """So many tokens' worth of chunks, evenly spread: a text's kinds all have to be in, since experts specialise.

    On the first 16,384 tokens of a text of several kinds alone, experts of the others got the fewest bits, and the
    KLD on those kinds was four times as large (docs/LOG.md, 2026-11-22).
    """
    n = min(len(chunks), max(1, n_tokens // chunks.shape[1]))
    spread: IntArray = chunks[np.linspace(0, len(chunks) - 1, n).round().astype(np.int64)]
    return spread


def _watch(engine: Engine, chunks: IntArray, folder: Path, tell: Callable[[str], None]) -> tuple[LayerView, ...]:
    """Keep every layer's inputs (in files) and routing."""
    n_layers = engine.layout.n_layers
    files = [open(folder / f"{i}.f16", "w+b") for i in range(n_layers)]
    experts: list[list[npt.NDArray[np.int32]]] = [[] for _ in range(n_layers)]
    weights: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(n_layers)]

    def keep(layer: int, routing: Routing, x: npt.NDArray[np.float32]) -> None:
        np.clip(x, -65504, 65504).astype(np.float16).tofile(files[layer])
        experts[layer].append(routing.experts.copy())
        weights[layer].append(routing.weights.copy())

    engine.native.observe = keep
    try:
        for block in logits_pass(engine, chunks, every_position=True):
            if block.position + len(block.rows) >= CHUNK:
                tell(f"watching: chunk {block.chunk + 1} of {len(chunks)}")
    finally:
        engine.native.observe = None
        for f in files:
            f.close()
    views = []
    for i, layer in enumerate(engine.model.layers):
        inputs = np.memmap(folder / f"{i}.f16", np.float16, "r").reshape(-1, layer.n_embd)
        views.append(LayerView(inputs, np.concatenate(experts[i]), np.concatenate(weights[i])))
    return tuple(views)


def measure_sensitivity(
    engine: Engine, chunks: IntArray, noise: float, *, seed: int = 1, tell: Callable[[str], None] = lambda _: None
) -> Float64Array:
    """[L]: nats of KLD for each unit of squared noise a token's MoE output gets, layer by layer.

    Stands in for the gradients of GEMQ (PAPERS.md, section 5): a layer whose output the loss feels more shows a larger
    KLD for a disturbance of the same size. noise: relative to the root mean square of each token's output.
    """
    result = np.zeros(engine.layout.n_layers)
    with ReferenceLogits() as kept:
        kept.keep(engine, chunks)
        for layer in range(len(result)):
            before = engine.counters()
            engine.native.set_noise(layer, noise, seed)
            try:
                kld = kept.kld(engine, chunks)
            finally:
                energy = engine.native.set_noise(-1, 0.0, seed)
            n = _tokens_of_layer(engine.counters().since(before).tokens, chunks, layer, len(result))
            result[layer] = float(kld.mean()) * n / energy
            tell(f"sensitivity: layer {layer + 1} of {len(result)}: {result[layer]:.3g} nats for each unit of error")
    return result


def _tokens_of_layer(token_layers: int, chunks: IntArray, layer: int, n_layers: int) -> int:
    """Tokens one layer was given: all, but in the last block those alone whose logits were asked for."""
    if layer < n_layers - 1:
        return int(chunks.size)
    return token_layers - (n_layers - 1) * int(chunks.size)
