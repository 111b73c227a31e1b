"""Threads while other programs use the processor: the rule, what it measures, and what it does to OpenMP."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest
from moe_edge.runner import neighbours
from moe_edge.runner.neighbours import CrowdWatch, SpinBreaker, busy_seconds, usable_cores
from moe_edge.schedulers.crowd import CrowdControl, ThreadSetting


def test_alone_on_the_machine_nothing_changes() -> None:
    control = CrowdControl(4, 4, may_drop=True)
    assert [control.update(others) for others in (0.0, 0.1, 0.2)] == [ThreadSetting(4, False)] * 3


@pytest.mark.parametrize(
    ("n_threads", "n_cores", "others", "threads"),
    [(2, 2, 0.7, 1), (2, 2, 1.0, 1), (2, 2, 2.0, 1), (4, 4, 1.0, 3), (4, 4, 2.4, 2), (4, 4, 4.0, 1), (8, 4, 0.0, 4)],
)
def test_threads_leave_the_cores_that_others_hold(n_threads: int, n_cores: int, others: float, threads: int) -> None:
    assert CrowdControl(n_threads, n_cores, may_drop=True).update(others) == ThreadSetting(threads, True)


def test_a_neighbour_on_a_core_that_is_not_needed_changes_nothing() -> None:
    assert CrowdControl(2, 4, may_drop=True).update(2.0) == ThreadSetting(2, False)


def test_while_experts_are_unpacked_waiting_threads_sleep_and_none_is_taken_away() -> None:
    control = CrowdControl(2, 2, may_drop=True)
    assert control.update(0.0, 0.05) == ThreadSetting(2, False)
    assert control.update(0.0, 0.5) == ThreadSetting(2, True)
    assert [control.update(0.0).sleep for _ in range(2)] == [True, False]
    assert control.update(1.0, 0.5) == ThreadSetting(1, True)


def test_where_fewer_threads_would_change_bits_they_only_sleep() -> None:
    assert CrowdControl(2, 2, may_drop=False).update(1.0) == ThreadSetting(2, True)


def test_the_threads_come_back_after_two_quiet_windows_in_a_row() -> None:
    control = CrowdControl(2, 2, may_drop=True)
    seen = [control.update(others).threads for others in (1.0, 0.0, 1.0, 0.0, 0.0, 0.0)]
    assert seen == [1, 1, 1, 1, 2, 2]


STAT = """cpu  100 0 100 9999 50 1 2 3 0 0
cpu0 {a} 10 20 5000 40 1 2 3 0 0
cpu1 200 0 0 4999 10 0 0 0 0 0
intr 1 2 3
"""


def write_stat(root: Path, user_ticks: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(STAT.format(a=user_ticks))


def test_busy_seconds_count_the_asked_for_cores_and_no_idle_time(tmp_path: Path) -> None:
    write_stat(tmp_path, 100)
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy_seconds({0}, tmp_path) == pytest.approx((100 + 10 + 20 + 1 + 2 + 3) / ticks)
    assert busy_seconds({0, 1}, tmp_path) == pytest.approx((136 + 200) / ticks)


@pytest.mark.parametrize("text", ["", "cpu 1 2\ncpu0 1 2\n", "intr 5\n"])
def test_a_kernel_that_does_not_tell_is_no_error(tmp_path: Path, text: str) -> None:
    assert busy_seconds({0}, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text(text)
    assert busy_seconds({0}, tmp_path) is None


def test_the_watch_measures_others_and_sets_threads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, own = [100.0], [5.0]
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    monkeypatch.setattr(neighbours.time, "process_time", lambda: own[0])  # type: ignore[attr-defined]
    ticks = os.sysconf("SC_CLK_TCK")
    write_stat(tmp_path, 0)
    set_to: list[int] = []
    watch = CrowdWatch(CrowdControl(2, 2, may_drop=True), {0, 1}, set_to.append, tmp_path)
    watch._breaker = SpinBreaker(0)
    monkeypatch.setattr(SpinBreaker, "_library", staticmethod(lambda: None))

    def after(seconds: float, busy: float, ours: float, state: list[float] = [0.0]) -> None:  # noqa: B006
        state[0] += busy
        now[0] += seconds
        own[0] += ours
        write_stat(tmp_path, round(state[0] * ticks))
        watch.look()

    after(0.5, busy=1.0, ours=1.0)  # both cores are ours
    assert set_to == []
    after(0.01, busy=0.02, ours=0.0)  # within a window nothing is measured
    after(0.5, busy=1.0, ours=0.6)  # another program took most of a core
    after(0.5, busy=1.0, ours=0.5)
    assert set_to == [1]
    after(60.0, busy=60.0, ours=0.0)  # the user was reading: a window that long says nothing of now
    assert set_to == [1]
    after(0.5, busy=0.5, ours=0.5)
    after(0.5, busy=0.5, ours=0.5)
    assert set_to == [1, 2]
    assert watch.setting == ThreadSetting(2, False)


def n_threads_now() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP's spinning is a matter of Linux")
def test_idle_threads_are_there_while_on_and_gone_after() -> None:
    import llama_cpp  # noqa: F401  (brings libgomp into the process)

    if SpinBreaker._library() is None:
        pytest.skip("this llama.cpp was built without GNU OpenMP")
    before = n_threads_now()
    breaker = SpinBreaker(2)
    for _ in range(3):
        breaker.set(True)
        breaker.set(True)
        deadline = time.monotonic() + 10
        while n_threads_now() < before + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert breaker.on and n_threads_now() == before + 3
        breaker.set(False)
        deadline = time.monotonic() + 10
        while n_threads_now() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not breaker.on and n_threads_now() == before
    assert threading.active_count() >= 1


def test_usable_cores_are_those_of_this_process() -> None:
    cores = usable_cores()
    assert cores and all(core >= 0 for core in cores)


def test_the_text_is_the_same_whatever_the_neighbours_do() -> None:
    """Threads change between and within tokens, as if neighbours came and went at every look."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.engine import Engine
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.runner.generate import Sampling, generate

    options = EngineOptions(n_threads=2, n_ctx=256)
    with Engine(tiny_model_path(), options) as engine:
        alone = generate(engine, "The king said", 40, Sampling(temp=0)).text
        engine.new_conversation()
        watch = engine._crowd
        assert watch is not None and engine.native.each_step == watch.look
        looks = 0

        def flicker() -> None:
            nonlocal looks
            looks += 1
            watch._apply(ThreadSetting(1 + looks // 3 % 2, looks // 7 % 2 == 0))

        engine.native.each_step = flicker
        assert generate(engine, "The king said", 40, Sampling(temp=0)).text == alone
        assert looks > 100
