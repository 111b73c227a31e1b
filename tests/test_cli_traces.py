"""`trace` and `simulate` as a user meets them: the command line in its own process."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from moe_edge.runner.measure.record import load_trace
from moe_edge.schedulers.eviction import RULES
from test_cli import fails, run

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 4)
    return path


@pytest.fixture(scope="module")
def traced(text: Path) -> Path:
    """The embedded model's routing of 64 tokens, with look-ahead, as the README has it."""
    path = text.with_name("t.npz")
    done = run("trace", "--text", text, "-o", path, "-n", 64, "-t", 1)
    assert done.returncode == 0, done.stderr
    assert "t.npz: 64 tokens, 256 layer steps, look-ahead of 3 layers, " in done.stdout
    return path


def test_a_trace_has_the_scores_of_three_layers_ahead_twice_top_k_wide(traced: Path) -> None:
    trace = load_trace(traced)
    assert trace.ahead_experts is not None and trace.ahead_scores is not None
    assert trace.ahead_experts.shape == (64, 4, 3, 2 * trace.n_used)
    assert (trace.ahead_experts[1:, 0] >= 0).all() and (trace.ahead_scores[1:, 0] > 0).all()


def test_simulate_compares_every_cache_rule(traced: Path) -> None:
    done = run("simulate", traced, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    exact = [row for row in rows if row["policy"] == "exact"]
    assert [row["cache"] for row in exact[: len(RULES) - 1]] == ["learned", *(r for r in RULES[2:])]
    assert {row["policy"] for row in rows} == {"belady", "exact", "hobbit", "reroute"}
    budgets = {row["arena_bytes"] for row in rows}
    assert len(budgets) == 5 and sum(row["best"] for row in exact) <= 5
    for row in exact:
        least = min(each["reads_to_belady"] for each in exact if each["arena_bytes"] == row["arena_bytes"])
        assert row["reads_to_belady"] == least or not row["best"]


def test_simulate_with_look_ahead_says_how_good_the_predictions_are(traced: Path) -> None:
    done = run("simulate", traced, "--policy", "exact", "--cache", "lru", "--lookahead", "off,stacked", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {row["lookahead"] for row in said["rows"]} == {"off", "stacked"}
    k = load_trace(traced).n_used
    qualities = said["prediction"]["rows"]
    assert [(q["distance"], q["width"]) for q in qualities] == [
        (d, width) for d in (1, 2, 3) for width in (k, -(-3 * k // 2), 2 * k)
    ]
    for narrow, wide in pairwise(qualities):
        if narrow["distance"] == wide["distance"]:
            assert narrow["recall"] <= wide["recall"] and narrow["precision"] >= wide["precision"]
    assert qualities[0]["recall"] > 0.3 and len(qualities[0]["miss_recall"]) == 5
    table = run("simulate", traced, "--policy", "exact", "--lookahead", "stacked")
    assert "layers ahead" in table.stdout and "ahead/token" in table.stdout


def test_without_scores_look_ahead_is_refused_with_the_command_that_records_them(text: Path, tmp_path: Path) -> None:
    for option in (("--prefill",), ("--lookahead-depth", 0)):
        done = run("trace", "--text", text, "-o", tmp_path / "t.npz", "-n", 8, "-t", 1, *option)
        assert done.returncode == 0 and "look-ahead" not in done.stdout, done.stderr
        said = fails(2, "simulate", tmp_path / "t.npz", "--lookahead", "stacked")
        assert "has no look-ahead scores" in said and said.endswith("--lookahead-depth 3")
    said = fails(2, "trace", "--text", text, "-o", tmp_path / "t.npz", "--prefill", "--lookahead-depth", 2)
    assert "one token at a time; leave out --prefill" in said


def test_the_policy_runs_while_its_trace_is_recorded(text: Path, tmp_path: Path) -> None:
    options = ("--policy", "dymoe", "--low-level", "skip", "--retention", 0.5, "--lookahead", "stacked")
    done = run("trace", "--text", text, "-o", tmp_path / "t.npz", "-n", 8, "-t", 1, *options)
    assert done.returncode == 0, done.stderr
    recorded = load_trace(tmp_path / "t.npz").recorded
    assert recorded is not None and recorded.policy == "dymoe" and recorded.skipped_uses > 0


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--cache", "mru"), "unknown cache rule 'mru'; known: all, auto, learned"),
        (("--lookahead", "far"), "unknown look-ahead 'far'; known: all, off, single"),
        (("--policy", "lfru"), "unknown policy 'lfru'; known: all, exact"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(traced: Path, option: tuple[str, str], says: str) -> None:
    assert says in fails(2, "simulate", traced, *option)
