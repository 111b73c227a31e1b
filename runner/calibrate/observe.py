"""The model-running half of a calibration: what the experts get to see on a text, and how much each layer matters.

Runs the reference (the source model as it is) under the exact policy. What follows from it is arithmetic on weights:
runner/calibrate/calibrate.py.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.write import drop_cache
from moe_edge.runner.calibrate.forecast import timed_twice
from moe_edge.runner.calibrate.journal import Arrays, Journal
from moe_edge.runner.calibrate.substitution import SAMPLED, Ranking, WatchRanking
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import IntArray, eval_options
from moe_edge.runner.measure.logits import (
    ReferenceLogits,
    bos_token,
    cut_chunks,
    kld_of_rows,
    logits_pass,
    tokenize_text,
)
from moe_edge.schedulers.layout import Routing
from moe_edge.schedulers.options import PolicyOptions

CHUNK = 512  # tokens
TIMED_TOKENS = 16
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

    def forget(self) -> None:
        """Give the memory that pages of its file take back, until they are read again."""
        kept = self.inputs.base
        if isinstance(kept, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            kept.madvise(mmap.MADV_DONTNEED)
            with open(cast(np.memmap[Any, Any], self.inputs).filename, "rb") as file:
                drop_cache(file.fileno())


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


TOKEN_LAYERS = 16384  # runs of one token for one layer's weight: at 48 layers a chunk each, at 8 four


@dataclass(frozen=True)
class Timed:
    """What running the model took: seconds of a chunk, of a token by itself, and of comparing a chunk's logits.

    inputs: [CHUNK, n_embd] of its first layer with experts, to time arithmetic with.
    """

    chunk_seconds: float
    token_seconds: float
    compare_seconds: float
    inputs: npt.NDArray[np.float16]


class Listener(Protocol):
    """Is told of the run as it goes on. planned: how much there is, and how much of that is there from an earlier run,
    in runs of a chunk; timed: what those take; step: some are done."""

    def planned(self, n_chunks: int, n_done: int, n_sensitivity: int, n_known: int) -> None: ...
    def timed(self, found: Timed) -> None: ...
    def step(self, stage: str, line: str, units: float) -> None: ...


def sensitivity_tokens(most: int, n_layers: int) -> int:
    """Tokens to find each layer's weight with: fewer of a deep model, which is run once for each layer."""
    return min(most, max(CHUNK, TOKEN_LAYERS // n_layers))


def recall(journal: Journal, widths: Sequence[int], text_sha256: str) -> Observed | None:
    """What an earlier run has seen, when it has seen all. widths: n_embd of each layer with experts."""
    plan = journal.load("chunks")
    if plan is None:
        return None
    n_chunks = int(plan["n_chunks"])
    records = [journal.load(f"chunk-{i:05}") for i in range(n_chunks)]
    weights = [journal.load(f"sensitivity-{i:04}") for i in range(len(widths))]
    found = [each for each in records if each is not None]
    known = [float(each["value"]) for each in weights if each is not None]
    n_bytes = [n_chunks * CHUNK * width * 2 for width in widths]
    sizes = [_size(_inputs_path(journal, i)) for i in range(len(widths))]
    if len(found) < n_chunks or len(known) < len(widths) or any(a < b for a, b in zip(sizes, n_bytes, strict=True)):
        return None
    layers = tuple(
        LayerView(
            np.memmap(_inputs_path(journal, i), np.float16, "r", shape=(n_chunks * CHUNK, width)),
            np.concatenate([each[f"experts_{i}"] for each in found]),
            np.concatenate([each[f"weights_{i}"] for each in found]),
        )
        for i, width in enumerate(widths)
    )
    gating = tuple((int(kind), float(scale)) for kind, scale in found[-1]["gating"])
    return Observed(
        text_sha256, n_chunks * CHUNK, layers, np.array(known), _joined_rankings(found, len(widths)) if gating else (),
        gating,
    )  # fmt: skip


def _joined_rankings(records: Sequence[Arrays], n_layers: int) -> tuple[Ranking, ...]:
    return tuple(
        Ranking(
            int(records[-1][f"ranked_used_{i}"]), np.concatenate([each[f"ranked_rows_{i}"] for each in records]),
            np.concatenate([each[f"ranked_experts_{i}"] for each in records]),
            np.concatenate([each[f"ranked_gates_{i}"] for each in records]),
        )
        for i in range(n_layers)
    )  # fmt: skip


def _inputs_path(journal: Journal, layer: int) -> Path:
    return journal.folder / f"inputs-{layer:04}.f16"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def run_on_text(
    model: Path, data: bytes, journal: Journal, listener: Listener, *, n_tokens: int, n_sensitivity_tokens: int,
    options: EngineOptions | None = None,
) -> None:  # fmt: skip
    """Run a model over n_tokens spread over a text, in chunks of 512, and n_sensitivity_tokens again for each layer
    with its output disturbed. The journal has what it saw (see recall); what is there is not done again.

    Raises UsageError for a text shorter than one chunk, and whatever the engine raises.
    """
    o = eval_options(model, options or EngineOptions(), CHUNK)
    with Engine(model, o) as engine:
        tokens = tokenize_text(engine, data)
        chunks = spread_chunks(cut_chunks(tokens, CHUNK, bos=bos_token(engine)), n_tokens)
        n_layers = engine.layout.n_layers
        few = spread_chunks(chunks, sensitivity_tokens(n_sensitivity_tokens, n_layers))
        journal.save("chunks", {"n_chunks": np.array(len(chunks))})
        known = {i: float(found["value"]) for i in range(n_layers) if (found := journal.load(f"sensitivity-{i:04}"))}
        watch = _Watch(engine, journal, chunks.size)
        listener.planned(len(chunks), watch.n_done, len(few) * (n_layers + 1), len(few) * len(known))
        with contextlib.closing(watch):
            _watch(engine, watch, chunks, listener)
        engine.set_policy(PolicyOptions())
        measure_sensitivity(
            engine, few, NOISE, known=known, listener=listener,
            found=lambda i, value: journal.save(f"sensitivity-{i:04}", {"value": np.array(value)}),
        )  # fmt: skip


def spread_chunks(chunks: IntArray, n_tokens: int) -> IntArray:
    """So many tokens' worth of chunks, evenly spread: a text's kinds all have to be in, since experts specialise.

    On the first 16,384 tokens of a text of several kinds alone, experts of the others got the fewest bits, and the
    KLD on those kinds was four times as large (docs/LOG.md, 2026-11-22).
    """
    n = min(len(chunks), max(1, n_tokens // chunks.shape[1]))
    spread: IntArray = chunks[np.linspace(0, len(chunks) - 1, n).round().astype(np.int64)]
    return spread


class _Watch:
    """Keeps every layer's inputs (in files) and routing, chunk by chunk."""

    def __init__(self, engine: Engine, journal: Journal, n_tokens: int) -> None:
        self._engine, self._journal = engine, journal
        self._widths = [layer.n_embd for layer in engine.model.layers]
        self.n_done = self._whole_chunks()
        self._files = [self._open(i) for i in range(len(self._widths))]
        self._ranking: WatchRanking | None = None
        if not engine.native.why_not_selecting():
            stride = max(1, n_tokens // SAMPLED)
            self._ranking = WatchRanking(engine.layout, engine.plan.arena_bytes, stride, self.n_done * CHUNK)
        self._begin()

    def _whole_chunks(self) -> int:
        """How many from the first on an earlier run has kept."""
        sizes = [_size(_inputs_path(self._journal, i)) for i in range(len(self._widths))]
        most = min(size // (CHUNK * width * 2) for size, width in zip(sizes, self._widths, strict=True))
        return next(n for n in range(most + 1) if n == most or not self._journal.has(f"chunk-{n:05}"))

    def _open(self, layer: int) -> BinaryIO:
        file = open(_inputs_path(self._journal, layer), "r+b" if self.n_done else "w+b")
        file.truncate(self.n_done * CHUNK * self._widths[layer] * 2)
        file.seek(0, os.SEEK_END)
        return file

    def _begin(self) -> None:
        self._experts: list[list[npt.NDArray[np.int32]]] = [[] for _ in self._widths]
        self._weights: list[list[npt.NDArray[np.float32]]] = [[] for _ in self._widths]

    def _keep(self, layer: int, routing: Routing, x: npt.NDArray[np.float32]) -> None:
        np.clip(x, -65504, 65504).astype(np.float16).tofile(self._files[layer])
        self._experts[layer].append(routing.experts.copy())
        self._weights[layer].append(routing.weights.copy())

    def chunk(self, chunks: IntArray) -> None:
        """Run one chunk, [1, CHUNK], and keep it."""
        if self._ranking is not None:
            self._engine._use(self._ranking)
        self._engine.native.observe = self._keep
        try:
            for _ in logits_pass(self._engine, chunks, every_position=True):
                pass
        finally:
            self._engine.native.observe = None
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            drop_cache(file.fileno())
        self._journal.save(f"chunk-{self.n_done:05}", self._record())
        self.n_done += 1
        self._begin()

    def _record(self) -> Arrays:
        found: dict[str, npt.NDArray[Any]] = {}
        for i in range(len(self._widths)):
            found[f"experts_{i}"] = np.concatenate(self._experts[i])
            found[f"weights_{i}"] = np.concatenate(self._weights[i])
        gating: list[tuple[int, float]] = []
        if self._ranking is not None:
            gating = [self._engine.native.gating(layer) for layer in range(len(self._widths))]
            for i, each in enumerate(self._ranking.taken()):
                found |= {
                    f"ranked_used_{i}": np.array(each.n_used), f"ranked_rows_{i}": each.rows,
                    f"ranked_experts_{i}": each.experts, f"ranked_gates_{i}": each.gates,
                }  # fmt: skip
        return {**found, "gating": np.array(gating, np.float64).reshape(len(gating), 2)}

    def inputs(self, chunk: int) -> npt.NDArray[np.float16]:
        """[CHUNK, n_embd]: what the first layer with experts saw of a chunk."""
        n = CHUNK * self._widths[0]
        found = np.fromfile(_inputs_path(self._journal, 0), np.float16, n, offset=chunk * n * 2)
        return found.reshape(CHUNK, -1)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _watch(engine: Engine, watch: _Watch, chunks: IntArray, listener: Listener) -> None:
    """Keep what all chunks show; the second that runs here is timed, when experts are no longer read for the first
    time."""
    first = watch.n_done
    for i in range(first, len(chunks)):
        started = time.monotonic()
        watch.chunk(chunks[i : i + 1])
        seconds = time.monotonic() - started
        listener.step("watching", f"watching: chunk {i + 1} of {len(chunks)}", 1)
        if i == min(first + 1, len(chunks) - 1):
            token, compare = _token_seconds(engine, chunks[i : i + 1])
            listener.timed(Timed(seconds, token, compare, watch.inputs(i)))


def _token_seconds(engine: Engine, chunk: IntArray) -> tuple[float, float]:
    """Of a token decoded by itself, the median of a few; and of comparing the logits of a chunk."""
    engine.set_policy(PolicyOptions())
    seconds: list[float] = []
    rows, started = None, time.monotonic()
    for block in logits_pass(engine, chunk[:, :TIMED_TOKENS], one_by_one=True, every_position=True):
        now = time.monotonic()
        seconds.append(now - started)
        started, rows = now, block.rows
    assert rows is not None
    many = np.repeat(rows, TIMED_TOKENS, axis=0)
    _, compare = timed_twice(lambda: kld_of_rows(many, many))
    return float(np.median(seconds[TIMED_TOKENS // 4 :])), compare * CHUNK / 2 / len(many)


def measure_sensitivity(
    engine: Engine, chunks: IntArray, noise: float, *, seed: int = 1, known: Mapping[int, float] | None = None,
    found: Callable[[int, float], None] = lambda *_: None, listener: Listener | None = None,
) -> Float64Array:  # fmt: skip
    """[L]: nats of KLD for each unit of squared noise a token's MoE output gets, layer by layer.

    Stands in for the gradients of GEMQ (PAPERS.md, section 5): a layer whose output the loss feels more shows a larger
    KLD for a disturbance of the same size. noise: relative to the root mean square of each token's output.
    known: of layers that were measured before. found: is called with each of the others.
    """
    result = np.zeros(engine.layout.n_layers)
    known = known or {}
    for layer, value in known.items():
        result[layer] = value
    if len(known) == len(result):
        return result
    with ReferenceLogits() as kept:
        kept.keep(engine, chunks)
        if listener is not None:
            listener.step("sensitivity", "sensitivity: what to compare with", len(chunks))
        for layer in (each for each in range(len(result)) if each not in known):
            before = engine.counters()
            engine.native.set_noise(layer, noise, seed)
            try:
                kld = kept.kld(engine, chunks)
            finally:
                energy = engine.native.set_noise(-1, 0.0, seed)
            n = _tokens_of_layer(engine.counters().since(before).tokens, chunks, layer, len(result))
            result[layer] = float(kld.mean()) * n / energy
            found(layer, float(result[layer]))
            if listener is not None:
                line = f"layer {layer + 1} of {len(result)}: {result[layer]:.3g} nats for each unit of error"
                listener.step("sensitivity", f"sensitivity: {line}", len(chunks))
    return result


def _tokens_of_layer(token_layers: int, chunks: IntArray, layer: int, n_layers: int) -> int:
    """Tokens one layer was given: all, but in the last block those alone whose logits were asked for."""
    if layer < n_layers - 1:
        return int(chunks.size)
    return token_layers - (n_layers - 1) * int(chunks.size)
