"""The trace value, its steps, and its file: what is refused, and with which sentence."""

from __future__ import annotations

import errno
import os
import random
import zipfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BadFile, CutFile, DiskFull, MissingFile, UsageError
from moe_edge.runner.measure.record import load_trace, record_trace, save_trace
from moe_edge.schedulers.budget import FixedSizes
from moe_edge.schedulers.replay.trace import NO_EXPERT, Recorded, Trace

TEXT = b"In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness"


def decode_trace(steps: Sequence[Sequence[Sequence[int]]], n_experts: Sequence[int], unit_bytes: int = 10) -> Trace:
    """A trace of one level from experts by token and layer, gate weights all the same, made by hand."""
    experts = np.array(steps, np.int16)
    tokens, layers, used = experts.shape
    sizes = np.full(sum(n_experts), unit_bytes, np.int64)
    return Trace(
        "by-hand", "0" * 32, tuple(n_experts), 1, sizes, sizes, np.ones(tokens, np.int32), np.zeros(1, np.int32),
        np.ones((tokens, layers), np.int32), experts, np.full((tokens, layers, used), 1 / used, np.float32),
    )  # fmt: skip


def prefill_trace() -> Trace:
    """Micro-batches of 3, 1 and 2 tokens, two layers; the last one runs for the last token of each only."""
    experts = np.full((6, 2, 2), NO_EXPERT, np.int16)
    weights = np.zeros((6, 2, 2), np.float32)
    experts[:, 0] = [[2, 0], [0, 3], [3, 0], [1, 0], [1, 2], [2, 1]]
    weights[:, 0] = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.5], [0.25, 0.75], [0.5, 0.25], [0.5, 0.125]]
    for row in (2, 3, 5):
        experts[row, 1], weights[row, 1] = [1, 0], [0.5, 0.25]
    seconds = np.arange(6, dtype=np.float32).reshape(3, 2)
    return Trace(
        model="by-hand", store_id="abc", n_experts=(4, 2), n_levels=1,
        unit_bytes=np.full(6, 4096, np.int64), read_bytes=np.array([4096] * 5 + [100], np.int64),
        batch_tokens=np.array([3, 1, 2], np.int32), chunk_starts=np.array([0, 2], np.int32),
        step_tokens=np.array([[3, 1], [1, 1], [2, 1]], np.int32), experts=experts, weights=weights,
        attention=np.ones((6, 2), np.float32),
        ahead_experts=np.zeros((6, 2, 1, 2), np.int16), ahead_scores=np.ones((6, 2, 1, 2), np.float16),
        compute_seconds=seconds, other_seconds=seconds + 1,
        fixed=FixedSizes(1, 2, 3, 4, 5, repacked_bytes=6), recorded=Recorded("exact", 99, (3, 1), 1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b


# ---- the value ---------------------------------------------------------------------------------------------


def test_a_decode_step_lists_its_experts_ascending_with_their_own_weights() -> None:
    trace = decode_trace([[[3, 0, 2]]], [4])
    trace.weights[0, 0] = [0.5, 0.25, 0.125]
    ((batch, step),) = trace.steps()
    assert (batch, step.layer, step.n_tokens, step.routing) == (0, 0, 1, None)
    assert (step.experts, step.counts) == ([0, 2, 3], [1, 1, 1])
    assert (step.weights, step.squares) == ([0.25, 0.125, 0.5], [0.0625, 0.015625, 0.25])


def test_a_prefill_step_counts_tokens_and_sums_weights_for_each_expert() -> None:
    steps = list(prefill_trace().steps())
    assert [(batch, s.layer, s.n_tokens) for batch, s in steps] == [
        (0, 0, 3), (0, 1, 1), (1, 0, 1), (1, 1, 1), (2, 0, 2), (2, 1, 1),
    ]  # fmt: skip
    first = steps[0][1]
    assert (first.experts, first.counts) == ([0, 2, 3], [3, 1, 2])
    assert first.weights == [0.25 + 0.5 + 0.5, 0.75, 0.5 + 1.0]
    assert first.squares == [0.0625 + 0.25 + 0.25, 0.5625, 0.25 + 1.0]
    assert steps[1][1].experts == [0, 1] and steps[1][1].weights == [0.25, 0.5]


def test_routing_comes_with_steps_of_several_tokens_when_asked_for() -> None:
    trace = prefill_trace()
    steps = [step for _, step in trace.steps(with_routing=True)]
    assert [step.routing is not None for step in steps] == [True, False, False, False, True, False]
    routing = steps[0].routing
    assert routing is not None and routing.attention is not None
    assert routing.experts.tolist() == [[2, 0], [0, 3], [3, 0]] and routing.attention.tolist() == [1, 1, 1]
    assert trace.attention is not None
    trace.attention[1, 0] = np.nan  # not watched
    routing = next(trace.steps(with_routing=True))[1].routing
    assert routing is not None and routing.attention is None


def test_a_step_without_tokens_is_left_out_and_an_expert_named_twice_counts_twice() -> None:
    trace = decode_trace([[[1, 1], [0, 1]]], [2, 2])
    absent, step_tokens = trace.experts.copy(), trace.step_tokens.copy()
    absent[0, 1], step_tokens[0, 1] = NO_EXPERT, 0
    ((_, step),) = replace(trace, experts=absent, step_tokens=step_tokens).steps()
    assert (step.layer, step.experts, step.counts, step.weights) == (0, [1], [2], [1.0])


def test_steps_are_the_same_however_many_are_turned_into_lists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    trace = decode_trace(np.argsort(rng.random((50, 3, 6)), -1)[..., :2].tolist(), [6, 6, 6])
    at_once = list(trace.steps())
    monkeypatch.setattr("moe_edge.schedulers.replay.trace._BLOCK_VALUES", 7 * 6)
    assert list(trace.steps()) == at_once and len(at_once) == 150


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "is a trace of version 2, this moe-edge reads 1"),
    "layers": ({"n_experts": (4,)}, r"unit_bytes has shape \(6,\), its layers need \(4,\)"),
    "more layers": (
        {"n_experts": (2, 2, 2)}, r"experts has shape \(6, 2, 2\), expected \(6, 3, 2\)"
    ),
    "no layer": ({"n_experts": ()}, "without experts"),
    "type": ({"experts": np.zeros((6, 2, 2), np.int32)}, "experts is int32, expected int16"),
    "weights": ({"weights": np.zeros((6, 2, 3), np.float32)}, r"weights has shape \(6, 2, 3\), expected \(6, 2, 2\)"),
    "float64": ({"weights": np.zeros((6, 2, 2))}, "weights is float64, expected float16 or float32"),
    "nan": ({"weights": np.full((6, 2, 2), np.nan, np.float32)}, "not a finite number"),
    "tokens": ({"batch_tokens": np.array([3, 1, 1], np.int32)}, "micro-batches of 5 tokens together but experts of 6"),
    "empty batch": ({"batch_tokens": np.array([3, 0, 3], np.int32)}, "a micro-batch without tokens"),
    "chunks": ({"chunk_starts": np.array([0, 3], np.int32)}, "chunk_starts must ascend from 0 and stay below 3"),
    "first chunk": ({"chunk_starts": np.array([1], np.int32)}, "chunk_starts must ascend"),
    "steps": ({"step_tokens": np.array([[4, 1], [1, 1], [2, 1]], np.int32)}, "more tokens than its micro-batch"),
    "fewer": ({"step_tokens": np.array([[2, 1], [1, 1], [2, 1]], np.int32)}, "for tokens that a step did not have"),
    "missing": ({"step_tokens": np.array([[3, 2], [1, 1], [2, 1]], np.int32)}, "an expert that its layer does not"),
    "read": ({"read_bytes": np.full(6, 5000, np.int64)}, "reads more bytes than it has room for"),
    "no bytes": ({"read_bytes": np.zeros(6, np.int64)}, "a unit of 0 bytes"),
    "ahead": ({"ahead_scores": None}, "only one of ahead_experts and ahead_scores"),
    "seconds": ({"other_seconds": np.full((3, 2), -1, np.float32)}, "not a time"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_parts_that_do_not_fit_together_are_refused(name: str) -> None:
    change, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        replace(prefill_trace(), **change)


# ---- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["all parts", "no optional part"])
def test_a_trace_comes_back_from_its_file_as_it_was(tmp_path: Path, whole: bool) -> None:
    trace = prefill_trace() if whole else decode_trace([[[1]], [[0]]], [2])
    save_trace(tmp_path / "t.npz", trace)
    loaded = load_trace(tmp_path / "t.npz")
    for field in fields(Trace):
        assert same(getattr(trace, field.name), getattr(loaded, field.name)), field.name
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_half_precision_weights_stay_what_they_are(tmp_path: Path) -> None:
    trace = prefill_trace()
    half = replace(trace, weights=trace.weights.astype(np.float16))
    save_trace(tmp_path / "t.npz", half)
    assert load_trace(tmp_path / "t.npz").weights.dtype == np.float16


def altered(path: Path, **change: Any) -> Path:
    """The file with parts replaced; None takes one out."""
    with np.load(path, allow_pickle=False) as npz:
        arrays = {name: npz[name] for name in npz.files} | change
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"version": np.array(2)}, "is a trace of version 2, this moe-edge reads 1; record it again"),
    "no version": ({"version": None}, "it names no version"),
    "odd version": ({"version": np.array([1.5])}, "its version is not a number"),
    "missing part": ({"experts": None}, "the trace has no 'experts'; record it again"),
    "unknown part": ({"more": np.zeros(1)}, "has a part 'more' that no trace of version 1 has"),
    "wrong shape": ({"weights": np.zeros((5, 2, 2), np.float32)}, r"weights has shape \(5, 2, 2\)"),
    "wrong type": ({"n_levels": np.array(1.0)}, "n_levels is float64"),
    "no text": ({"model": np.array(3)}, "model is not a text"),
    "short counts": ({"recorded": np.zeros(3, np.int64)}, r"recorded is int64 of shape \(3,\)"),
    "no such unit": ({"recorded_resident": np.array([6], np.int32)}, "a unit that the model does not have"),
    "pickled": ({"model": np.array({"a": 1}, dtype=object)}, "allow_pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_a_trace_of_this_version_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.npz"
    save_trace(path, prefill_trace())
    change, sentence = REFUSED[name]
    with pytest.raises(BadFile, match=sentence) as e:
        load_trace(altered(path, **change))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_cut_file_a_foreign_one_and_a_missing_one_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_trace(path, prefill_trace())
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    with pytest.raises(CutFile, match="looks cut short"):
        load_trace(path)
    path.write_bytes(b"GGUF" + data)
    with pytest.raises(BadFile):
        load_trace(path)
    path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(BadFile, match="is not a trace"):
        load_trace(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a.txt", "hello")
    with pytest.raises(BadFile, match="is not a trace"):
        load_trace(path)
    with pytest.raises(MissingFile, match="no-such"):
        load_trace(tmp_path / "no-such.npz")


def test_damaged_bytes_never_come_out_as_anything_but_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    save_trace(path, prefill_trace())
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            load_trace(path)  # bytes that nobody reads may differ
        except BadFile:
            refused += 1
    assert refused > 200


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npz"
    save_trace(path, prefill_trace())
    before = path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="no room left"):
        save_trace(path, decode_trace([[[1]]], [2]))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    with pytest.raises(MissingFile, match="cannot be written"):
        save_trace(tmp_path / "no" / "t.npz", prefill_trace())


# ---- recording ---------------------------------------------------------------------------------------------


def test_a_recorded_trace_has_chunks_times_and_the_last_layers_last_token(tmp_path: Path) -> None:
    with open_engine(tiny_model_path(), "middle", n_ctx=24, n_ubatch=16, n_threads=1) as engine:
        trace = record_trace(engine, TEXT * 2, 40, one_by_one=False)
        assert engine.native.observe is None and engine.llama.n_tokens == 0
        layout, plan = engine.layout, engine.plan
    assert trace.batch_tokens.tolist() == [16, 8, 16] and trace.chunk_starts.tolist() == [0, 2]
    assert trace.step_tokens.tolist() == [[16, 16, 16, 1], [8, 8, 8, 1], [16, 16, 16, 1]]
    assert trace.layout() == layout and trace.fixed == plan.fixed and not trace.decode_only
    assert trace.compute_seconds is not None and (trace.compute_seconds > 0).all()
    assert trace.other_seconds is not None and (trace.other_seconds > 0).all()
    assert trace.attention is None and trace.ahead_experts is None
    save_trace(tmp_path / "t.npz", trace)
    assert load_trace(tmp_path / "t.npz").recorded == trace.recorded


def test_prefill_and_decode_of_one_text_route_alike() -> None:
    with open_engine(tiny_model_path(), "resident", n_ctx=64, n_ubatch=16, n_threads=1) as engine:
        one = record_trace(engine, TEXT, 24)
        many = record_trace(engine, TEXT, 24, one_by_one=False)
    assert one.decode_only and one.n_steps == 24 * 4
    agree = np.sort(one.experts[:, :3], -1) == np.sort(many.experts[:, :3], -1)
    assert agree.mean() > 0.95  # sums round differently, so a close call may fall the other way


def test_a_predictor_fills_the_look_ahead() -> None:
    def predict(layer: int, x: Any) -> tuple[Any, Any]:
        return np.full((len(x), 2, 3), layer), np.full((len(x), 2, 3), 0.5)

    with open_engine(tiny_model_path(), "resident", n_ctx=32, n_ubatch=16, n_threads=1) as engine:
        trace = record_trace(engine, list(range(1, 9)), predict=predict)
    assert trace.ahead_experts is not None and trace.ahead_experts.shape == (8, 4, 2, 3)
    assert (trace.ahead_experts == np.arange(4)[None, :, None, None]).all()


def test_a_text_shorter_than_asked_for_is_refused() -> None:
    with open_engine(tiny_model_path(), "resident", n_ctx=32, n_ubatch=16, n_threads=1) as engine:
        with pytest.raises(UsageError, match="the text has 3 tokens and 4 are to be traced; give a longer text"):
            record_trace(engine, [1, 2, 3], 4)
