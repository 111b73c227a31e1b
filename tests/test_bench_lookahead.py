"""The look-ahead benchmark: all arms decode the same, `perfect` is, and a cell becomes a row."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import lookahead
from conftest import open_engine
from lookahead import Cell, run_cell
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.engine import Engine

ARMS = ["off", "single", "auto", "perfect"]
SPEED = 40_000_000


@pytest.fixture(scope="module")
def cell() -> dict[str, Any]:
    path = tiny_model_path()
    engine = Engine(path, lookahead.engine_options(None, 1, None))
    ram = engine.plan.fixed.total_bytes + engine.layout.total_bytes * 2 // 5
    engine.close()
    return run_cell(Cell(str(path), list(range(300, 340)), ram, SPEED, ARMS, 2, 0.05, 1, []))


def test_all_arms_decode_the_same_tokens_in_turns(cell: dict[str, Any]) -> None:
    assert [p["arm"] for p in cell["passes"]] == ARMS * 2
    assert len({p["argmax"] for p in cell["passes"]}) == 1
    assert {len(p["seconds"]) for p in cell["passes"]} == {cell["n_tokens"]}


def test_perfect_wastes_nothing_and_leaves_the_first_layer_only(cell: dict[str, Any]) -> None:
    for p in cell["passes"]:
        c = p["counts"]
        if p["arm"] == "off":
            assert c["prefetched"] == 0 < c["loads"]
        if p["arm"] == "perfect":
            assert c["prefetch_useful"] > 0 and c["prefetch_wasted"] <= 2 and c["prefetch_cancelled"] <= 2
            assert c["loads"] < cell["passes"][0]["counts"]["loads"]


def test_a_cell_is_a_row_of_the_table(cell: dict[str, Any]) -> None:
    row = lookahead.row(0.4, SPEED, cell, ARMS, 10.0)
    fields = [f.strip() for f in row.strip("|").split("|")]
    assert fields[:2] == ["40%", "40"] and len(fields) == 5 + 3 + 3
    assert fields[5].split("x")[0].replace(".", "").isdigit()
    assert float(fields[-1]) == pytest.approx(10.0 * lookahead.typical_token_s(cell["passes"][::4]), abs=0.006)


def test_of_each_token_the_median_over_the_rounds_counts() -> None:
    rounds = [{"seconds": [1.0, 2.0]}, {"seconds": [1.2, 90.0]}, {"seconds": [1.4, 4.0]}]
    assert lookahead.typical_token_s(rounds) == pytest.approx((1.2 + 4.0) / 2)


def test_paced_reads_take_at_least_what_a_disk_of_that_speed_takes() -> None:
    with open_engine(tiny_model_path(), "middle", disk_bytes_per_second=SPEED) as engine:
        t0, before = time.perf_counter(), engine.counters()
        with engine.decoding():
            engine.llama.eval(list(range(300, 308)))
        c, seconds = engine.counters().since(before), time.perf_counter() - t0
        assert c.bytes_read > 0
        assert seconds >= c.disk_busy_seconds >= 0.99 * c.bytes_read / SPEED
        engine.native.pace(0)
