"""The block schedule within its bound of the optimum, and the planner's split within 5 % of the best one there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from conftest import open_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import UsageError
from moe_edge.runner.measure.packed_split import typical_chances
from moe_edge.runner.measure.record import record_trace
from moe_edge.runner.measure.simulation import SimBudget, packed_bytes_of, run_simulations
from moe_edge.schedulers.block import Task, block_schedule, makespan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import most_packed_bytes
from moe_edge.schedulers.replay.simulate import Costs, simulate_policy
from moe_edge.schedulers.replay.trace import Trace
from moe_edge.schedulers.split import (
    SplitCosts,
    entropy_weights,
    inclusion,
    layer_seconds,
    pool_counts,
    rank_chances,
)

# ---- the block schedule


def optimum(tasks: list[Task], threads: int) -> float:
    """The least makespan of all: every order of the reads, with every order of the work."""
    best = float("inf")
    n = range(len(tasks))
    for reads in permutations(i for i in n if tasks[i].read):
        arrives, now = [0.0 for _ in n], 0.0
        for i in reads:
            now += tasks[i].read
            arrives[i] = now
        for work in permutations(n):
            free = [0.0] * threads
            for i in work:
                first = free.index(min(free))
                free[first] = max(free[first], arrives[i]) + tasks[i].work
            best = min(best, *([max(free)] if free else []))
    return best


SECONDS = st.integers(1, 9).map(float)


@settings(max_examples=60, deadline=None)
@given(st.lists(SECONDS, max_size=2), st.lists(SECONDS, max_size=3), SECONDS, st.integers(1, 3), st.floats(0.2, 9))
def test_the_block_schedule_keeps_zipmoes_bound(
    works_of_reads: list[float], works: list[float], read: float, threads: int, work_in_a_read: float
) -> None:
    reads, alone = [Task(read, w) for w in works_of_reads], [Task(0, w) for w in works]
    if not reads + alone:
        return
    order = block_schedule(reads, alone, work_in_a_read)
    assert sorted(order, key=repr) == sorted(reads + alone, key=repr)
    took, best = makespan(order, threads), optimum(reads + alone, threads)
    assert best <= took + 1e-9 and took <= (3 - 1 / threads) * best + 1e-9


def test_reads_come_first_and_work_fills_their_time() -> None:
    assert block_schedule("AB", "abcdefgh", 4) == list("AabcBdefgh")
    assert block_schedule("", "ab") == ["a", "b"] and block_schedule("AB", "") == ["A", "B"]
    tasks = [Task(4, 1), Task(0, 1), Task(0, 1), Task(0, 1)]
    assert makespan(tasks, 1) == 5  # the processor works while the disk reads
    assert makespan([Task(1, 2), Task(1, 2)], 2) == 4 and makespan([Task(1, 2), Task(1, 2)], 1) == 5


# ---- the draw of maximum entropy


def test_every_expert_is_drawn_as_often_as_its_chance_says() -> None:
    chances = np.array([0.95, 0.6, 0.5, 0.4, 0.3, 0.2, 0.05])
    weights = entropy_weights(chances, 3)
    assert inclusion(weights, 3) == pytest.approx(chances, abs=1e-4)
    sets = {s: np.prod(weights[list(s)]) for s in combinations(range(7), 3)}
    total = sum(sets.values())
    table = pool_counts(weights, 3, 2, 3)
    for whole in range(4):
        for packed in range(4):
            by_hand = sum(
                w for s, w in sets.items() if (sum(i < 2 for i in s), sum(2 <= i < 5 for i in s)) == (whole, packed)
            )
            assert table[whole, packed] == pytest.approx(by_hand / total)


def test_a_layer_takes_the_slower_of_processor_and_disk() -> None:
    weights = np.ones(8)
    everything, nothing = (8.0, 0.0), (0.0, 0.0)
    costs = SplitCosts(use=1, unpack=2, read=10, other=0.5)
    assert layer_seconds(weights, 2, costs, *everything) == pytest.approx(2.5)
    assert layer_seconds(weights, 2, costs, *nothing) == pytest.approx(20.5)
    assert layer_seconds(weights, 2, costs, 0, 8) == pytest.approx(6.5)
    assert 2.5 < layer_seconds(weights, 2, costs, 3.5, 2.25) < 20.5


def test_typical_chances_are_chances() -> None:
    for n_experts, n_used in ((8, 2), (32, 4), (128, 8)):
        chances = typical_chances(n_experts, n_used)
        assert len(chances) == n_experts and chances.sum() == pytest.approx(n_used) and (chances >= 0).all()


# ---- the split


@pytest.fixture(scope="module")
def trace() -> Trace:
    """The embedded model's routing, its experts in the sizes of BF16."""
    with open_engine(tiny_model_path(), "resident", n_ctx=256, n_threads=1) as engine:
        tokens = np.random.default_rng(3).integers(3, 4000, 150).tolist()  # they route widely
        found = record_trace(engine, tokens)
    unit = np.full(len(found.unit_bytes), 384 << 10, np.int64)
    read, exponents, mantissas = unit * 2 // 3, unit // 6, unit // 2
    return replace(
        found, unit_bytes=unit, read_bytes=read, part_bytes=np.stack([exponents, mantissas], 1),
        saved_bytes=np.stack([exponents, mantissas, read], 1), compute_seconds=None, other_seconds=None,
    )  # fmt: skip


@pytest.mark.parametrize("disk", [5e7, 1e8, 4.4e8, 3e9])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_planned_split_is_within_5_percent_of_the_best(trace: Trace, disk: float, share: float) -> None:
    arena = int(trace.layout().total_bytes * share)
    costs = Costs(disk, unpack_bytes_per_second=4.8e9)
    most = most_packed_bytes(trace.layout(), arena)

    def seconds(nbytes: int) -> float:
        return simulate_policy(trace, PolicyOptions(), arena, costs, packed_bytes=nbytes).seconds

    least = 2 * int(trace.read_bytes[0])
    swept = [0, *range(least, most + 1, max(1, (most - least) // 12))]
    best = min(map(seconds, swept))
    assert seconds(packed_bytes_of(trace, "auto", arena, costs)) <= 1.05 * best


def test_it_is_planned_for_slow_disks_and_not_where_unpacking_is_slower_than_reading(trace: Trace) -> None:
    arena = int(trace.layout().total_bytes * 0.7)
    slow, fast = (packed_bytes_of(trace, "auto", arena, Costs(d, unpack_bytes_per_second=2e9)) for d in (5e7, 2e10))
    assert slow > 0 == fast


def test_ranks_are_by_recent_use(trace: Trace) -> None:
    chances = rank_chances(trace)
    assert chances.sum() == pytest.approx(trace.n_used) and chances[:4].sum() > 1.5 * chances[-4:].sum()


def test_the_report_has_rows_with_and_without(trace: Trace) -> None:
    arena = int(trace.layout().total_bytes * 0.7)
    costs = Costs(5e7, unpack_bytes_per_second=4e9)
    packed = ("off", "auto", "40%", "99%")
    found = run_simulations(trace, [SimBudget(arena)], [PolicyOptions()], costs, packed=packed, belady=False)
    assert [row.packed_bytes > 0 for row in found.rows] == [False, True, True]
    assert found.rows[1].bytes_per_token < found.rows[0].bytes_per_token and found.rows[1].packed_share > 0
    assert "unpacked" in found.text() and any("does not fit" in sentence for sentence in found.left_out)
    raw = replace(trace, part_bytes=None, saved_bytes=None)
    with pytest.raises(UsageError, match="--pack planes and record it again"):
        packed_bytes_of(raw, "auto", arena, costs)
