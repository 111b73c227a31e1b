"""The engine beside llama.cpp: failures are our own errors, the process survives, and counts are what they say."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.errors import BudgetTooSmall, EngineError, Stopped, UsageError, WrongLibrary
from moe_edge.runner.capi import check_abi
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions, attention_defaults, buffer_bytes
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.llama import log_megabytes
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.layout import Step, StepPlan
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits

TOKENS = list(range(60, 100))


def logits(engine: Engine) -> np.ndarray:
    with engine.decoding():
        return logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, TOKENS, 32)


def small(path: Path, budget: str = "middle", **more: object) -> Engine:
    return open_engine(path, budget, n_ctx=128, n_ubatch=32, n_threads=2, logits_all=True, **more)


def test_a_file_cut_while_it_runs_fails_the_decode_and_the_next_prompt_works(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    whole = tmp_path / "whole.gguf"
    shutil.copy(path, whole)
    want = stock_logits(path, TOKENS, 32, 2, n_ctx=128)
    with small(path, "floor") as engine:
        size = path.stat().st_size
        last = max(engine.model.pieces, key=lambda p: p.offset)
        os.truncate(path, last.offset + 100)
        with pytest.raises(EngineError) as e:
            logits(engine)
        sentence = str(e.value)
        assert str(path) in sentence and "_exps.weight' of expert" in sentence
        assert "needs bytes" in sentence and "cut short" in sentence
        with open(path, "r+b") as f, open(whole, "rb") as w:  # same inode: the engine keeps its descriptor
            w.seek(last.offset)
            f.seek(last.offset)
            f.write(w.read())
        assert path.stat().st_size == size
        assert np.array_equal(logits(engine), want)


def test_what_the_scheduler_raises_comes_out_of_the_decode_and_the_engine_goes_on(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("olmoe")
    with small(path) as engine:
        with monkeypatch.context() as m:
            m.setattr(engine.native, "schedule", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match="the scheduler failed: ZeroDivisionError"):
                logits(engine)
        assert np.array_equal(logits(engine), stock_logits(path, TOKENS, 32, 2, n_ctx=128))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda order, levels, victims: ([0] * len(order), levels, victims), "not a permutation"),
        (lambda order, levels, victims: (order, [7] * len(levels), victims), "not a permutation"),
        (lambda order, levels, victims: (order, levels, [[15]] * len(order)), "evict"),
        (lambda order, levels, victims: (order, levels, [[]] * len(order)), "exceeds the memory"),
    ],
)
def test_a_wrong_plan_is_refused_by_the_engine(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., object], says: str
) -> None:
    with small(random_model("olmoe"), "floor") as engine:
        with monkeypatch.context() as m:
            m.setattr(engine.native, "schedule", lambda *a: StepPlan(*spoil(*engine.policy.plan(*a))))  # type: ignore
            with pytest.raises(EngineError, match=says):
                logits(engine)
        assert np.isfinite(logits(engine)).all()


def test_stop_ends_a_long_prefill_and_the_engine_goes_on(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe", Shape(n_layer=6))
    with open_engine(path, "floor", n_ctx=2048, n_ubatch=8, n_threads=2) as engine:
        threading.Timer(0.05, engine.stop).start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            for _ in range(2000):
                generate(engine, list(range(30, 230)) * 9, 1, Sampling(temp=0))
                engine.llama.reset()
        assert time.monotonic() - started < 60
        assert generate(engine, "and so", 5, Sampling(temp=0)).generated_tokens > 0


def test_the_floor_runs_and_a_byte_less_is_refused_with_the_floor(random_model: Callable[[str], Path]) -> None:
    path = random_model("qwen3moe")
    floor = small(path, "floor")
    need = floor.plan.floor_bytes
    floor.close()
    options = EngineOptions(n_ctx=128, n_ubatch=32, n_threads=2, logits_all=True)
    from dataclasses import replace

    with pytest.raises(BudgetTooSmall) as e:
        Engine(path, replace(options, ram_bytes=need - 1))
    assert e.value.needed_bytes == need
    with Engine(path, replace(options, ram_bytes=need)) as engine:
        assert np.isfinite(logits(engine)).all()


def test_loading_reads_no_expert(random_model: Callable[[str], Path]) -> None:
    with small(random_model("olmoe")) as engine:
        assert engine.counters().bytes_read == 0


def test_with_everything_resident_each_expert_is_read_once_and_only_what_is_used(
    random_model: Callable[[str], Path],
) -> None:
    with small(random_model("olmoe"), "resident") as engine:
        logits(engine)
        first = engine.counters()
        assert first.loads <= len(engine.layout.unit_bytes)
        assert first.bytes_read <= sum(engine.layout.unit_bytes)
        logits(engine)
        again = engine.counters().since(first)
        assert (again.loads, again.bytes_read, again.evictions, again.stall_seconds) == (0, 0, 0, 0)
        assert again.hits == again.uses > 0


def test_the_scheduler_is_called_once_for_each_moe_layer_and_micro_batch(random_model: Callable[[str], Path]) -> None:
    calls: list[int] = []
    with small(random_model("olmoe"), "floor") as engine:
        def count(step: Step) -> StepPlan | None:
            calls.append(step.layer)
            return engine.policy.plan(step)

        engine.native.schedule = count
        logits(engine)  # 40 tokens in micro-batches of 32 and 8
    assert calls == [0, 1, 0, 1]


def test_the_policy_and_the_engine_agree_on_what_is_in_memory(random_model: Callable[[str], Path]) -> None:
    with small(random_model("granitemoe")) as engine:
        logits(engine)
        assert sorted(engine.policy.resident) == engine.native.resident_units()
        c = engine.counters()
        assert c.loads - c.evictions == len(engine.native.resident_units())
        assert c.peak_committed_bytes <= engine.plan.arena_bytes


def test_reading_through_the_page_cache_gives_the_same_bits(random_model: Callable[[str], Path]) -> None:
    path = random_model("olmoe")
    with small(path, "floor", direct_io=False) as engine:
        assert engine.counters().direct_files == 0
        assert np.array_equal(logits(engine), stock_logits(path, TOKENS, 32, 2, n_ctx=128))


def test_llama_cpps_log_still_tells_the_sizes_the_planner_needs(random_model: Callable[[str], Path]) -> None:
    with small(random_model("olmoe")) as engine:
        fixed = engine.plan.fixed
        # 2 layers x 128 cells, padded to 256 by llama.cpp, x K and V x 256 values x 2 bytes
        assert 2 * 128 * 2 * 256 * 2 <= fixed.kv_bytes <= 2 * 256 * 2 * 256 * 2 + 20000, fixed.kv_bytes
        assert fixed.compute_bytes > 0 and fixed.scratch_bytes > 0


def test_sizes_are_read_from_log_lines() -> None:
    log = "llama_kv_cache: size =    8.00 MiB (  2048 cells, 4 layers)\nx: CPU compute buffer size =  1.50 MiB\n"
    assert log_megabytes(log, "KV") == int(8.01 * (1 << 20))
    assert log_megabytes(log, "compute") == int(1.51 * (1 << 20))
    with pytest.raises(EngineError, match="did not say how much memory its output buffers take"):
        log_megabytes(log, "output")


def test_another_ggml_is_refused_with_the_version_that_works() -> None:
    check_abi(2, 368, 368, "0.25.3", "0.25.9")
    with pytest.raises(WrongLibrary, match=r"built for ggml 0\.25\.3.*ggml 0\.26\.0 is installed.*llama-cpp-python=="):
        check_abi(2, 368, 368, "0.25.3", "0.26.0")
    with pytest.raises(WrongLibrary, match="400 bytes a tensor"):
        check_abi(2, 368, 400, "0.25.3", "0.25.3")


def test_the_compute_buffer_has_room_for_one_row_of_logits_only(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe", Shape(n_vocab=8192))
    engine = open_engine(path, "resident", n_ctx=512, n_ubatch=512, n_threads=2)
    compute_bytes = engine.plan.fixed.compute_bytes
    engine.close()
    every = open_engine(path, "resident", n_ctx=512, n_ubatch=512, n_threads=2, logits_all=True)
    assert every.plan.fixed.compute_bytes - compute_bytes > 511 * 8192 * 4
    every.close()


def test_attention_defaults_depend_on_the_model_and_the_context_alone() -> None:
    qwen = buffer_bytes(2048, 8)
    assert attention_defaults(4096, 32, 17 << 30, qwen) == (True, 1024)  # Qwen3-30B-A3B
    assert attention_defaults(4096, 32, 60 << 30, qwen) == (True, 2048)
    assert attention_defaults(1500, 32, 60 << 30, qwen) == (True, 1024)  # no larger than the context
    assert attention_defaults(4096, 32, 5 << 30, qwen) == (True, 512)
    assert attention_defaults(2048, 4, 13 << 20, buffer_bytes(256, 4)) == (False, 128)  # the embedded model
    assert attention_defaults(256, 4, 1 << 30, qwen) == (False, 512)


def test_a_micro_batch_takes_what_its_buffers_are_said_to_take(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "qwen3moe", Shape(n_embd=512, n_used=8, n_expert=16, n_ctx=4096))
    sizes = [
        sizes_of(path, EngineOptions(n_ctx=4096, n_ubatch=n, flash_attn=True, n_threads=1)).plan.fixed.compute_bytes
        for n in (512, 1024)
    ]
    assert (sizes[1] - sizes[0]) / 512 == pytest.approx(buffer_bytes(512, 8), rel=0.25)


def test_keeping_only_the_llama_keeps_its_engine(random_model: Callable[[str], Path]) -> None:
    import gc

    llama = Engine(random_model("olmoe"), EngineOptions(ram_bytes=1 << 30, n_ctx=128, n_ubatch=32)).load()
    gc.collect()
    assert llama.create_completion("abc", max_tokens=3)["usage"]["completion_tokens"] > 0
    llama._moe_edge.close()


def test_a_broken_chat_template_is_one_sentence(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", "olmoe")
    data = path.read_bytes()
    at = data.index(b"{% for") if b"{% for" in data else data.index(b"{%- for")
    path.write_bytes(data[:at] + data[at:].replace(b"for", b"fox", 1))
    from moe_edge.runner.chat import Chat

    with Engine(path, EngineOptions(ram_bytes=1 << 30, n_ctx=128, n_threads=1)) as engine:
        with pytest.raises(UsageError, match="its chat template cannot be read"):
            Chat(engine)


def test_a_failed_turn_leaves_the_conversation_as_it_was(random_model: Callable[[str], Path]) -> None:
    import io

    from moe_edge.runner.chat import Chat

    with open_engine(random_model("olmoe"), "floor", n_ctx=256, n_ubatch=32) as engine:
        for template in (True, False):
            chat = Chat(engine, n_tokens=3, out=io.StringIO(), err=io.StringIO())
            if not template:
                chat.conversation.template = None
            chat.reply("hello")
            before = chat.conversation.saved()
            right, engine.native.schedule = engine.native.schedule, lambda *_: 1 / 0  # type: ignore
            with pytest.raises(EngineError):
                chat.reply("and again")
            engine.native.schedule = right
            assert chat.conversation.saved() == before
            assert chat.reply("and again") is not None
