"""Engines come and go: several in one process, closed while they decode, used after they are closed."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import EngineError, Stopped
from moe_edge.runner import llama as door
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.kv.prefix import keep_evaluated
from moe_edge.runner.kv.rollback import Checkpoints
from moe_edge.runner.turns import Turns
from moe_edge.schedulers.options import PolicyOptions

GREEDY = Sampling(temp=0)
PROMPT = "In the beginning God created the heaven and the earth"


def tiny(**options: Any) -> Engine:
    return open_engine(tiny_model_path(), "middle", **{"n_ctx": 256, "n_ubatch": 16, "n_threads": 1, **options})


@pytest.fixture
def closed() -> Engine:
    engine = tiny()
    engine.load()
    generate(engine, PROMPT, 3, GREEDY)
    engine.close()
    return engine


# ---- after close


USES: dict[str, Callable[[Engine], Any]] = {
    "load": lambda e: e.load(),
    "stop": lambda e: e.stop(),
    "set_policy": lambda e: e.set_policy(PolicyOptions()),
    "new_conversation": lambda e: e.new_conversation(),
    "decoding": lambda e: e.decoding().__enter__(),
    "native.counters": lambda e: e.native.counters(),
    "native.some_counters": lambda e: e.native.some_counters("uses"),
    "native.take_error": lambda e: e.native.take_error(),
    "native.resident_units": lambda e: e.native.resident_units(),
    "native.unit_bytes": lambda e: e.native.unit_bytes(),
    "native.packed_sizes": lambda e: e.native.packed_sizes(),
    "native.held_parts": lambda e: e.native.held_parts(),
    "native.drop_empty_parts": lambda e: e.native.drop_empty_parts(),
    "native.preload": lambda e: e.native.preload([0]),
    "native.set_arena": lambda e: e.native.set_arena(1 << 20),
    "native.pace": lambda e: e.native.pace(0),
    "native.set_stop": lambda e: e.native.set_stop(True),
    "native.arm": lambda e: e.native.arm(),
    "native.disarm": lambda e: e.native.disarm(),
    "native.unbind": lambda e: e.native.unbind(),
    "native.bound_tensors": lambda e: e.native.bound_tensors,
    "native.known_routers": lambda e: e.native.known_routers,
    "native.early_routers": lambda e: e.native.early_routers,
    "native.scratch_bytes": lambda e: e.native.scratch_bytes(8, 2, 1),
    "native.set_lookahead": lambda e: e.native.set_lookahead(1, 4),
    "native.watch_attention": lambda e: e.native.watch_attention(),
    "native.set_selecting": lambda e: e.native.set_selecting(True),
    "native.why_not_selecting": lambda e: e.native.why_not_selecting(),
    "native.gating": lambda e: e.native.gating(0),
    "native.set_renormalise": lambda e: e.native.set_renormalise(True),
    "native.set_noise": lambda e: e.native.set_noise(0, 0.1, 1),
}


@pytest.mark.parametrize("name", USES)
def test_a_closed_engine_says_so(closed: Engine, name: str) -> None:
    with pytest.raises(EngineError, match="the engine is closed; load the model again"):
        USES[name](closed)


def test_every_call_into_the_library_is_among_those() -> None:
    """A method of NativeModel that is added must be added to the uses above."""
    from moe_edge.runner.native import NativeModel

    inner = {"close", "attention", "ask_ahead"}
    public = {name for name in vars(NativeModel) if not name.startswith("_")} - inner
    assert public <= {name.removeprefix("native.") for name in USES}


def test_counts_stay_and_closing_again_is_nothing(closed: Engine) -> None:
    assert closed.counters().uses > 0
    closed.close()
    closed.close()
    assert closed.llama is None


# ---- closed while it decodes


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.002)


def test_close_stops_a_decode_in_another_thread_and_waits_for_it() -> None:
    engine = tiny()
    engine.load()
    seen: list[BaseException | str] = []

    def decode() -> None:
        try:
            while True:
                seen.append(generate(engine, PROMPT, 200, GREEDY, ignore_end=True).finish_reason)
        except BaseException as e:
            seen.append(e)

    thread = threading.Thread(target=decode)
    thread.start()
    wait_for(lambda: engine.counters().steps > 20)
    engine.close()
    assert engine.native._handle is None
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(seen[-1], EngineError | Stopped), seen


def test_close_from_within_a_decode_stops_it_and_frees_behind_it() -> None:
    engine = tiny()
    engine.load()
    with pytest.raises((EngineError, Stopped)):
        result = generate(engine, PROMPT, 50, GREEDY, ignore_end=True, on_text=lambda text: engine.close())
        assert result.finish_reason == "stopped"
        generate(engine, PROMPT, 5, GREEDY)
    assert engine.native._handle is None and engine.llama is None


def test_no_other_thread_can_read_counts_while_the_model_is_freed() -> None:
    engine = tiny()
    engine.load()
    native = engine.native
    real, could_read = native._lib, []

    class Library:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def me_model_close(self, handle: int) -> None:
            other = threading.Thread(target=lambda: could_read.append(native._use.acquire(blocking=False)))
            other.start()
            other.join(30)
            real.me_model_close(handle)

    native._lib = Library()
    engine.close()
    assert could_read == [False] and native._handle is None


def test_a_decode_within_a_decode_is_refused_and_the_outer_one_goes_on() -> None:
    with tiny() as engine:
        alone = generate(engine, PROMPT, 10, GREEDY).text
        refused: list[str] = []

        def nested(_text: str) -> None:
            try:
                generate(engine, "another", 2, GREEDY)
            except EngineError as e:
                refused.append(str(e))

        engine.new_conversation()
        assert generate(engine, PROMPT, 10, GREEDY, on_text=nested).text == alone
        assert refused and "decoding already" in refused[0]


def test_two_threads_take_turns() -> None:
    with tiny() as engine:
        alone = generate(engine, PROMPT, 12, GREEDY).text
        engine.new_conversation()
        texts: list[str] = []

        def one() -> None:
            for _ in range(3):
                texts.append(generate(engine, PROMPT, 12, GREEDY).text)

        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert texts == [alone] * 9


def test_a_stop_that_came_while_the_turn_was_taken_is_not_lost() -> None:
    stops: list[int] = []
    turns = Turns(lambda: stops.append(1), lambda: None)

    def begin() -> None:  # close() comes between the check and the clearing of an old stop
        turns._closing = True

    with turns.decoding(begin):
        assert stops == [1]


# ---- what a stopped prefill leaves


def test_micro_batches_before_a_stop_are_not_computed_again() -> None:
    with tiny(n_ubatch=16) as engine:
        tokens = [(7 * i) % 250 + 5 for i in range(100)]
        fresh = generate(engine, tokens, 8, GREEDY, ignore_end=True).text
        engine.new_conversation()
        plan, steps = engine.native.schedule, 0
        assert plan is not None
        n_layers = len(engine.model.layers)

        def stopping(step: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 3 * n_layers + 2:  # in the fourth micro-batch
                engine.stop()
            return plan(step)

        engine.native.schedule = stopping
        with pytest.raises(Stopped):
            generate(engine, tokens, 8, GREEDY)
        engine.native.schedule = plan
        assert engine.llama.n_tokens == 48
        again = generate(engine, tokens, 8, GREEDY, ignore_end=True)
        assert (again.reused_tokens, again.text) == (48, fresh)


def test_where_memory_cannot_forget_a_part_all_of_it_goes() -> None:
    class Hybrid:
        n_tokens = 5
        cleared = 0
        _requires_eval = False

        class _ctx:
            @staticmethod
            def kv_cache_seq_rm(*_: int) -> bool:
                return False

            @staticmethod
            def kv_cache_clear() -> None:
                Hybrid.cleared += 1

        _is_recurrent = _is_hybrid = True

        def reset(self) -> None:
            self.n_tokens = 0

    llama = Hybrid()
    keep_evaluated(llama, Checkpoints(llama))
    assert (llama.n_tokens, Hybrid.cleared, llama._requires_eval) == (0, 1, True)


# ---- several at once


@pytest.mark.parametrize("n_engines", [2, 3])
def test_engines_in_one_process_do_not_take_each_others_logs_or_words(n_engines: int) -> None:
    path, seconds = tiny_model_path(), 4.0
    with tiny() as alone:
        text = generate(alone, PROMPT, 12, GREEDY).text
        plan = alone.plan
    engines = [tiny() for _ in range(n_engines - 1)]
    failed: list[BaseException] = []
    until = time.monotonic() + seconds
    n_texts = 0

    def decode(engine: Engine) -> None:
        nonlocal n_texts
        try:
            engine.load()
            while time.monotonic() < until:
                engine.new_conversation()
                assert generate(engine, PROMPT, 12, GREEDY).text == text
                n_texts += 1
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=decode, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    n_opened = 0
    try:
        while time.monotonic() < until and not failed:
            other = Engine(path, EngineOptions(ram_bytes=plan.budget_bytes, n_ctx=256, n_ubatch=16, n_threads=1))
            assert other.plan == plan
            if n_opened % 3 == 0:
                other.load()
                assert generate(other, PROMPT, 12, GREEDY).text == text
            other.close()
            n_opened += 1
    finally:
        for thread in threads:
            thread.join(60)
        for engine in engines:
            engine.close()
    assert not failed, failed
    assert n_opened >= 2 and n_texts >= n_engines


def test_a_size_that_the_log_does_not_name_is_an_error_and_never_zero() -> None:
    log = "llama_kv_cache: size = 8.00 MiB ( 256 cells\n CPU compute buffer size = 1.50 MiB\n"
    assert door.log_megabytes(log, "KV") >= 8 << 20
    assert door.log_megabytes(log, "compute") >= 1 << 20
    with pytest.raises(EngineError, match="did not say how much memory its output buffers take"):
        door.log_megabytes(log, "output")
    with pytest.raises(EngineError, match="KV"):
        door.log_megabytes("", "KV")


def test_lines_go_to_the_thread_that_they_came_from() -> None:
    door._install()
    callback = door._callback
    got: dict[str, list[str]] = {}
    both = threading.Barrier(2)

    def listen(name: str) -> None:
        with door.captured_log() as lines:
            both.wait(10)
            for i in range(50):
                callback(2, f"{name} {i}\n".encode(), None)
            with door.captured_log() as inner:
                callback(2, b"inner", None)
            assert inner == ["inner"]
            both.wait(10)
        got[name] = lines

    threads = [threading.Thread(target=listen, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {name: [f"{name} {i}\n" for i in range(50)] for name in "ab"}
    assert door._callback is callback and not door._captures


def test_the_log_is_taken_again_from_whoever_took_it_and_theirs_goes_to_them() -> None:
    heard: list[bytes] = []
    with tiny():
        pass
    other = llama_cpp.llama_log_callback(lambda _level, text, _user: heard.append(text))
    before = door._theirs
    llama_cpp.llama_log_set(other, ctypes.c_void_p(0))
    try:
        with tiny():  # which asks llama.cpp's log for the sizes of its buffers
            pass
        door._callback(2, b"nobody of ours\n", None)
        assert heard[-1] == b"nobody of ours\n"
    finally:
        door._theirs = before


# ---- small things


def test_a_result_names_the_knobs_it_was_made_with() -> None:
    with tiny() as engine:
        engine.set_policy(PolicyOptions("dymoe", retention=0.5, low_level="skip"))
        result = generate(engine, PROMPT, 2, GREEDY).to_json(engine)
        assert result["policy"] == "dymoe" and result["policy_options"]["retention"] == 0.5


def test_an_engine_that_nobody_closed_is_no_crash(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "from moe_edge.models.embedded import tiny_model_path\n"
        "from moe_edge.runner.engine import Engine; from moe_edge.runner.engine_options import EngineOptions\n"
        "import gc\n"
        "for _ in range(2):\n"
        "    e = Engine(tiny_model_path(), EngineOptions(n_threads=1, n_ctx=64)); e.load(); del e; gc.collect()\n"
        "e = Engine(tiny_model_path(), EngineOptions(n_threads=1, n_ctx=64)); e.load()\n"
        "print('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
