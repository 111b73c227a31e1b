"""A bar with the time that is left, on a terminal; a line every ten percent elsewhere."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def shown_progress(total: int, tell: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes that have come, by any thread."""
    lock, done, told = threading.Lock(), 0, 0
    if sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, leave=False) as bar:

            def advance(n: int) -> None:
                with lock:
                    bar.update(n)

            yield advance
        return

    def report(n: int) -> None:
        nonlocal done, told
        with lock:
            done += n
            tenth = 10 * done // max(1, total)
            if tenth > told:
                told = tenth
                tell(f"{10 * tenth} % of {total / 1e9:.2f} GB")

    yield report
