"""The queue before the one engine: first come, first served, and each reply runs to its end.

Requests are never mixed: measured, taking turns by token costs more expert reads than sharing a step saves
(docs/SERVER.md). One thread calls work() and is the only one that decodes; any thread may submit and cancel.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moe_edge.models.errors import MoeEdgeError, Stopped
from moe_edge.runner.protocol import End, Event, Prepared, ServedModel, Usage
from moe_edge.runner.serve.faults import full_error, leaving_error, loading_error

LONGEST_RETRY = 60  # seconds that a client is told to wait
FIRST_GUESS = 5.0  # seconds that a reply takes, before one has been seen


@dataclass(eq=False)
class Job:
    """One reply that was asked for. deliver: called with its events, and at last with an End or what was raised.

    It is called by the thread that works, and must neither block nor raise.
    """

    prepared: Prepared
    deliver: Callable[[Event | BaseException], None]
    queued: float = field(default_factory=time.monotonic)
    cancelled: bool = False


class Service:
    """limit: how many requests may wait while one is answered. on_end: called with the End of every reply, also of
    those whose client has left."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.on_end: Callable[[End], None] = lambda end: None
        self._model: ServedModel | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._closing = False
        self._seconds_each = FIRST_GUESS

    # ---- for the threads that ask

    @property
    def model(self) -> ServedModel:
        """Raises ApiError 503 while it is loaded, and when the server ends."""
        if self._closing:
            raise leaving_error()
        if self._model is None:
            raise loading_error()
        return self._model

    @property
    def loaded(self) -> ServedModel | None:
        """The model, when it can be asked; None while it is loaded, and when the server ends."""
        return None if self._closing else self._model

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return int(self._current is not None)

    def submit(self, prepared: Prepared, deliver: Callable[[Event | BaseException], None]) -> Job:
        """Queue a reply. Raises ApiError: 429 when the queue is full, 503 when the server ends."""
        with self._changed:
            if self._closing:
                raise leaving_error()
            ahead = len(self._waiting) + self.n_running
            if ahead > self.limit:
                raise full_error(self.limit, max(1, min(LONGEST_RETRY, round(self._seconds_each))))
            job = Job(prepared, deliver)
            self._waiting.append(job)
            self._changed.notify_all()
            return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for this reply any more: forget it, or stop it within a micro-batch. Again: nothing."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            elif job is self._current and self._model is not None:
                self._model.stop()

    # ---- for the one that owns the engine

    def ready(self, model: ServedModel) -> None:
        """The model is loaded; requests may come."""
        with self._changed:
            self._model = model

    def work(self) -> None:
        """Answer requests until close(). The caller is the thread that decodes."""
        while (job := self._next()) is not None:
            try:
                self._answer(job)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._changed.wait(1.0)  # not for ever: Python sees a signal only when this thread wakes
            self._current = self._waiting.popleft()
            return self._current

    def _answer(self, job: Job) -> None:
        assert self._model is not None
        started = time.monotonic()
        waited = started - job.queued
        try:
            end = self._model.run(job.prepared, job.deliver, lambda: job.cancelled)
        except Stopped:
            end = End("cancelled", Usage(len(job.prepared.tokens)))
        except MoeEdgeError as e:
            job.deliver(e)
            return
        except Exception as e:  # a fault of ours must not end the server
            traceback.print_exc(file=sys.stderr)
            job.deliver(e)
            return
        if not job.cancelled:
            self._seconds_each += 0.3 * (time.monotonic() - started - self._seconds_each)
        end = replace(end, usage=replace(end.usage, queue_seconds=waited))
        self.on_end(end)
        job.deliver(end)

    # ---- the end

    def close(self) -> None:
        """Take no more requests, and tell those that wait. The one that runs goes on; work() returns after it."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            told, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in told:
            job.deliver(leaving_error())

    def end_current(self) -> None:
        """Stop the reply that runs; what has been said of it is its end."""
        job = self._current
        if job is not None:
            self.cancel(job)

    def wait_idle(self, seconds: float) -> bool:
        """Whether nothing runs any more within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._current is None, seconds)
