"""What other programs take of the processor, and what is done about it; schedulers/crowd.py decides.

Linux only, where ggml's threads are GNU OpenMP's: they spin at barriers, and how long is fixed when the library is
loaded. But the library itself spins a thousandth as long while it manages more threads than there are cores. So to
make waiting threads sleep, a parallel region of idle threads is opened beside; to let them spin again, it is closed.
Elsewhere (macOS) ggml has a pool of its own, which yields by itself, and nothing here does anything.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_edge.schedulers.crowd import CrowdControl, ThreadSetting

WINDOW_SECONDS = 0.3  # thirty of the kernel's ticks of 10 ms
_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: /proc/stat, columns of a cpuN line


def busy_seconds(cores: set[int], root: Path = Path("/")) -> float | None:
    """Seconds that these cores were busy since the machine started; None where the kernel does not tell."""
    try:
        lines = (root / "proc/stat").read_text().splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    total = found = 0
    for line in lines:
        name, *fields = line.split()
        if not name.startswith("cpu"):
            break
        if name[3:].isdigit() and int(name[3:]) in cores and len(fields) > max(_BUSY_FIELDS):
            total += sum(int(fields[at]) for at in _BUSY_FIELDS)
            found += 1
    return total / ticks if found == len(cores) else None


class SpinBreaker:
    """While `on`, OpenMP's waiting threads sleep; see the head of this file. Does nothing without GNU OpenMP."""

    def __init__(self, n_cores: int) -> None:
        self._n_idle = n_cores + 1  # with the thread that decodes, always more than there are cores
        self._semaphore: Any = None

    @staticmethod
    def _library() -> Any:
        try:
            return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except (OSError, AttributeError):  # not in the process, or no such flag on this system
            return None

    @property
    def on(self) -> bool:
        return self._semaphore is not None

    def set(self, on: bool) -> None:
        """Start or end the idle threads; they cost some KiB of stack each."""
        if on and self._semaphore is None and (openmp := self._library()) is not None:
            libc = ctypes.CDLL(None)
            semaphore = ctypes.create_string_buffer(64)  # sem_t has 32 bytes
            libc.sem_init(semaphore, 0, 0)
            wait = ctypes.cast(libc.sem_wait, ctypes.c_void_p)
            threading.Thread(
                target=openmp.GOMP_parallel, args=(wait, semaphore, self._n_idle, 0), name="moe-edge idle", daemon=True
            ).start()
            self._semaphore = semaphore
        elif not on and self._semaphore is not None:
            libc = ctypes.CDLL(None)
            for _ in range(self._n_idle):
                libc.sem_post(self._semaphore)
            self._semaphore = None


class CrowdWatch:
    """Looks at the machine every WINDOW_SECONDS of decoding and sets the threads. Not for several threads at once.

    set_threads: called on the decoding thread, before the next graph. look() is cheap between two windows.
    unpacked: seconds that our readers have unpacked packed experts in all, summed over their threads.
    """

    def __init__(
        self,
        control: CrowdControl,
        cores: set[int],
        set_threads: Callable[[int], None],
        root: Path = Path("/"),
        unpacked: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._control, self._cores, self._set_threads, self._root = control, cores, set_threads, root
        self._read_unpacked, self._unpacked = unpacked, unpacked()
        self._breaker = SpinBreaker(len(cores))
        self._applied: ThreadSetting = control.setting
        self._at = self._next = time.monotonic()
        self._busy, self._own = busy_seconds(cores, root), time.process_time()

    @property
    def setting(self) -> ThreadSetting:
        """What is in force."""
        return self._applied

    def look(self) -> None:
        """Once a window: measure, decide, apply."""
        now = time.monotonic()
        if now < self._next or self._busy is None:
            return
        busy, own, unpacked = busy_seconds(self._cores, self._root), time.process_time(), self._read_unpacked()
        seconds = now - self._at
        # A window far longer than asked for spans an idle time of ours, whose load is no longer news.
        if busy is not None and WINDOW_SECONDS <= seconds < 20 * WINDOW_SECONDS:
            others = (busy - self._busy - (own - self._own)) / seconds
            unpacking = (unpacked - self._unpacked) / seconds
            self._apply(self._control.update(min(max(others, 0.0), float(len(self._cores))), unpacking))
        self._at, self._next, self._busy, self._own = now, now + WINDOW_SECONDS, busy, own
        self._unpacked = unpacked

    def _apply(self, setting: ThreadSetting) -> None:
        if setting == self._applied:
            return
        self._breaker.set(setting.sleep)
        if setting.threads != self._applied.threads:
            self._set_threads(setting.threads)
        self._applied = setting

    def close(self) -> None:
        """End the idle threads."""
        self._breaker.set(False)


def usable_cores() -> set[int]:
    """The cores this process may run on; all of them where the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))
