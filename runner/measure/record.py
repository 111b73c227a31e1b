"""Routing traces: recorded by feeding a text through the engine, and their file.

The file is a compressed .npz, one array a name, nothing pickled: `version` first, the fields of Trace as they are,
`fixed` and `recorded` as whole numbers in the order of their fields, optional parts left out.
"""

from __future__ import annotations

import errno
import time
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import BadFile, CutFile, DiskFull, EngineError, MissingFile, UsageError
from moe_edge.models.formats.files import stamp_of, unreadable
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.npz import Damaged, open_npz, read_arrays
from moe_edge.models.formats.work import new_file
from moe_edge.models.store.store import ExpertModel
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.measure.logits import bos_token, tokenize_text
from moe_edge.schedulers.budget import FixedSizes
from moe_edge.schedulers.layout import Routing
from moe_edge.schedulers.lookahead.around import MOST_TOKENS
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import BOTH
from moe_edge.schedulers.replay.trace import NO_EXPERT, TRACE_VERSION, Array, Recorded, Trace

Predict = Callable[[int, FloatArray], tuple[Array, Array]]
"""predict(layer, input [n, n_embd]) -> (experts [n, D, K], scores [n, D, K]) that it predicts for the next D layers."""

READ_ALIGN = 4096  # native/source.h

_ARRAYS = ("unit_bytes", "read_bytes", "batch_tokens", "chunk_starts", "step_tokens", "experts", "weights")
_OPTIONAL = (
    "attention", "ahead_experts", "ahead_scores", "compute_seconds", "other_seconds", "part_bytes", "saved_bytes",
)  # fmt: skip
_COUNTS = ("uses", "hits", "loads", "evictions", "bytes_read", "low_uses", "skipped_uses")
_NOT_OF_THE_MODEL = ("held_bytes", "program_varies_bytes")
_FIXED = tuple(field.name for field in fields(FixedSizes) if field.name not in _NOT_OF_THE_MODEL)


# ---- recording ---------------------------------------------------------------------------------------------


def record_trace(
    engine: Engine,
    text: bytes | list[int],
    n_tokens: int | None = None,
    *,
    one_by_one: bool = True,
    policy: PolicyOptions | None = None,
    predict: Predict | None = None,
    look_ahead: tuple[int, int] | None = None,
    attention: bool = False,
) -> Trace:
    """The routing of the first n_tokens of a text (None: all), fed as it is, whatever the model would have said.

    engine: loaded. text: bytes, which are tokenized, or tokens. Chunks are as long as the context; each begins with an
    empty KV cache, and with BOS where the model has one (a text's own is its first; it replaces the first token of the
    others). one_by_one: every token is a micro-batch, as in decode; else micro-batches of engine.n_ubatch.
    policy: runs during the recording, exact by default: others change what later layers see. Afterwards the engine has
    the policy of its options, and an empty KV cache. predict: fills ahead_experts and ahead_scores; look_ahead (depth,
    width): with what the engine's own look-ahead says, in micro-batches of so few tokens that it looks. attention: let
    llama.cpp show it from now on, for micro-batches of 32 tokens and more (NativeModel.watch_attention).
    Raises UsageError for a text shorter than n_tokens, and what Engine.decoding() raises.
    """
    tokens = tokenize_text(engine, text) if isinstance(text, bytes) else list(text)
    wanted = len(tokens) if n_tokens is None else n_tokens
    if not 0 < wanted <= len(tokens):
        raise UsageError(f"the text has {len(tokens)} tokens and {wanted} are to be traced; give a longer text")
    bos = bos_token(engine) if isinstance(text, bytes) else None
    size = 1 if one_by_one else engine.n_ubatch
    try:
        engine.set_policy(policy or PolicyOptions())
        engine.policy.measure_prompts(None)  # a replay has no clock
        if attention:
            engine.native.watch_attention()
        resident, held, before = engine.native.resident_units(), engine.native.held_parts(), engine.counters()
        if look_ahead is not None:
            engine.native.set_lookahead(*look_ahead)
            predict = _routers(engine, *look_ahead)
        recorder = TraceRecorder(engine, wanted, predict)
        engine.native.observe = recorder.observe
        for start in range(0, wanted, engine.n_ctx):
            _forget(engine)
            chunk = tokens[start : min(start + engine.n_ctx, wanted)]
            if bos is not None:
                chunk[0] = bos
            for at in range(0, len(chunk), size):
                piece = chunk[at : at + size]
                recorder.begin(len(piece), starts_chunk=at == 0)
                with engine.decoding():
                    engine.llama.eval(piece)
                recorder.end()
        counters = engine.counters().since(before)
        counts = {name: int(getattr(counters, name)) for name in _COUNTS}
        name, arena_bytes = engine.policy.name, engine.plan.arena_bytes
        return recorder.trace(Recorded(name, arena_bytes, tuple(resident), **counts, held=tuple(held.items())))
    finally:
        engine.native.observe = None
        _forget(engine)
        engine.set_policy(engine.options.policy)


def prediction_width(engine: Engine) -> int:
    """Experts of a layer that look-ahead considers at most: twice top-k, as far as there are so many."""
    return min(2 * engine.model.n_expert_used, min(engine.layout.n_experts))


def _routers(engine: Engine, depth: int, width: int) -> Predict:
    def predict(_layer: int, x: FloatArray) -> tuple[Array, Array]:
        experts = np.full((len(x), depth, width), NO_EXPERT, np.int16)
        scores = np.zeros((len(x), depth, width), np.float16)
        for a in engine.native.ask_ahead(depth) if len(x) <= MOST_TOKENS else ():
            experts[-1, a.distance - 1, : len(a.experts)] = a.experts
            scores[-1, a.distance - 1, : len(a.experts)] = a.scores
        return experts, scores

    return predict


def _forget(engine: Engine) -> None:
    engine.llama.reset()
    engine.llama._ctx.kv_cache_clear()


class TraceRecorder:
    """Collects the steps of an engine, micro-batch by micro-batch: begin(), decode, end(). `observe` is for the
    engine's native.observe."""

    def __init__(self, engine: Engine, n_tokens: int, predict: Predict | None = None) -> None:
        self._engine, self._predict = engine, predict
        self._n_tokens = n_tokens
        n_layers, n_used = engine.layout.n_layers, engine.model.n_expert_used
        self._experts = np.full((n_tokens, n_layers, n_used), NO_EXPERT, np.int16)
        self._weights = np.zeros((n_tokens, n_layers, n_used), np.float32)
        self._attention = np.full((n_tokens, n_layers), np.nan, np.float32)
        self._ahead: tuple[Array, Array] | None = None
        self._batch_tokens: list[int] = []
        self._chunk_starts: list[int] = []
        self._step_tokens: list[list[int]] = []
        self._compute: list[list[float]] = []
        self._other: list[list[float]] = []
        self._row = 0  # first row after the present micro-batch
        self._last: tuple[int, float, Counters] | None = None  # the step in progress: layer, when it began, counts then

    def begin(self, n_tokens: int, *, starts_chunk: bool) -> None:
        """A micro-batch of n_tokens comes next."""
        if self._row + n_tokens > self._n_tokens:
            raise ValueError(f"{self._row + n_tokens} tokens for a trace of {self._n_tokens}")
        if starts_chunk:
            self._chunk_starts.append(len(self._batch_tokens))
        self._batch_tokens.append(n_tokens)
        for table in (self._step_tokens, self._compute, self._other):
            table.append([0] * self._engine.layout.n_layers)
        self._row += n_tokens
        self._last = None

    def observe(self, layer: int, routing: Routing, x: FloatArray) -> None:
        """Keep one step; the arrays are copied."""
        self._finish_step()
        n, n_used = routing.experts.shape
        if self._step_tokens[-1][layer] or n > self._batch_tokens[-1] or n_used != self._experts.shape[2]:
            number = self._engine.model.layers[layer].layer
            raise EngineError(
                f"layer {number} ran with {n} tokens and {n_used} experts each, but a trace takes one step for each "
                f"layer, of at most {self._batch_tokens[-1]} tokens with {self._experts.shape[2]}"
            )
        rows = slice(self._row - n, self._row)
        self._step_tokens[-1][layer] = n
        self._experts[rows, layer] = routing.experts
        self._weights[rows, layer] = routing.weights
        if routing.attention is not None:
            self._attention[rows, layer] = routing.attention
        if self._predict is not None:
            self._keep_ahead(rows, layer, *self._predict(layer, x))
        self._last = layer, time.perf_counter(), self._engine.counters()

    def end(self) -> None:
        """The micro-batch is done."""
        self._finish_step()
        self._last = None

    def trace(self, recorded: Recorded | None = None) -> Trace:
        """The tokens so far."""
        engine, n = self._engine, self._row
        read_bytes, packed = unit_read_bytes(engine.model), engine.native.packed_sizes()
        parts: dict[str, Any] = {}
        if packed.largest_bytes:
            saved = np.array([row[1:] for row in packed.saved_bytes], np.int64)
            parts = {"part_bytes": np.array(packed.part_bytes, np.int64), "saved_bytes": saved}
        watched = not np.isnan(self._attention).all()
        return Trace(
            model=engine.model.skeleton.name,
            store_id=engine.model.store_id,
            n_experts=engine.layout.n_experts,
            n_levels=engine.layout.n_levels,
            unit_bytes=np.array(engine.layout.unit_bytes, np.int64),
            read_bytes=read_bytes,
            batch_tokens=np.array(self._batch_tokens, np.int32),
            chunk_starts=np.array(self._chunk_starts, np.int32),
            step_tokens=np.array(self._step_tokens, np.int32),
            experts=self._experts[:n],
            weights=self._weights[:n],
            attention=self._attention[:n] if watched else None,
            ahead_experts=None if self._ahead is None else self._ahead[0][:n],
            ahead_scores=None if self._ahead is None else self._ahead[1][:n],
            compute_seconds=np.array(self._compute, np.float32),
            other_seconds=np.array(self._other, np.float32),
            fixed=engine.plan.fixed,
            recorded=recorded,
            **parts,
        )

    def _finish_step(self) -> None:
        """Note the times of the step before: from its routing to now, less what waited for reads."""
        if self._last is None:
            return
        layer, began, then = self._last
        seconds = time.perf_counter() - began
        now = self._engine.counters().since(then)
        self._compute[-1][layer] = now.compute_seconds
        self._other[-1][layer] = max(0.0, seconds - now.compute_seconds - now.stall_seconds)

    def _keep_ahead(self, rows: slice, layer: int, experts: Array, scores: Array) -> None:
        if self._ahead is None:
            shape = (*self._experts.shape[:2], *experts.shape[1:])
            self._ahead = np.full(shape, NO_EXPERT, np.int16), np.zeros(shape, np.float16)
        self._ahead[0][rows, layer] = experts
        self._ahead[1][rows, layer] = scores


def unit_read_bytes(model: ExpertModel) -> npt.NDArray[np.int64]:
    """Bytes the reader reads for each unit: whole blocks around its pieces, less what is past the end of the file.

    Source: Model::lay_out of native/model.cpp and DiskSource::read of native/disk_source.cpp.
    """
    ends = [stamp_of(path).nbytes for path in model.files]
    sizes, at = [], 0
    for layer in model.layers:
        n = len(layer.projections)
        for _ in range(layer.n_expert * len(model.levels)):
            total = 0
            for piece in model.pieces[at : at + n]:
                start = piece.offset // READ_ALIGN * READ_ALIGN
                end = -(-(piece.offset + piece.stored_bytes) // READ_ALIGN) * READ_ALIGN
                total += min(end, ends[piece.file]) - start
            sizes.append(total)
            at += n
    return np.array(sizes, np.int64)


# ---- the file ----------------------------------------------------------------------------------------------


def save_trace(path: str | Path, trace: Trace) -> None:
    """Write a trace, under another name until it is complete. Raises DiskFull, and MissingFile for a bad folder."""
    path = Path(path)
    try:
        with new_file(path) as file:
            np.savez_compressed(file, **_to_arrays(trace))  # type: ignore[arg-type]
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{path}: no room left while writing; free some space or choose another folder") from e
        raise MissingFile(f"{path}: cannot be written: {e.strerror or e}") from e


def load_trace(path: str | Path) -> Trace:
    """Read a trace. Raises MissingFile; BadFile for one that is cut, of another version, or whose parts do not fit."""
    path = Path(path)
    with open_npz(path) as file:
        try:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                if file.read(4) == b"PK\x03\x04":
                    raise CutFile(f"{path}: the trace has no table of contents; it looks cut short: record it again")
                raise BadFile(f"{path}: is not a trace; moe-edge trace writes them")
            file.seek(0)
        except OSError as e:
            raise unreadable(path, e) from e
        return _read_npz(file, str(path))


def _read_npz(file: IO[bytes], path: str) -> Trace:
    try:
        arrays = read_arrays(file, lambda names: _known(names, path))
        version = arrays["version"]
        if version.shape != () or version.dtype.kind != "i":
            raise BadFile(f"{path}: its version is not a number")
        if version != TRACE_VERSION:
            raise BadFile(
                f"{path}: is a trace of version {version}, this moe-edge reads {TRACE_VERSION}; record it again"
            )
        return _from_arrays(arrays)
    except Damaged as e:
        if e.ends_early:
            raise CutFile(f"{path}: the trace cannot be read to its end ({e}); it is damaged: record it again") from e
        raise BadFile(f"{path}: the trace does not fit together: {e}; record it again") from e
    except KeyError as e:
        raise BadFile(f"{path}: the trace has no {e}; record it again") from e
    except (ValueError, TypeError, ArithmeticError, MemoryError, IndexError) as e:
        raise BadFile(f"{path}: the trace does not fit together: {e}; record it again") from e


def _known(names: list[str], path: str) -> list[str]:
    known = {"version", "model", "store_id", "n_experts", "n_levels", "fixed", "recorded", "recorded_policy",
             "recorded_resident", "recorded_held", *_ARRAYS, *_OPTIONAL}  # fmt: skip
    if "version" not in names:
        raise BadFile(f"{path}: is not a trace: it names no version")
    for name in names:
        if name not in known:
            raise BadFile(
                f"{path}: has a part '{name[:40]}' that no trace of version {TRACE_VERSION} has; record it again"
            )
    return names


def _to_arrays(trace: Trace) -> dict[str, Array]:
    arrays: dict[str, Array] = {
        "version": np.array(trace.version, np.int32),
        "model": np.array(trace.model),
        "store_id": np.array(trace.store_id),
        "n_experts": np.array(trace.n_experts, np.int32),
        "n_levels": np.array(trace.n_levels, np.int32),
    }
    arrays |= {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {name: getattr(trace, name) for name in _OPTIONAL if getattr(trace, name) is not None}
    if trace.fixed:
        arrays["fixed"] = np.array([getattr(trace.fixed, name) for name in _FIXED], np.int64)
    if trace.recorded:
        r = trace.recorded
        arrays["recorded"] = np.array([r.arena_bytes, *(getattr(r, name) for name in _COUNTS)], np.int64)
        arrays["recorded_policy"] = np.array(r.policy)
        arrays["recorded_resident"] = np.array(r.resident, np.int32)
        if r.held:
            arrays["recorded_held"] = np.array(r.held, np.int32).ravel()
    return arrays


def _from_arrays(arrays: dict[str, Array]) -> Trace:
    """Raises KeyError for a part that is missing, ValueError for one that does not fit."""
    fixed, recorded = arrays.get("fixed"), arrays.get("recorded")
    as_they_are: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
    as_they_are |= {name: arrays.get(name) for name in _OPTIONAL}
    return Trace(
        version=TRACE_VERSION,
        model=_text(arrays, "model"),
        store_id=_text(arrays, "store_id"),
        n_experts=tuple(_integers(arrays, "n_experts")),
        n_levels=_integers(arrays, "n_levels", ())[0],
        fixed=None if fixed is None else _fixed_sizes(arrays),
        recorded=None if recorded is None else _recorded(arrays),
        **as_they_are,
    )


def _fixed_sizes(arrays: dict[str, Array]) -> FixedSizes:
    return FixedSizes(**dict(zip(_FIXED, _integers(arrays, "fixed", (len(_FIXED),)), strict=True)))


def _recorded(arrays: dict[str, Array]) -> Recorded:
    arena_bytes, *counts = _integers(arrays, "recorded", (1 + len(_COUNTS),))
    resident = tuple(_integers(arrays, "recorded_resident"))
    if any(not 0 <= unit < len(arrays["unit_bytes"]) for unit in resident):
        raise ValueError("recorded_resident names a unit that the model does not have")
    held = _integers(arrays, "recorded_held") if "recorded_held" in arrays else []
    pairs = tuple(zip(held[::2], held[1::2], strict=True))
    if any(not (0 <= unit < len(arrays["unit_bytes"]) and 0 < mask <= BOTH) for unit, mask in pairs):
        raise ValueError("recorded_held names a unit that the model does not have, or parts that no unit has")
    policy = _text(arrays, "recorded_policy")
    return Recorded(policy, arena_bytes, resident, **dict(zip(_COUNTS, counts, strict=True)), held=pairs)


def _text(arrays: dict[str, Array], name: str) -> str:
    array = arrays[name]
    if array.dtype.kind != "U" or array.shape != ():
        raise ValueError(f"{name} is not a text")
    return str(array)


def _integers(arrays: dict[str, Array], name: str, shape: tuple[int, ...] | None = None) -> list[int]:
    array = arrays[name]
    if array.dtype.kind != "i" or array.ndim > 1 or (shape is not None and array.shape != shape):
        needed = "one row" if shape is None else f"shape {shape}"
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, expected whole numbers, {needed}")
    return [int(value) for value in array.ravel()]
