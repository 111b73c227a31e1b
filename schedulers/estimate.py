"""The cost model behind `moe-edge plan`: hit rate, bytes and seconds of a token, from sizes and the machine's speeds.

Pure: no I/O, no clock. All that was measured rather than derived is a named constant here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from moe_edge.models.formats.floats import Float64Array
from moe_edge.schedulers.budget import arena_working_set_bytes
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.touched import Touched

# (share of the experts in memory, hit rate) of two trained models, batch 1. A line is drawn between the points.
# Flat: tiny-moe, 32 experts, 4 of them used, the default rule, simulated (LRU: 0.26, 0.42, 0.60, 0.80; LOG 2026-11-22).
# Skewed: Qwen3-30B-A3B, 128 experts, 8 used, LRU (PAPERS.md, section 8).
FLAT_HITS = ((0.0, 0.0), (0.13, 0.30), (0.25, 0.50), (0.40, 0.67), (0.60, 0.83), (1.0, 1.0))
SKEWED_HITS = ((0.0, 0.0), (0.125, 0.61), (0.25, 0.81), (0.375, 0.91), (1.0, 1.0))
# Trained on little text, tiny-moe routes flatter than models of its shape do, so its curve stands for 4 of 16.
FLAT_USED_SHARE, SKEWED_USED_SHARE = 4 / 16, 8 / 128

# Misses of real routing over misses of independent draws with the same frequencies. Below 1: neighbouring tokens use
# the same experts. tiny-moe under LRU, 600 sampled tokens: 0.79, 0.83, 0.73, 0.67, 0.46 at 25, 40, 50, 60, 75 % of the
# experts; the default rule misses 0.82, 0.78 and 0.76 times as often as LRU at 25, 40 and 60 % (2026-11-22). To be
# measured on traces of larger models; the band is around it.
LOCALITY = 0.65
LOCALITY_BAND = 0.25  # of the misses, to either side

# Of the time that reading and computing could at most pass together, the share that they do. A layer's misses are known
# only at the layer, so decode hides only what is computed of the same layer: measured 0.2 to 0.7 (LOG 2026-11-22).
# Slow, expected, fast.
DECODE_OVERLAP = (0.25, 0.5, 0.9)
PREFILL_OVERLAP = (0.25, 0.7, 1.0)
STREAMED_SHARE = 0.9  # of the arena's share of a layer, what a prompt's next micro-batch finds of it
DISK_BAND = (0.8, 1.0, 1.1)  # of the probed speed
COMPUTE_BAND = (0.8, 1.0, 1.1)

LAYER_SECONDS = 100e-6  # attention, router, graph split and scheduler of one layer, where it was not measured
TILED_ROWS = 8  # tokens an expert needs before ggml's faster products take it (LOG 2026-11-22)
MEMORY_BOUND_SHARE = 0.75  # products this close to the memory's speed wait for memory, not for arithmetic
# Of a prompt's products, what norms, activations, soft-max and copies take besides (docs/LOG.md, 2026-11-27).
AROUND_PRODUCTS = 1.1
ENOUGH = 1.05  # within 5 % of the speed with everything resident


@dataclass(frozen=True)
class MachineSpeeds:
    """What the estimate takes from the machine; the rates in bytes a second.

    disk: direct reads of an expert's size. memory: reading memory, all threads. compute: weights multiplied by one
    token, from memory. prefill: weights times tokens, many tokens at once. layer_seconds: what a layer of one token
    takes besides its products. unpack: what comes out of packed experts, all threads that read together.
    expert_rows, dense_rows: (tokens at once, weights times tokens a second), ascending, in the types of the model's
    experts and of its dense weights; empty where they were not measured, which takes `prefill` and `compute` instead.
    attention: bytes of KV cache times query rows, many at once; 0: as dense weights.
    """

    disk: float
    memory: float
    compute: float
    prefill: float
    layer_seconds: float = LAYER_SECONDS
    unpack: float = float("inf")
    expert_rows: tuple[tuple[int, float], ...] = ()
    dense_rows: tuple[tuple[int, float], ...] = ()
    attention: float = 0.0


@dataclass(frozen=True)
class ModelWork:
    """What a token needs. dense_bytes: weights every token uses. kv_bytes: cache read by a token after the prompt.

    counts: [L, E], tokens routed to each expert in a calibration; None without one. stored_share: what the experts take
    in their file over what they take in memory; below 1 where they are packed. head_bytes: of dense_bytes, the output
    matrix, which a prompt needs for its last token only. touched: what earlier prompts, or a trace, used; or None.
    kv_positions: tokens in the cache that kv_bytes are of. query_share: query heads of a KV head.
    """

    layout: Layout
    top_k: int
    dense_bytes: int
    kv_bytes: int = 0
    counts: npt.NDArray[np.int64] | None = None
    stored_share: float = 1.0
    head_bytes: int = 0
    touched: Touched | None = None
    kv_positions: int = 512
    query_share: float = 1.0

    def delivery(self, speeds: MachineSpeeds, disk_share: float = 1.0) -> float:
        """Bytes of experts, as they are in memory, that a disk of disk_share times its speed brings in a second."""
        if self.stored_share >= 1:  # raw: nothing is unpacked
            return disk_share * speeds.disk
        return min(disk_share * speeds.disk / self.stored_share, speeds.unpack)

    @property
    def used_bytes(self) -> float:
        """Bytes one token multiplies or reads in memory."""
        return self.dense_bytes + self.kv_bytes + float(self.probabilities() @ self.expert_bytes())

    def expert_bytes(self) -> Float64Array:
        """[n]: bytes of each expert at the highest level, layer by layer."""
        return np.array(self.layout.unit_bytes[:: self.layout.n_levels], np.float64)

    def probabilities(self) -> Float64Array:
        """[n]: how likely a token uses each expert; they sum to top_k in each layer. Uniform without counts."""
        layers = []
        for layer, n in enumerate(self.layout.n_experts):
            row = None if self.counts is None else np.asarray(self.counts[layer, :n], np.float64)
            if row is None or row.sum() == 0:
                row = np.ones(n)
            layers.append(np.minimum(1.0, row * (min(self.top_k, n) / row.sum())))
        return np.concatenate(layers)


@dataclass(frozen=True)
class Band:
    """A quantity with its bounds; low <= expected <= high."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What to expect of one arena size. read_bytes: from disk for each token. binds: see binding_resource."""

    arena_bytes: int
    resident: bool
    hit_rate: Band
    hit_source: str
    read_bytes: Band
    used_bytes: float
    tokens_per_second: Band
    ttft_seconds: Band
    binds: str
    compute_seconds: float
    read_seconds: float


HitRate = float | Callable[[int], float]


# ---- hits --------------------------------------------------------------------------------------------------


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The line through the points, at x; the ends beyond them."""
    xs = [p[0] for p in points]
    i = bisect_right(xs, x)
    if i in (0, len(points)):
        return points[min(i, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def typical_hit_rate(share: float, used_share: float) -> Band:
    """Hits of a model nobody has calibrated, with this share of its experts in memory.

    used_share: top_k / n_expert. The band is between flat and skewed routing. Expected: between the two measured
    models by used_share, since finer experts are used less evenly: it gives 76 % for gpt-oss-20b with 31 % cached,
    where tinyserve measured 77 to 96 % (PAPERS.md, section 8).
    """
    flat, skewed = interpolate(FLAT_HITS, share), interpolate(SKEWED_HITS, share)
    skew = (FLAT_USED_SHARE - used_share) / (FLAT_USED_SHARE - SKEWED_USED_SHARE)
    return Band(flat, flat + (skewed - flat) * min(1.0, max(0.0, skew)), skewed)


def characteristic_time(probabilities: Float64Array, nbytes: Float64Array, arena_bytes: float) -> float:
    """Tokens an unused expert stays in an LRU cache of arena_bytes; infinite when all that are ever used fit.

    probabilities, nbytes: [n]. Solves sum((1 - exp(-p T)) bytes) = arena.
    Source: Che, Tung and Wang, Hierarchical Web Caching Systems, 2002, section IV, with sizes in bytes.
    """
    used = probabilities > 0
    p, b = probabilities[used], nbytes[used]
    if arena_bytes >= b.sum():
        return float("inf")
    low, high = 0.0, 1.0
    while float(-np.expm1(-p * high) @ b) < arena_bytes:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if float(-np.expm1(-p * middle) @ b) < arena_bytes:
            low = middle
        else:
            high = middle
    return low


def che_hit_rate(probabilities: Float64Array, nbytes: Float64Array, arena_bytes: float) -> float:
    """Share of expert uses that an LRU cache of arena_bytes holds, for independent draws (see characteristic_time)."""
    tokens = characteristic_time(probabilities, nbytes, arena_bytes)
    if tokens == float("inf"):
        return 1.0
    return float(probabilities @ -np.expm1(-probabilities * tokens) / probabilities.sum())


def expert_hit_rate(work: ModelWork, arena_bytes: int, given: HitRate | None = None) -> tuple[Band, str]:
    """(hit rate, where it comes from). given: a rate, or a function of the arena's bytes, that was simulated.

    Below one token's working set LRU evicts every expert before the next token comes back to its layer, so 0 is the low
    end there; the default rule keeps what is used most, and hits as the curves say (tiny-moe: 30 % at 13 % of its
    experts, docs/LOG.md, 2026-11-22).
    """
    if arena_bytes >= work.layout.total_bytes:
        return Band(1.0, 1.0, 1.0), "resident"
    if given is not None:
        hits = float(given(arena_bytes) if callable(given) else given)
        return Band(hits, hits, hits), "trace"
    if work.counts is not None:
        misses = LOCALITY * (1 - che_hit_rate(work.probabilities(), work.expert_bytes(), arena_bytes))
        low, high = 1 - min(1.0, misses * (1 + LOCALITY_BAND)), 1 - misses * (1 - LOCALITY_BAND)
        band, source = Band(low, 1 - misses, high), "calibration"
    else:
        share = arena_bytes / work.layout.total_bytes
        band, source = typical_hit_rate(share, work.top_k / max(work.layout.n_experts)), "typical models"
    if arena_bytes < arena_working_set_bytes(work.layout, work.top_k):
        band = Band(0.0, band.expected, band.high)
    return band, source


# ---- time --------------------------------------------------------------------------------------------------


def busy_seconds(read_seconds: float, compute_seconds: float, overlap: float) -> float:
    """Reading and computing together, when `overlap` of the shorter of the two hides behind the longer."""
    return max(read_seconds, compute_seconds) + (1 - overlap) * min(read_seconds, compute_seconds)


def decode_compute_seconds(work: ModelWork, speeds: MachineSpeeds) -> float:
    """A token whose experts are all in memory."""
    return work.used_bytes / min(speeds.compute, speeds.memory) + work.layout.n_layers * speeds.layer_seconds


def touched_bytes(work: ModelWork, n_tokens: int, *, wanted: int | None = None) -> float:
    """Expected bytes of the experts that a micro-batch of n_tokens tokens uses, each counted once.

    wanted: tokens whose logits are wanted, the only ones that llama.cpp gives to the last layer; None: all. By what
    earlier prompts used, where that is known; else by independent draws, which use more than real ones do.
    """
    touched = np.zeros(len(work.layout.n_experts))
    at, nbytes, p = 0, work.expert_bytes(), work.probabilities()
    for layer, n in enumerate(work.layout.n_experts):
        is_last = layer + 1 == len(touched) and wanted is not None
        tokens = min(n_tokens, wanted) if is_last and wanted is not None else n_tokens
        seen = None if work.touched is None or is_last else work.touched.share(tokens, min(1.0, work.top_k / n))
        own = slice(at, at + n)
        touched[layer] = (1 - (1 - p[own]) ** tokens) @ nbytes[own] if seen is None else seen * nbytes[own].sum()
        at += n
    return float(touched.sum())


def _rate(rows: Sequence[tuple[int, float]], n: float) -> float:
    """Of a measured curve, at n tokens at once: the line through its points over the logarithm of the tokens."""
    return interpolate([(math.log2(tokens), rate) for tokens, rate in rows], math.log2(max(n, 1.0)))


def prefill_compute_seconds(
    work: ModelWork, speeds: MachineSpeeds, n_tokens: int, *, wanted: int | None = None, positions: int | None = None
) -> float:
    """One micro-batch whose experts are all in memory; never more than its tokens one by one.

    wanted: as in touched_bytes(). positions: tokens that are in the KV cache at its end; None: its own.
    """
    layers = work.layout.n_layers * speeds.layer_seconds
    experts = work.used_bytes - work.dense_bytes - work.kv_bytes
    last = 0.0 if wanted is None else experts * max(0, n_tokens - wanted) / work.layout.n_layers
    heads = 0.0 if wanted is None else float(work.head_bytes) * max(0, n_tokens - wanted)
    products = n_tokens * work.used_bytes - last - heads
    one_by_one = products / min(speeds.compute, speeds.memory)
    of_experts = n_tokens * experts - last
    rows = of_experts / max(touched_bytes(work, n_tokens, wanted=wanted), 1.0)  # tokens of a touched expert
    if speeds.expert_rows and speeds.dense_rows:
        dense = (n_tokens * work.dense_bytes - heads) / _rate(speeds.dense_rows, n_tokens)
        in_cache = work.kv_bytes / work.kv_positions * (n_tokens if positions is None else positions)
        attention = n_tokens * in_cache * work.query_share / (speeds.attention or _rate(speeds.dense_rows, n_tokens))
        together = dense + attention + of_experts / _rate(speeds.expert_rows, rows)
        return min(one_by_one, AROUND_PRODUCTS * together) + layers
    return min(one_by_one, products / speeds.prefill if rows >= TILED_ROWS else one_by_one) + layers


def first_token_seconds(work: ModelWork, arena_bytes: int, speeds: MachineSpeeds, n_prompt: int, n_ubatch: int) -> Band:
    """A prompt from a cold start: each micro-batch reads the experts it touches once.

    A later micro-batch finds what is left in the arena: under LRU nothing when the first one touched more than fits
    (slow), at best the arena's share (fast). The other rules keep a part of each layer and stream the rest through a
    few places, which comes to nearly that share: reads 1.04 times Belady's (docs/LOG.md, 2026-11-26).
    """
    sizes = [min(n_ubatch, n_prompt - at) for at in range(0, n_prompt, n_ubatch)]
    total, at = [0.0, 0.0, 0.0], 0
    for number, n_tokens in enumerate(sizes):
        at += n_tokens
        wanted = int(number + 1 == len(sizes))  # logits: of the prompt's last token alone
        touched = touched_bytes(work, n_tokens, wanted=wanted)
        share = min(1.0, arena_bytes / touched) if touched else 1.0
        for i, kept in enumerate((0.0, STREAMED_SHARE * share, share) if share < 1 else (1.0, 1.0, 1.0)):
            read = touched * (1 - kept if number else 1.0) / work.delivery(speeds, DISK_BAND[i])
            compute = prefill_compute_seconds(work, speeds, n_tokens, wanted=wanted, positions=at) / COMPUTE_BAND[i]
            total[i] += busy_seconds(read, compute, PREFILL_OVERLAP[i])
    return Band(total[2], total[1], total[0])


def estimate(
    work: ModelWork,
    arena_bytes: int,
    speeds: MachineSpeeds,
    *,
    hit_rate: HitRate | None = None,
    n_prompt: int = 512,
    n_ubatch: int = 512,
) -> Estimate:
    """Everything `plan` says of one arena size. More arena is never slower, nor is a faster disk."""
    hits, source = expert_hit_rate(work, arena_bytes, hit_rate)
    expert_bytes = float(work.probabilities() @ work.expert_bytes())
    reads = [expert_bytes * (1 - each) for each in (hits.low, hits.expected, hits.high)]
    compute = decode_compute_seconds(work, speeds)
    rates = [
        1 / busy_seconds(reads[i] / work.delivery(speeds, DISK_BAND[i]), compute / COMPUTE_BAND[i], DECODE_OVERLAP[i])
        for i in range(3)
    ]
    read_seconds = reads[1] / work.delivery(speeds)
    reads = [each * work.stored_share for each in reads]
    return Estimate(
        arena_bytes=arena_bytes,
        resident=source == "resident",
        hit_rate=hits,
        hit_source=source,
        read_bytes=Band(reads[2], reads[1], reads[0]),
        used_bytes=work.used_bytes,
        tokens_per_second=Band(*rates),
        ttft_seconds=first_token_seconds(work, arena_bytes, speeds, n_prompt, n_ubatch),
        binds=binding_resource(read_seconds, compute, work.layout.n_layers * speeds.layer_seconds, speeds),
        compute_seconds=compute,
        read_seconds=read_seconds,
    )


def binding_resource(
    read_seconds: float, compute_seconds: float, overhead_seconds: float, speeds: MachineSpeeds
) -> str:
    """What a faster one of would help a token most: "disk", "memory bandwidth" or "compute".

    overhead_seconds: the part of compute_seconds that is not products.
    """
    if read_seconds > compute_seconds:
        return "disk"
    in_products = overhead_seconds < compute_seconds / 2
    return "memory bandwidth" if in_products and speeds.compute >= MEMORY_BOUND_SHARE * speeds.memory else "compute"


def enough_arena_bytes(
    work: ModelWork, speeds: MachineSpeeds, floor_bytes: int, hit_rate: HitRate | None = None
) -> int:
    """The arena beyond which memory hardly matters: the least that decodes within 5 % of all resident.

    A number given as the hit rate of one budget says nothing of others; then the model's own curve is used.
    """
    given = hit_rate if callable(hit_rate) else None

    def rate(arena_bytes: int) -> float:
        return estimate(work, arena_bytes, speeds, hit_rate=given, n_prompt=1).tokens_per_second.expected

    total = work.layout.total_bytes
    needed = rate(total) / ENOUGH
    low, high = min(floor_bytes, total), total
    if rate(low) >= needed:
        return low
    while high - low > max(1, total // 1000):
        middle = (low + high) // 2
        if rate(middle) >= needed:
            high = middle
        else:
            low = middle
    return high
