"""A routing trace: which experts every token used, and what is needed to simulate a policy on it without the model.

A value and its checks; runner/measure/record.py records it, and reads and writes the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from moe_edge.schedulers.budget import FixedSizes
from moe_edge.schedulers.layout import Ahead, Layout, Routing, Step
from moe_edge.schedulers.lookahead.around import MOST_TOKENS
from moe_edge.schedulers.packed import PackedSizes

TRACE_VERSION = 1
BLOCK_BYTES = 4096  # of a direct read, native/source.h
NO_EXPERT = -1  # in `experts`: the step did not have this token

Array: TypeAlias = npt.NDArray[Any]
Ints: TypeAlias = npt.NDArray[np.int64]

_BLOCK_VALUES = 1 << 17  # expert uses turned into Python lists at a time: some 15 MiB


@dataclass(frozen=True)
class Recorded:
    """What the engine counted while it recorded, and how it began: a simulation of the same policy must agree.

    policy: the name. resident: units in the arena at the start, in the order that the policy was given them.
    held: (unit, mask) of what was packed in memory then (schedulers/packed.py). The counts are those of
    runner/native.py's Counters: uses leaves skipped ones out, and hits + loads = uses.
    """

    policy: str
    arena_bytes: int
    resident: tuple[int, ...]
    uses: int
    hits: int
    loads: int
    evictions: int
    bytes_read: int
    low_uses: int
    skipped_uses: int
    held: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Trace:
    """T tokens in B micro-batches through L MoE layers, k experts a token. Arrays are not copied; treat them as frozen.

    model: its file name. store_id: of its experts. n_experts: of each MoE layer. unit_bytes [U]: in memory;
    read_bytes [U]: what the reader reads for a unit, which ends where its file ends. Units as in Layout.
    batch_tokens int32 [B]: tokens of each micro-batch; 1 in decode. chunk_starts int32: micro-batches that begin with
    an empty KV cache, ascending, the first is 0.
    step_tokens int32 [B, L]: tokens of each step. Fewer than the micro-batch where llama.cpp leaves tokens out, as it
    does in the last layer for those whose logits nobody wants; 0: the layer did not run.
    experts int16 [T, L, k], weights float16 or float32 [T, L, k]: gate weights. A step's rows are the last ones of its
    micro-batch, the others hold NO_EXPERT and 0.
    attention float32 [T, L]: received by each token (native/attention.h), NaN where it was not watched; or None.
    ahead_experts int16 [T, L, D, K], ahead_scores float16: the K best experts that the input of layer l predicts for
    layer l + 1 + d, best first; NO_EXPERT where there is no such layer or prediction; or None. Of a micro-batch of
    several tokens, few enough to be looked ahead from, the last row has what all of them predict together.
    compute_seconds float32 [B, L]: measured, the experts of the step; other_seconds float32 [B, L]: from there to the
    next step's routing, without waiting for reads; or None.
    part_bytes int64 [U, 2], saved_bytes int64 [U, 3]: what the parts of packed units take in memory, and what need not
    be read with exponents, signs and mantissas, or both there (schedulers/packed.py); None for a store that is raw.
    fixed: what of --ram the experts do not get; recorded: the engine's own counts. None for a trace made by hand.

    Raises ValueError, one sentence, when the parts do not fit together.
    """

    model: str
    store_id: str
    n_experts: tuple[int, ...]
    n_levels: int
    unit_bytes: Ints
    read_bytes: Ints
    batch_tokens: npt.NDArray[np.int32]
    chunk_starts: npt.NDArray[np.int32]
    step_tokens: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int16]
    weights: Array
    attention: npt.NDArray[np.float32] | None = None
    ahead_experts: npt.NDArray[np.int16] | None = None
    ahead_scores: npt.NDArray[np.float16] | None = None
    compute_seconds: npt.NDArray[np.float32] | None = None
    other_seconds: npt.NDArray[np.float32] | None = None
    part_bytes: Ints | None = None
    saved_bytes: Ints | None = None
    fixed: FixedSizes | None = None
    recorded: Recorded | None = None
    version: int = TRACE_VERSION

    def __post_init__(self) -> None:
        _check_layout(self)
        _check_shapes(self)
        _check_parts(self)
        _check_steps(self)

    @property
    def n_tokens(self) -> int:
        return len(self.experts)

    @property
    def n_layers(self) -> int:
        return len(self.n_experts)

    @property
    def n_used(self) -> int:
        """Experts of each token and layer."""
        return int(self.experts.shape[2])

    @property
    def n_steps(self) -> int:
        return int(np.count_nonzero(self.step_tokens))

    @property
    def decode_only(self) -> bool:
        """Whether every micro-batch is one token."""
        return bool((self.batch_tokens == 1).all())

    def layout(self) -> Layout:
        return Layout(self.n_experts, self.n_levels, tuple(self.unit_bytes.tolist()))

    def packed_sizes(self) -> PackedSizes | None:
        """What its units take packed; None when the store is raw."""
        if self.part_bytes is None or self.saved_bytes is None:
            return None
        parts, saved = self.part_bytes.tolist(), self.saved_bytes.tolist()
        return PackedSizes(tuple((a, b) for a, b in parts), tuple((0, a, b, c) for a, b, c in saved))

    def steps(self, *, with_routing: bool = False, with_ahead: bool = False) -> Iterator[tuple[int, Step]]:
        """(micro-batch, step) in order: the values that runner/native.py gives to a policy.

        with_routing: give steps of several tokens their Routing, as for a policy with wants_routing. with_ahead: let
        steps of few tokens ask what the trace has of look-ahead.
        """
        row = -1
        last = None
        for batch, step in self._steps(with_routing):
            if with_ahead and self.ahead_experts is not None:
                if batch != last:
                    row, last = row + int(self.batch_tokens[batch]), batch
                if step.n_tokens <= MOST_TOKENS:
                    step.ask_ahead = partial(self._ahead, row, step.layer)
            yield batch, step

    def _ahead(self, row: int, layer: int, depth: int) -> list[Ahead]:
        assert self.ahead_experts is not None and self.ahead_scores is not None
        ahead = []
        for d in range(min(depth, self.ahead_experts.shape[2], self.n_layers - 1 - layer)):
            experts, scores = self.ahead_experts[row, layer, d].tolist(), self.ahead_scores[row, layer, d].tolist()
            known = [(e, s) for e, s in zip(experts, scores, strict=True) if 0 <= e < self.n_experts[layer + 1 + d]]
            if known:
                ahead.append(Ahead(d + 1, [e for e, _ in known], [s for _, s in known]))
        return ahead

    def _steps(self, with_routing: bool) -> Iterator[tuple[int, Step]]:
        sizes = self.batch_tokens.tolist()
        per_token = self.n_layers * self.n_used
        longest = max(1, _BLOCK_VALUES // per_token)
        batch = row = 0
        while batch < len(sizes):
            end = batch
            while end < len(sizes) and sizes[end] == 1 and end - batch < longest:
                end += 1
            if end > batch:
                yield from self._single_token_steps(batch, end, row)
                row += end - batch
                batch = end
            else:
                yield from self._prefill_steps(batch, row, with_routing)
                row += sizes[batch]
                batch += 1

    def _single_token_steps(self, first: int, end: int, row: int) -> Iterator[tuple[int, Step]]:
        experts = self.experts[row : row + end - first].astype(np.int32)
        order = np.argsort(experts, axis=-1, kind="stable")
        experts = np.take_along_axis(experts, order, -1)
        weights = np.take_along_axis(self.weights[row : row + end - first].astype(np.float32), order, -1)
        squares = (weights * weights).tolist()
        weight_lists = weights.tolist()
        # a graph whose router names an expert twice: the general way counts it, as native/step.cpp does
        twice = (np.diff(experts, axis=-1) == 0).any(-1)
        ran = self.step_tokens[first:end] == 1
        plain = (ran & ~twice).tolist()
        ones = [1] * self.n_used
        for i, of_layers in enumerate(experts.tolist()):
            of_weights, of_squares, is_plain = weight_lists[i], squares[i], plain[i]
            for layer, chosen in enumerate(of_layers):
                if is_plain[layer]:
                    yield first + i, Step(layer, chosen, ones, of_weights[layer], of_squares[layer], 1)
                elif ran[i, layer]:
                    yield first + i, self._step(layer, row + i, row + i + 1)

    def _prefill_steps(self, batch: int, row: int, with_routing: bool) -> Iterator[tuple[int, Step]]:
        end = row + int(self.batch_tokens[batch])
        for layer, n in enumerate(self.step_tokens[batch].tolist()):
            if n > 0:
                step = self._step(layer, end - n, end)
                if with_routing and n > 1:
                    step.routing = self._routing(layer, end - n, end)
                yield batch, step

    def _step(self, layer: int, start: int, end: int) -> Step:
        """The step of these rows; sums in float32 and in token order, as native/step.cpp makes them."""
        flat = self.experts[start:end, layer].ravel().astype(np.int64)
        weights = self.weights[start:end, layer].ravel().astype(np.float32)
        n = self.n_experts[layer]
        counts = np.bincount(flat, minlength=n)
        sums, squares = np.zeros(n, np.float32), np.zeros(n, np.float32)
        np.add.at(sums, flat, weights)
        np.add.at(squares, flat, weights * weights)
        used = np.flatnonzero(counts)
        return Step(
            layer, used.tolist(), counts[used].tolist(), sums[used].tolist(), squares[used].tolist(), end - start
        )

    def _routing(self, layer: int, start: int, end: int) -> Routing:
        attention = None if self.attention is None else self.attention[start:end, layer]
        if attention is not None and np.isnan(attention).any():
            attention = None
        experts = self.experts[start:end, layer].astype(np.int32)
        return Routing(experts, self.weights[start:end, layer].astype(np.float32), attention)


# ---- checks ------------------------------------------------------------------------------------------------


def _need(ok: bool | np.bool_, sentence: str) -> None:
    if not ok:
        raise ValueError(sentence)


def _check_layout(t: Trace) -> None:
    _need(t.version == TRACE_VERSION, f"is a trace of version {t.version}, this moe-edge reads {TRACE_VERSION}")
    _need(min(t.n_experts, default=0) > 0 and t.n_levels > 0, "has a layer without experts, or no layer or level")
    n_units = sum(t.n_experts) * t.n_levels
    for name, values in (("unit_bytes", t.unit_bytes), ("read_bytes", t.read_bytes)):
        _need(values.dtype == np.int64, f"{name} is {values.dtype}, expected int64")
        _need(values.shape == (n_units,), f"{name} has shape {values.shape}, its layers need ({n_units},)")
        _need((values > 0).all(), f"{name} has a unit of {values.min()} bytes")
    _need((t.read_bytes <= t.unit_bytes).all(), "has a unit that reads more bytes than it has room for")


def _check_shapes(t: Trace) -> None:
    _need(t.experts.ndim == 3 and t.experts.size > 0, f"experts has shape {t.experts.shape}, expected (T, L, k)")
    tokens, layers, used = t.experts.shape
    batches = len(t.batch_tokens)
    needed: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "experts": (("int16",), (tokens, t.n_layers, used)),
        "weights": (("float16", "float32"), (tokens, layers, used)),
        "batch_tokens": (("int32",), (batches,)),
        "chunk_starts": (("int32",), (len(t.chunk_starts),)),
        "step_tokens": (("int32",), (batches, layers)),
        "attention": (("float32",), (tokens, layers)),
        "part_bytes": (("int64",), (len(t.unit_bytes), 2)),
        "saved_bytes": (("int64",), (len(t.unit_bytes), 3)),
        "compute_seconds": (("float32",), (batches, layers)),
        "other_seconds": (("float32",), (batches, layers)),
    }
    if t.ahead_experts is not None:
        _need(t.ahead_experts.ndim == 4, f"ahead_experts has shape {t.ahead_experts.shape}, expected (T, L, D, K)")
        ahead = (tokens, layers, *t.ahead_experts.shape[2:])
        needed |= {"ahead_experts": (("int16",), ahead), "ahead_scores": (("float16",), ahead)}
    pairs = (("ahead_experts", "ahead_scores"), ("compute_seconds", "other_seconds"), ("part_bytes", "saved_bytes"))
    for one, other in pairs:
        _need((getattr(t, one) is None) == (getattr(t, other) is None), f"has only one of {one} and {other}")
    for name, (types, shape) in needed.items():
        array = getattr(t, name)
        if array is not None:
            _need(array.dtype.name in types, f"{name} is {array.dtype}, expected {' or '.join(types)}")
            _need(array.shape == shape, f"{name} has shape {array.shape}, expected {shape}")


def _check_parts(t: Trace) -> None:
    if t.part_bytes is None or t.saved_bytes is None:
        return
    _need((t.part_bytes >= 0).all() and (t.saved_bytes >= 0).all(), "has a packed part of fewer than 0 bytes")
    # As the scheduler has them: whole blocks, also where the last of a file is cut short by its end.
    _need((t.saved_bytes < t.read_bytes[:, None] + BLOCK_BYTES).all(), "saves more bytes than it reads")


def _check_steps(t: Trace) -> None:
    sizes, starts = t.batch_tokens, t.chunk_starts
    _need((sizes > 0).all(), "has a micro-batch without tokens")
    total = int(sizes.sum(dtype=np.int64))
    _need(total == t.n_tokens, f"has micro-batches of {total} tokens together but experts of {t.n_tokens}")
    _need(
        len(starts) > 0 and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(sizes),
        f"chunk_starts must ascend from 0 and stay below {len(sizes)}",
    )
    _need((t.step_tokens >= 0).all(), "has a step of fewer than 0 tokens")
    _need((t.step_tokens <= sizes[:, None]).all(), "has a step of more tokens than its micro-batch")
    ends = np.repeat(np.cumsum(sizes), sizes)  # [T], the end of each token's micro-batch
    from_end = ends - np.arange(t.n_tokens)  # 1 for the last token
    present: Any = from_end[:, None] <= np.repeat(t.step_tokens, sizes, axis=0)
    wide = np.array(t.n_experts, np.int64)[None, :, None]
    in_range: Any = ((t.experts >= 0) & (t.experts < wide)).all(-1)
    _need(in_range[present].all(), "names an expert that its layer does not have")
    _need((t.experts[~present] == NO_EXPERT).all(), "names experts for tokens that a step did not have")
    _need(np.isfinite(t.weights).all(), "has a gate weight that is not a finite number")
    for name in ("compute_seconds", "other_seconds"):
        seconds = getattr(t, name)
        if seconds is not None:
            _need((np.isfinite(seconds) & (seconds >= 0)).all(), f"{name} has a value that is not a time")
    if t.ahead_experts is not None:
        _need(
            ((t.ahead_experts >= NO_EXPERT) & (t.ahead_experts < max(t.n_experts))).all(),
            "predicts an expert that no layer has",
        )
