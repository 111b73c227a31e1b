"""One connection, with patience that ends: uvicorn's own protocol waits for ever for a client that is slow.

A request's headers must come within HEADER_SECONDS, and a client that takes nothing of an answer for WRITE_SECONDS is
cut off. A body has its own limits, see body.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0
WRITE_SECONDS = 60.0


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with deadlines."""

    header_seconds = HEADER_SECONDS
    write_seconds = WRITE_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadlines: dict[str, asyncio.TimerHandle] = {}

    def _expect(self, what: str, seconds: float) -> None:
        """Cut the connection off unless it comes in time."""
        if what not in self._deadlines:
            self._deadlines[what] = self.loop.call_later(seconds, self._cut_off)

    def _came(self, what: str) -> None:
        if (timer := self._deadlines.pop(what, None)) is not None:
            timer.cancel()

    def _cut_off(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect("headers", self.header_seconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect("headers", self.header_seconds)
        else:
            self._came("headers")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("reading", self.write_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._came("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        for what in list(self._deadlines):
            self._came(what)
        super().connection_lost(exc)
