"""What the hardware allows: bytes a second from the disk by direct reads, and from memory."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BLOCK_BYTES = 1 << 20
N_READERS = 4
MEMORY_BYTES = 256 << 20  # for each thread: far above any cache


def disk_bytes_per_second(path: Path, seconds: float = 2.0) -> float | None:
    """Direct reads of 1 MiB blocks of the file in random order, 4 at a time; None where O_DIRECT does not work."""
    n_blocks = path.stat().st_size // BLOCK_BYTES
    flag = getattr(os, "O_DIRECT", 0)
    if n_blocks == 0 or not flag:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None
    try:
        return _read_blocks(fd, n_blocks, seconds)
    finally:
        os.close(fd)


def _read_blocks(fd: int, n_blocks: int, seconds: float) -> float | None:
    started = time.perf_counter()
    deadline = started + seconds
    order = list(range(n_blocks))
    random.Random(0).shuffle(order)
    done = [0] * N_READERS

    def read(number: int) -> None:
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:  # aligned to a page, as direct reads need it
            at = number
            while time.perf_counter() < deadline:
                try:
                    done[number] += os.preadv(fd, [buffer], order[at % n_blocks] * BLOCK_BYTES)
                except OSError:  # the file system refuses direct reads only now
                    return
                at += N_READERS

    _run_together([lambda n=n: read(n) for n in range(N_READERS)])  # type: ignore[misc]
    return sum(done) / (time.perf_counter() - started) or None


def memory_bytes_per_second(n_threads: int, repeats: int = 3) -> float:
    """Reading 256 MiB with each thread: numpy's sum of integers, the best of several runs."""
    import numpy as np

    arrays = [np.ones(MEMORY_BYTES // 8, np.int64) for _ in range(n_threads)]
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        _run_together([array.sum for array in arrays])
        best = max(best, n_threads * MEMORY_BYTES / (time.perf_counter() - started))
    return best


def _run_together(jobs: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
