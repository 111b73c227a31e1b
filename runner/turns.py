"""Who may use an engine, and when: one decode at a time, and a close that stops it and waits for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from moe_edge.models.errors import EngineError

CLOSED = "the engine is closed; load the model again"


class Turns:
    """The turn to decode. stop: makes a running decode end soon. free: gives everything back; called once."""

    def __init__(self, stop: Callable[[], None], free: Callable[[], None]) -> None:
        self._stop, self._free = stop, free
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._closing = self._freed = False

    def check_open(self) -> None:
        """Raises EngineError once close() was called."""
        if self._closing:
            raise EngineError(CLOSED)

    @contextlib.contextmanager
    def decoding(self, begin: Callable[[], None]) -> Iterator[None]:
        """Wait for the turn and have it. begin: called with it, before anything is decoded.

        Raises EngineError when the engine is closed, and when this thread has the turn already: a decode from within
        another one, as from a callback that is given text, would write into the same KV cache.
        """
        me = threading.get_ident()
        if self._owner == me:
            raise EngineError("the engine is decoding already, further up in this thread; wait for the reply to end")
        with self._turn:
            self.check_open()
            self._owner = me
            try:
                begin()
                if self._closing:  # meanwhile, so begin() may have taken back its stop()
                    self._stop()
                yield
            finally:
                self._owner = None
                if self._closing:
                    self._free_once()

    def close(self) -> None:
        """Stop what is decoding, wait for its end, and free. Again: nothing.

        From within a decode, as in a signal handler or a callback, it returns at once, and the decode frees.
        """
        if self._closing:
            return
        self._closing = True
        self._stop()
        if self._owner == threading.get_ident():
            return
        with self._turn:
            self._free_once()

    def _free_once(self) -> None:
        if not self._freed:
            self._freed = True
            self._free()
