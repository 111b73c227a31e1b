"""What share of its experts a prompt touches: counted, kept between runs, and read again by `plan`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.store.skeleton import cache_folder
from moe_edge.runner.measure.plan import plan
from moe_edge.runner.touched_file import TouchedFile
from moe_edge.schedulers.estimate import MachineSpeeds
from moe_edge.schedulers.layout import Step
from moe_edge.schedulers.touched import (
    LEAST_TOKENS,
    MOST_STEPS,
    Touched,
    drawn_share,
    effective_share,
    touched_in,
)
from random_models import Shape, write_random_model
from test_trace import decode_trace

SPEEDS = MachineSpeeds(disk=500e6, memory=20e9, compute=10e9, prefill=50e9)


def step(n_touched: int, n_tokens: int, layer: int = 0) -> Step:
    experts = list(range(n_touched))
    return Step(layer, experts, [n_tokens] * n_touched, [1.0] * n_touched, [1.0] * n_touched, n_tokens)


@pytest.mark.parametrize("drawn_from", [0.1, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("n_tokens", [32, 100, 1000])
def test_draws_from_a_part_are_told_by_what_they_touch(drawn_from: float, n_tokens: int) -> None:
    touched = drawn_share(drawn_from, n_tokens, 1 / 16)
    again = effective_share(touched, n_tokens, 1 / 16)
    assert drawn_share(again, n_tokens, 1 / 16) == pytest.approx(touched)
    assert 1 / 16 <= again <= 1


def test_the_nearest_size_answers_for_others() -> None:
    touched = Touched()
    assert touched.share(512, 1 / 16) is None
    touched.note(step(64, LEAST_TOKENS - 1), 128)
    assert touched.share(512, 1 / 16) is None and not touched.noted
    touched.note(step(64, 128), 128)
    touched.note(step(100, 1024), 128)
    assert touched.share(128, 1 / 16) == pytest.approx(0.5)
    assert touched.share(1024, 1 / 16) == pytest.approx(100 / 128)
    small, large = touched.share(16, 1 / 16), touched.share(4096, 1 / 16)
    assert small is not None and large is not None and 1 / 16 < small < 0.5 and large == pytest.approx(100 / 128)


def test_old_prompts_fade() -> None:
    touched = Touched()
    for _ in range(int(MOST_STEPS)):
        touched.note(step(128, 64), 128)
    for _ in range(int(MOST_STEPS)):
        touched.note(step(32, 64), 128)
    share = touched.share(64, 1 / 16)
    assert share is not None and 0.25 < share < 0.5  # of all ever seen it would be 0.63
    assert touched.sums[6][0] <= MOST_STEPS


def test_a_trace_says_what_prompts_of_its_tokens_would_touch() -> None:
    rng = np.random.default_rng(0)
    trace = decode_trace([[rng.choice(12, 2, replace=False).tolist() for _ in range(3)] for _ in range(200)], [16] * 3)
    touched = touched_in(trace)
    assert set(touched.sums) == {5, 6, 7}
    first = trace.experts[:, :2]  # the last layer is not counted
    distinct = [len(np.unique(first[at : at + 64, layer])) for layer in range(2) for at in range(0, 137, 64)]
    assert touched.sums[6][2] == sum(distinct)
    assert touched.share(64, 2 / 16) == pytest.approx(sum(distinct) / (16 * len(distinct)), abs=1e-6)


def test_plan_knows_what_a_prompt_of_an_earlier_run_touched(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "narrow.gguf", "olmoe", Shape(n_layer=4, n_expert=64, n_used=4))
    tokens = [7, 9] * 64  # two tokens over and over: far fewer experts than independent draws
    before = plan(path, n_ctx=256, n_ubatch=128, n_prompt=128, speeds=SPEEDS)
    with open_engine(path, "floor", n_ctx=256, n_ubatch=128, n_threads=1) as engine, engine.decoding():
        engine.llama.eval(tokens)
        kept = engine._touched.path
        assert kept is not None and not kept.exists()
        uses = engine.counters().uses
    sums = json.loads(kept.read_bytes())["sums"]
    assert list(sums) == ["7"] and sums["7"][0] == 3 and sums["7"][1] == 3 * 128 and sums["7"][3] == 3 * 64
    assert sums["7"][2] <= uses < 3 * 64
    after = plan(path, n_ctx=256, n_ubatch=128, n_prompt=128, speeds=SPEEDS)
    assert before.estimate is not None and after.estimate is not None
    assert after.estimate.ttft_seconds.expected < before.estimate.ttft_seconds.expected


def test_decoding_writes_nothing(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "short.gguf", "olmoe")
    with open_engine(path, "floor", n_ctx=64, n_threads=1) as engine, engine.decoding():
        engine.llama.eval([1, 2, 3])
        kept = engine._touched.path
    assert kept is not None and not kept.exists()


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"{", b"[]", b'{"version": 1}', b'{"version": 2, "sums": {}}', b'{"version": 1, "sums": {"7": [1, 2, 3]}}',
        b'{"version": 1, "sums": {"7": [0, 0, 0, 0]}}', b'{"version": 1, "sums": {"7": [1, 128, 9, 8]}}',
        b'{"version": 1, "sums": {"7": [1, 128, NaN, 8]}}', b'{"version": 1, "sums": {"x": [1, 128, 4, 8]}}',
        b'{"version": 1, "sums": {"7": "1234"}}', b"[" * 50000, b" " * (1 << 17),
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_none(tmp_path: Path, damaged: bytes) -> None:
    target = tmp_path / "experts.gguf"
    target.write_bytes(b"some")
    file = TouchedFile([target], tmp_path)
    file.touched.note(step(4, 64), 8)
    assert file.save() is None and file.path is not None
    assert TouchedFile([target], tmp_path).touched.sums == {6: (1, 64, 4, 8)}
    file.path.write_bytes(damaged)
    assert TouchedFile([target], tmp_path).touched.sums == {}


def test_what_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "experts.gguf"
    target.write_bytes(b"some")
    (tmp_path / "taken").write_text("a file where the cache folder should be")
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "taken"))
    assert str(cache_folder()).startswith(str(tmp_path / "taken"))
    file = TouchedFile([target])
    assert file.save() is None  # nothing was counted
    file.touched.note(step(4, 64), 8)
    assert "cannot be kept for `plan`" in (file.save() or "")
