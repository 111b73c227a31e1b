"""How much of the experts' memory is for packed experts: ZipMoE's planner (arXiv 2601.21198, PAPERS.md).

An expert's chance to be used by a token is taken by its rank, in the order of recent use at that moment, which is the
order that the cache keeps. The k experts of a token are drawn with these chances, and as little else as possible: the
draw of maximum entropy, in which every set of k has a chance in proportion to the product of its experts' weights. The
first ranks are whole in memory, the next ones packed, the others on disk. How many of a token's experts each pool then
has is a Poisson-binomial count, given that there are k; a layer takes as long as the slower of processor and disk.
Every split is tried, and the best of the smoothed curve taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from moe_edge.models.errors import UsageError
from moe_edge.models.formats.floats import Float64Array
from moe_edge.schedulers.budget import parse_bytes
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.packed import PackedSizes, check_packed_bytes, most_packed_bytes, window_bytes
from moe_edge.schedulers.replay.trace import Trace

HALF_LIFE_TOKENS = 16.0  # of the uses by which experts are ranked: recent, as the cache's own order is
SPLITS = 50  # that are tried, in equal steps of the memory that a packed cache may have
SMOOTHED = 5  # splits in an average
WORTH = 0.97  # of the seconds without a packed cache: what it must save to be taken
SCALINGS = 60  # rounds of iterative scaling; the chances are then met to 1e-4 and better


# ---- what is asked for


def asked_packed_bytes(asked: str, arena_bytes: int) -> int | None:
    """`off`, a size like 400MiB or a share of the arena like 50% -> bytes; None for `auto`. Raises UsageError."""
    if asked in ("off", "auto"):
        return 0 if asked == "off" else None
    share = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", asked)
    if share and float(share[1]) <= 100:
        return int(arena_bytes * float(share[1]) / 100)
    if share:
        raise UsageError(f"--packed-cache {asked}: is more than the whole memory of the experts; give 0% to 100%")
    try:
        return parse_bytes(asked)
    except UsageError as e:
        raise UsageError(f"--packed-cache '{asked}' is none of off, auto, a size like 400MiB, a share like 50%") from e


def choose_packed_bytes(asked: str, layout: Layout, sizes: PackedSizes, arena_bytes: int) -> int | None:
    """Bytes of the packed cache, none when all experts fit whole; None for `auto` where a planner is to say.

    Raises UsageError for one that does not fit.
    """
    nbytes = asked_packed_bytes(asked, arena_bytes)
    if nbytes is None and can_have_packed(layout, sizes, arena_bytes):
        return None
    if not nbytes:
        return 0
    check_packed_bytes(layout, sizes, layout.total_bytes, 2 * sizes.largest_bytes)  # that there are packed experts
    if arena_bytes >= layout.total_bytes:
        return 0
    check_packed_bytes(layout, sizes, arena_bytes, nbytes)
    return nbytes


def can_have_packed(layout: Layout, sizes: PackedSizes, arena_bytes: int) -> bool:
    """Whether there are packed experts, not all fit whole, and there is room for some."""
    if sizes.largest_bytes == 0 or arena_bytes >= layout.total_bytes:
        return False
    return most_packed_bytes(layout, arena_bytes) >= 2 * sizes.largest_bytes


# ---- chances by rank


def rank_chances(trace: Trace) -> Float64Array:
    """[E]: the chance that a token uses the expert of each rank, the most used lately first, over all layers.

    Ranks are those before the token's own use. Steps of several tokens rank, but are not counted.
    """
    most = max(trace.n_experts)
    uses, n = np.zeros(most), 0
    scores = [np.zeros(n_experts) for n_experts in trace.n_experts]
    decay = 0.5 ** (1 / HALF_LIFE_TOKENS)
    for _, step in trace.steps():
        score, experts = scores[step.layer], list(step.experts)
        if step.n_tokens == 1:
            place = np.empty(len(score), np.int64)
            place[np.argsort(-score, kind="stable")] = np.arange(len(score))
            uses[place[experts]] += 1
            n += 1
        score *= decay**step.n_tokens
        score[experts] += np.asarray(step.counts) / step.n_tokens
    if n == 0:
        raise UsageError(f"the trace of {trace.model} has no step of one token, which a split is planned for; "
                         "record it without --prefill")  # fmt: skip
    chances: Float64Array = uses / n
    return chances


def chances_of_hits(hit_rate: Sequence[tuple[float, float]], n_experts: int, n_used: int) -> Float64Array:
    """[E]: chances by rank whose first x ranks hit as often as a curve of (share in memory, hit rate) says."""
    shares, hits = zip(*hit_rate, strict=True)
    chances: Float64Array = n_used * np.diff(np.interp(np.arange(n_experts + 1) / n_experts, shares, hits))
    return chances


# ---- the draw of maximum entropy


def _convolved(weights: Float64Array, n_used: int) -> tuple[list[Float64Array], list[Float64Array]]:
    """Elementary symmetric polynomials up to n_used: of the weights before each expert, and behind it."""

    def running(values: Float64Array) -> list[Float64Array]:
        rows = [np.zeros(n_used + 1)]
        rows[0][0] = 1.0
        for w in values:
            row = rows[-1].copy()
            row[1:] += w * rows[-1][:-1]
            rows.append(row)
        return rows

    return running(weights), running(weights[::-1])[::-1]


def inclusion(weights: Float64Array, n_used: int) -> Float64Array:
    """[E]: how likely each expert is among n_used that are drawn with these weights."""
    before, behind = _convolved(weights, n_used)
    without = [float(before[i][:n_used] @ behind[i + 1][n_used - 1 :: -1]) for i in range(len(weights))]
    found: Float64Array = weights * np.array(without) / before[-1][n_used]
    return found


def entropy_weights(chances: Float64Array, n_used: int) -> Float64Array:
    """[E]: the weights of the draw of maximum entropy in which each expert has its chance, found by scaling.

    chances: scaled here to sum n_used, and capped below 1.
    """
    p = np.maximum(chances, 1e-9)
    for _ in range(20):  # capping leaves less than the sum: the others take the rest
        p = np.minimum(p * (n_used / p.sum()), 1 - 1e-6)
    weights: Float64Array = p / (1 - p)
    for _ in range(SCALINGS):
        found = inclusion(weights, n_used)
        # of p = w r / (1 + w r) the odds, with r the rest of the draw: a step on the odds converges near 1 too
        weights = weights * (p / (1 - p)) / (found / (1 - found))
        weights /= weights.mean()
    return weights


def pool_counts(weights: Float64Array, n_used: int, whole: float, packed: float) -> Float64Array:
    """[n_used + 1, n_used + 1]: the chance that so many of a token's experts are whole, and so many packed.

    whole, packed: ranks of each pool, which may be fractions: one of the layers has them, another has not.
    """
    table = np.zeros((n_used + 1, n_used + 1, n_used + 1))  # whole, packed, on disk
    table[0, 0, 0] = 1.0
    for rank, w in enumerate(weights):
        in_whole = min(1.0, max(0.0, whole - rank))
        in_packed = min(1.0, max(0.0, whole + packed - rank)) - in_whole
        new = table.copy()
        new[1:] += w * in_whole * table[:-1]
        new[:, 1:] += w * in_packed * table[:, :-1]
        new[:, :, 1:] += w * (1 - in_whole - in_packed) * table[:, :, :-1]
        table = new
    a, b, c = np.indices(table.shape)
    table = np.where(a + b + c == n_used, table, 0.0)
    counts: Float64Array = table.sum(axis=2) / table.sum()
    return counts


# ---- the split


@dataclass(frozen=True)
class SplitCosts:
    """Seconds of one expert: computing it, unpacking it on all threads together, reading it packed from the disk.

    other: of a layer besides its experts, while the disk has nothing to do.
    """

    use: float
    unpack: float
    read: float
    other: float = 0.0


def layer_seconds(weights: Float64Array, n_used: int, costs: SplitCosts, whole: float, packed: float) -> float:
    """What a layer of one token takes: the slower of processor and disk, expected."""
    counts = pool_counts(weights, n_used, whole, packed)
    a, b = np.indices(counts.shape)
    read = np.maximum(n_used - a - b, 0)
    processor = n_used * costs.use + (b + read) * costs.unpack
    return costs.other + float((counts * np.maximum(processor, read * costs.read)).sum())


def pools(layout: Layout, sizes: PackedSizes, arena_bytes: int, packed_bytes: int) -> tuple[float, float]:
    """(whole, packed): experts of a layer that each pool holds, the mean over the layers.

    What passes through the window is packed as well, and hits no more for it.
    """
    unit, packed_unit = float(np.mean(layout.unit_bytes)), float(np.mean([sum(b) for b in sizes.part_bytes]))
    if packed_bytes == 0:
        return arena_bytes / unit / layout.n_layers, 0.0
    whole = (arena_bytes - packed_bytes - window_bytes(layout)) / unit
    return max(0.0, whole) / layout.n_layers, packed_bytes / packed_unit / layout.n_layers


@dataclass(frozen=True)
class Split:
    """packed_bytes: the best, 0 when none is worth it. seconds: of a layer, with it and without; gain: the one over
    the other in speed."""

    packed_bytes: int
    seconds: float
    seconds_without: float

    @property
    def gain(self) -> float:
        return self.seconds_without / self.seconds


def plan_split(
    layout: Layout, sizes: PackedSizes, arena_bytes: int, n_used: int, chances: Float64Array, costs: SplitCosts
) -> Split:
    """The best split of the experts' memory. chances [E]: by rank."""
    weights = entropy_weights(chances, n_used)

    def seconds(packed_bytes: int) -> float:
        return layer_seconds(weights, n_used, costs, *pools(layout, sizes, arena_bytes, packed_bytes))

    without = seconds(0)
    if not can_have_packed(layout, sizes, arena_bytes):
        return Split(0, without, without)
    least, most = 2 * sizes.largest_bytes, most_packed_bytes(layout, arena_bytes)
    tried = [least + (most - least) * i // (SPLITS - 1) for i in range(SPLITS)]
    curve = np.array([seconds(nbytes) for nbytes in tried])
    half = SMOOTHED // 2
    smooth = [curve[max(0, i - half) : i + half + 1].mean() for i in range(SPLITS)]
    best = int(np.argmin(smooth))
    if curve[best] > WORTH * without:
        return Split(0, without, without)
    return Split(tried[best], float(curve[best]), without)
