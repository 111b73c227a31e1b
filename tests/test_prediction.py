"""Recall and precision of a trace's look-ahead, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.replay.prediction import missed_uses, prediction_quality, prediction_widths
from moe_edge.schedulers.replay.simulate import simulate_policy
from moe_edge.schedulers.replay.trace import NO_EXPERT, Trace
from test_trace import decode_trace, prefill_trace


def ahead_trace() -> Trace:
    """Three layers of six experts, two used by each token; each layer predicts four experts of the next two layers."""
    trace = decode_trace([[[0, 1], [2, 3], [4, 5]], [[0, 1], [0, 1], [0, 1]]], [6, 6, 6])
    experts = np.full((2, 3, 2, 4), NO_EXPERT, np.int16)
    experts[0, 0] = [[2, 0, 3, 1], [5, 0, 1, 2]]  # of layer 1: 1 of the best 2, 2 of the best 3; of layer 2: 1 of 2
    experts[0, 1, 0] = [0, 1, 2, 3]  # of layer 2: none
    experts[1, 0, 0] = [1, 0, 2, 9]  # of layer 1: both; no layer has an expert 9
    return replace(trace, ahead_experts=np.minimum(experts, 5), ahead_scores=np.ones(experts.shape, np.float16))


def test_recall_and_precision_by_hand() -> None:
    trace = ahead_trace()
    assert prediction_widths(trace) == [2, 3, 4]
    rows = prediction_quality(trace)
    assert [(row.distance, row.width, row.steps) for row in rows] == [
        (1, 2, 3), (1, 3, 3), (1, 4, 3), (2, 2, 1), (2, 3, 1), (2, 4, 1),
    ]  # fmt: skip
    assert [row.recall for row in rows] == [3 / 6, 4 / 6, 4 / 6, 1 / 2, 1 / 2, 1 / 2]
    assert [row.precision for row in rows] == [3 / 6, 4 / 9, 4 / 12, 1 / 2, 1 / 3, 1 / 4]
    assert prediction_quality(replace(trace, ahead_experts=None, ahead_scores=None)) == []


def test_recall_over_misses_by_hand() -> None:
    trace = ahead_trace()
    assert missed_uses(trace, "lru", 180).tolist() == [[[True] * 2] * 3, [[False] * 2, [True] * 2, [True] * 2]]
    assert not missed_uses(trace, "lru", 180)[1, 0].any()
    misses = np.zeros((2, 3, 2), bool)
    misses[0, 1] = [False, True]  # expert 3 of layer 1: the third best
    misses[1, 1] = [True, False]
    rows = prediction_quality(trace, [misses, np.zeros_like(misses)])
    assert [row.miss_recall for row in rows] == [(1 / 2, None), (1.0, None), (1.0, None), (None, None)] + [
        (None, None)
    ] * 2


def test_missed_uses_are_the_loads_of_the_simulation_and_leave_micro_batches_out() -> None:
    rng = np.random.default_rng(0)
    trace = decode_trace(np.argsort(rng.random((50, 3, 8)), -1)[..., :2].tolist(), [8, 8, 8])
    for rule in RULES:
        assert missed_uses(trace, rule, 100).sum() == simulate_policy(trace, PolicyOptions(cache=rule), 100).loads
    missed = missed_uses(prefill_trace(), "lru", 6 * 4096)
    assert list(zip(*np.nonzero(missed), strict=True)) == [(2, 1, 0), (2, 1, 1), (3, 0, 0)]
