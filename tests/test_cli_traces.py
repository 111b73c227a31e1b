"""`trace` as a user meets it: the command line in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
from moe_edge.runner.trace import load_trace
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


def test_the_policy_runs_while_its_trace_is_recorded(text: Path, tmp_path: Path) -> None:
    options = ("--policy", "dymoe", "--low-level", "skip", "--retention", 0.5, "--lookahead", "stacked")
    done = run("trace", "--text", text, "-o", tmp_path / "t.npz", "-n", 8, "-t", 1, *options)
    assert done.returncode == 0, done.stderr
    recorded = load_trace(tmp_path / "t.npz").recorded
    assert recorded is not None and recorded.policy == "dymoe" and recorded.skipped_uses > 0


def test_look_ahead_of_micro_batches_is_refused(text: Path, tmp_path: Path) -> None:
    said = fails(2, "trace", "--text", text, "-o", tmp_path / "t.npz", "--prefill", "--lookahead-depth", 2)
    assert "one token at a time; leave out --prefill" in said
