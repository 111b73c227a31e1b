"""The cost model: values worked by hand, more is never slower, and Che's approximation against a simulated LRU."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from moe_edge.schedulers.estimate import (
    AROUND_PRODUCTS,
    ENOUGH,
    LOCALITY,
    Band,
    MachineSpeeds,
    ModelWork,
    busy_seconds,
    characteristic_time,
    che_hit_rate,
    decode_compute_seconds,
    enough_arena_bytes,
    estimate,
    expert_hit_rate,
    interpolate,
    prefill_compute_seconds,
    touched_bytes,
    typical_hit_rate,
)
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.touched import Touched

MB = 10**6

# 2 layers of 4 experts of 1 MB, 2 used; 2 MB dense: a token uses 6 MB.
LAYOUT = Layout((4, 4), 1, (MB,) * 8)
WORK = ModelWork(LAYOUT, top_k=2, dense_bytes=2 * MB)
SPEEDS = MachineSpeeds(disk=100e6, memory=2e9, compute=1e9, prefill=8e9, layer_seconds=1e-3)

# 48 layers of 128 experts, 8 used: a 30B model.
LARGE = ModelWork(Layout((128,) * 48, 1, (2_860_000,) * (48 * 128)), top_k=8, dense_bytes=900 * MB)
DESKTOP = MachineSpeeds(disk=3e9, memory=40e9, compute=25e9, prefill=100e9)


def test_a_resident_token_takes_its_products_and_the_layers_overhead() -> None:
    assert WORK.used_bytes == 6 * MB
    assert decode_compute_seconds(WORK, SPEEDS) == pytest.approx(0.006 + 0.002)
    e = estimate(WORK, 8 * MB, SPEEDS)
    assert (e.resident, e.hit_rate, e.read_bytes.expected) == (True, Band(1, 1, 1), 0)
    assert e.tokens_per_second.expected == pytest.approx(125)
    assert e.binds == "compute"


def test_memory_slower_than_products_is_what_counts() -> None:
    slow = replace(SPEEDS, memory=0.5e9)
    assert decode_compute_seconds(WORK, slow) == pytest.approx(0.012 + 0.002)
    assert estimate(WORK, 8 * MB, slow).binds == "memory bandwidth"
    assert estimate(WORK, 8 * MB, replace(slow, layer_seconds=0.1)).binds == "compute"


def test_a_token_with_misses_reads_them_and_hides_half_behind_compute() -> None:
    e = estimate(WORK, 6 * MB, SPEEDS, hit_rate=0.9)
    assert e.read_bytes.expected == pytest.approx(0.4 * MB)
    assert e.read_seconds == pytest.approx(0.004)
    assert e.tokens_per_second.expected == pytest.approx(1 / (0.008 + 0.002))
    assert e.binds == "compute"
    slow = estimate(WORK, 6 * MB, SPEEDS, hit_rate=0.25)
    assert slow.read_seconds == pytest.approx(0.03)
    assert slow.tokens_per_second.expected == pytest.approx(1 / (0.03 + 0.004))  # half of the compute hides
    assert slow.binds == "disk"


@pytest.mark.parametrize(
    ("read", "compute", "overlap", "expected"),
    [(0, 2, 0.5, 2), (2, 2, 0.5, 3), (2, 2, 0, 4), (2, 2, 1, 2), (10, 1, 0.5, 10.5), (1, 10, 0.5, 10.5), (9, 1, 1, 9)],
)
def test_reading_and_computing_overlap_in_part(read: float, compute: float, overlap: float, expected: float) -> None:
    assert busy_seconds(read, compute, overlap) == expected


def test_the_first_token_reads_each_touched_expert_once_for_each_micro_batch() -> None:
    assert touched_bytes(WORK, 1) == pytest.approx(4 * MB)
    assert touched_bytes(WORK, 2) == pytest.approx(8 * MB * 0.75)
    # 16 tokens: 8 rows an expert, tiled products; 16 * 6 MB / 8 GB/s and two layers
    assert prefill_compute_seconds(WORK, SPEEDS, 16) == pytest.approx(0.012 + 0.002)
    assert prefill_compute_seconds(WORK, SPEEDS, 2) == pytest.approx(0.012 + 0.002)  # too few: one by one
    whole = estimate(WORK, 8 * MB, SPEEDS, n_prompt=64, n_ubatch=64).ttft_seconds.expected
    # Of the last layer only the token whose logits are wanted: 6 MB at 100 MB/s, and 30 % of the computing, which is
    # 64 x (2 MB dense and 2 MB of the first layer's experts) + 2 MB at 8 GB/s, and two layers.
    assert whole == pytest.approx(0.06 + 0.3 * (258e6 / 8e9 + 0.002), rel=1e-4)
    tight = [estimate(WORK, 2 * MB, SPEEDS, n_prompt=64, n_ubatch=n).ttft_seconds.expected for n in (64, 32)]
    assert tight[1] > 1.3 * tight[0]


def test_experts_that_are_raw_do_not_wait_for_unpacking() -> None:
    slow = replace(SPEEDS, unpack=1e6)
    assert estimate(WORK, 6 * MB, slow, hit_rate=0.5) == estimate(WORK, 6 * MB, SPEEDS, hit_rate=0.5)
    packed = replace(WORK, stored_share=0.8)
    assert packed.delivery(slow) == 1e6 and packed.delivery(SPEEDS) == pytest.approx(125e6)


def test_what_earlier_prompts_touched_replaces_independent_draws() -> None:
    touched = Touched()
    for _ in range(3):
        touched.note(Step(0, [1], [64], [1.0], [1.0], 64), 4)  # one expert of four: nothing draws from less than two
        touched.note(Step(0, [1, 2, 3], [64] * 3, [1.0] * 3, [1.0] * 3, 128), 4)
    seen = replace(WORK, touched=touched)
    assert touched_bytes(WORK, 64) == pytest.approx(8 * MB)
    assert touched_bytes(seen, 64) == pytest.approx(2 * 2 * MB)  # two layers, the two experts of a token
    assert touched_bytes(seen, 128) == pytest.approx(2 * 3 * MB)
    assert touched_bytes(seen, 128, wanted=1) == pytest.approx(3 * MB + 2 * MB)
    assert touched_bytes(seen, 128, wanted=0) == pytest.approx(3 * MB)
    cold = [estimate(each, 8 * MB, SPEEDS, n_prompt=64, n_ubatch=64).ttft_seconds.expected for each in (WORK, seen)]
    assert cold[1] < cold[0]


def test_products_are_timed_for_the_tokens_that_an_expert_gets() -> None:
    rows = ((1, 1e9), (4, 2e9), (16, 8e9))
    curve = replace(SPEEDS, compute=1e9, expert_rows=rows, dense_rows=((1, 1e9), (64, 4e9)))
    # 8 tokens of 2 experts of 4: 4 rows an expert; 8 x 4 MB at 2 GB/s, and 8 x 2 MB halfway between 1 and 4 GB/s
    touched = touched_bytes(WORK, 8)
    by_hand = 32e6 / interpolate([(0, 1e9), (2, 2e9), (4, 8e9)], np.log2(32e6 / touched)) + 16e6 / 2.5e9
    by_hand = AROUND_PRODUCTS * by_hand + 0.002
    assert prefill_compute_seconds(WORK, curve, 8) == pytest.approx(by_hand)
    head = replace(WORK, head_bytes=1 * MB)
    saved = prefill_compute_seconds(WORK, curve, 8, wanted=1) - prefill_compute_seconds(head, curve, 8, wanted=1)
    assert saved == pytest.approx(AROUND_PRODUCTS * 7e6 / 2.5e9)
    # 512 cells of 1 kB each: 8 tokens look at 100 of them with 2 query heads each, at 4 GB/s
    cache = replace(WORK, kv_bytes=512_000, kv_positions=512, query_share=2)
    seen = prefill_compute_seconds(cache, replace(curve, attention=4e9), 8, positions=100)
    assert seen - by_hand == pytest.approx(AROUND_PRODUCTS * 8 * 100e3 * 2 / 4e9)


def test_curves_pass_through_what_was_measured() -> None:
    assert interpolate(((0, 0), (1, 10)), 0.25) == 2.5
    assert interpolate(((0, 0), (1, 10)), 7) == 10
    assert typical_hit_rate(0.25, 4 / 16).expected == pytest.approx(0.50)  # the flat one
    assert typical_hit_rate(0.25, 8 / 128).expected == pytest.approx(0.81)  # Qwen3-30B-A3B
    gpt_oss = typical_hit_rate(0.31, 4 / 32)
    assert (gpt_oss.low, gpt_oss.high) == (pytest.approx(0.568), pytest.approx(0.858))  # type: ignore[comparison-overlap]
    assert gpt_oss.expected == pytest.approx(0.761, abs=0.001)


def test_below_one_tokens_working_set_lru_is_expected_to_hit_nothing() -> None:
    below, _ = expert_hit_rate(WORK, 4 * MB - 1)
    at, source = expert_hit_rate(WORK, 4 * MB)
    assert below.low == 0 < below.expected <= at.expected
    assert at.expected > 0.5
    assert source == "typical models"


def test_the_characteristic_time_fills_the_arena() -> None:
    p, b = np.array([0.5, 0.5]), np.array([1.0, 1.0])
    assert characteristic_time(p, b, 1.0) == pytest.approx(2 * np.log(2))
    assert che_hit_rate(p, b, 1.0) == pytest.approx(0.5)
    assert characteristic_time(p, b, 2.0) == float("inf")
    assert che_hit_rate(np.array([1.0, 0.0]), b, 1.0) == 1.0  # what is never used takes no room


def lru_hits(p: np.ndarray, nbytes: np.ndarray, arena: float, n: int) -> float:
    draws = np.random.default_rng(0).choice(len(p), n, p=p / p.sum())
    cache: OrderedDict[int, float] = OrderedDict()
    used, hits = 0.0, 0
    for at, unit in enumerate(draws.tolist()):
        if unit in cache:
            cache.move_to_end(unit)
            hits += at >= n // 4
            continue
        cache[unit] = nbytes[unit]
        used += nbytes[unit]
        while used > arena:
            used -= cache.popitem(last=False)[1]
    return hits / (n - n // 4)


@pytest.mark.parametrize("skew", [0.0, 0.6, 1.2])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_che_agrees_with_a_simulated_lru_of_independent_draws(skew: float, share: float) -> None:
    rng = np.random.default_rng(1)
    p = rng.permutation(np.arange(1, 257) ** -skew)
    nbytes = rng.choice([1.0, 1.5, 2.0], 256)
    found = che_hit_rate(p, nbytes, share * nbytes.sum())
    assert found == pytest.approx(lru_hits(p, nbytes, share * nbytes.sum(), 40_000), abs=0.02)


def test_a_calibration_gives_the_hits_of_its_own_counts() -> None:
    flat = replace(WORK, counts=np.full((2, 4), 50, np.int64))
    skewed = replace(WORK, counts=np.array([[99, 99, 1, 1], [99, 99, 1, 1]], np.int64))
    assert flat.used_bytes == skewed.used_bytes == 6 * MB
    hits, source = expert_hit_rate(flat, 6 * MB)
    assert source == "calibration"
    assert hits.expected == pytest.approx(1 - LOCALITY * 0.25)  # uniform: the share in memory is the hit rate
    assert expert_hit_rate(skewed, 6 * MB)[0].expected > 0.95


def test_a_trace_is_believed() -> None:
    hits, source = expert_hit_rate(WORK, 6 * MB, lambda arena: arena / (10 * MB))
    assert (hits, source) == (Band(0.6, 0.6, 0.6), "trace")


@pytest.mark.parametrize("work", [WORK, LARGE, replace(WORK, counts=np.array([[9, 5, 2, 1], [1, 1, 1, 1]]))])
@pytest.mark.parametrize("disk", [50e6, 440e6, 7e9])
def test_more_memory_is_never_slower(work: ModelWork, disk: float) -> None:
    speeds = replace(DESKTOP, disk=disk)
    total = work.layout.total_bytes
    found = [estimate(work, total * i // 40, speeds, n_prompt=1500) for i in range(1, 41)]
    for part in ("low", "expected", "high"):
        rates = [getattr(e.tokens_per_second, part) for e in found]
        waits = [getattr(e.ttft_seconds, part) for e in found]
        assert rates == sorted(rates)
        assert waits == sorted(waits, reverse=True)


def test_a_faster_disk_is_never_slower_and_the_band_is_in_order() -> None:
    arena = LARGE.layout.total_bytes // 3
    found = [estimate(LARGE, arena, replace(DESKTOP, disk=d * 1e8)) for d in range(1, 60)]
    rates = [e.tokens_per_second.expected for e in found]
    assert rates == sorted(rates)
    for e in found:
        for band in (e.hit_rate, e.read_bytes, e.tokens_per_second, e.ttft_seconds):
            assert band.low <= band.expected <= band.high


def test_known_points_of_a_30b_model() -> None:
    e = estimate(LARGE, LARGE.layout.total_bytes // 4, DESKTOP)
    assert e.read_bytes.expected == pytest.approx(212 * MB, rel=0.02)  # PAPERS.md, section 8: 212 MB at 32 of 128
    assert e.tokens_per_second.high <= 25
    assert e.tokens_per_second.low < e.tokens_per_second.expected < 3e9 / (212 * MB)  # their bound without prefetch


def test_enough_memory_is_within_five_per_cent_of_all() -> None:
    total = LARGE.layout.total_bytes
    enough = enough_arena_bytes(LARGE, DESKTOP, total // 20)
    best = estimate(LARGE, total, DESKTOP).tokens_per_second.expected
    assert estimate(LARGE, enough, DESKTOP).tokens_per_second.expected >= best / ENOUGH
    assert estimate(LARGE, enough - total // 50, DESKTOP).tokens_per_second.expected < best / ENOUGH
    assert enough_arena_bytes(LARGE, replace(DESKTOP, compute=1e8), total // 20) < total // 4  # compute binds at once
    assert enough_arena_bytes(LARGE, DESKTOP, total // 20, 0.5) == enough
