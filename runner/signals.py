"""Ctrl-C and requests to end, made safe where C code runs.

Python runs a signal's handler between two of its own instructions. While llama.cpp runs, these are the instructions of
callbacks, through which no exception comes out: it would be printed and lost. `deferred` notes the signal meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handlers = dict[int, Any]

# Ways to say that the process should end: asked by someone else, or by the terminal that went away.
_END = ("SIGTERM", "SIGHUP")
REQUESTS_TO_END: tuple[int, ...] = tuple(getattr(signal, name) for name in _END if hasattr(signal, name))
LEAVING_AT = 3  # presses of Ctrl-C that end a clean-up which does not come to its end

_presses_while_leaving = 0


def on_interrupt(number: int, frame: FrameType | None) -> None:
    """The command line's Ctrl-C: as Python's own, but pressing again does not cut short the clean-up of the first."""
    global _presses_while_leaving
    if _would_be_lost(frame):
        _send_again(number)
        return
    if not _is_leaving():
        _presses_while_leaving = 0
        raise KeyboardInterrupt
    _presses_while_leaving += 1
    if _presses_while_leaving + 1 >= LEAVING_AT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def on_request_to_end(number: int, frame: FrameType | None) -> None:
    """The command line's SIGTERM and SIGHUP: files that are not finished are removed on the way out."""
    if _would_be_lost(frame):
        _send_again(number)
    elif not _is_leaving():
        raise SystemExit(128 + number)


def _would_be_lost(frame: FrameType | None) -> bool:
    """Whether what is raised now would be printed and forgotten: in a destructor, or as an import drops its lock."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or (code.co_name == "cb" and "importlib" in code.co_filename):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """Bring the signal once more, a moment later."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _is_leaving() -> bool:
    """Whether an interrupt or a request to end is being handled, that is, clean-up runs."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return True
        error = error.__context__
    return False


def install() -> None:
    """Use the two handlers above, except for signals that whoever started us wants ignored or handled otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, on_interrupt)
    for number in REQUESTS_TO_END:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, on_request_to_end)


def finish() -> None:
    """For the end of the process, when all is done: nothing is left to interrupt or to clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in REQUESTS_TO_END:
        if signal.getsignal(number) is on_request_to_end:
            signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)  # of _send_again


@contextlib.contextmanager
def deferred(stop: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Inside, signals whose handler raises are noted in the list and `stop` is called; at the end they are raised.

    The exception that the handler raises takes the place of the one that leaves the block, if any. Handlers that are
    not Python's own or the two above are left alone, and so is everything outside the main thread.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        stop()

    present = {number: signal.getsignal(number) for number in (signal.SIGINT, *REQUESTS_TO_END)}
    before: Handlers = {number: handler for number, handler in present.items() if handler in RAISING}
    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    except BaseException as error:
        _restore(before)
        _raise(noted, before, error)
        raise
    else:
        _restore(before)
        _raise(noted, before, None)


def _restore(before: Handlers) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _raise(noted: list[int], before: Handlers, cause: BaseException | None) -> None:
    """Let the handler of the gravest signal that was noted raise what it raises."""
    if not noted:
        return
    number = next((each for each in noted if each != signal.SIGINT), noted[0])
    try:
        before[number](number, None)
    except BaseException as raised:
        raise raised from cause


RAISING: tuple[object, ...] = (signal.default_int_handler, on_interrupt, on_request_to_end)
