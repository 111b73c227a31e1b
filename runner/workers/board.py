"""One worker, as its client sees it: what it is, what it was given, how it is, and the guard before its RPC server.

A thread asks every second how it is. A board that does not answer, or that computes without getting on, is given up:
the guard then ends llama.cpp's calls, and whoever decodes gets one sentence that names the board.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

import moe_edge.models.errors as errors
from moe_edge.models.errors import BoardError, BudgetTooSmall, MoeEdgeError, UsageError
from moe_edge.runner.workers.guard import Guard, GuardCounts
from moe_edge.runner.workers.wire import CONTROL, RPC, Address, Lines

# Seconds; MOE_EDGE_WORKER_TIMEOUT sets the first. A board that computes may stand still for STILL times as long: a
# micro-batch of dense layers on a slow board takes a while.
TIMEOUT_VARIABLE = "MOE_EDGE_WORKER_TIMEOUT"
TIMEOUT, STILL, OPENING = 15.0, 8.0, 120.0
ASK_EVERY = 1.0
PROBE_BYTES = 4 << 20


def timeout_seconds() -> float:
    """How long a board may leave a question unanswered. Raises UsageError."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if not text:
        return TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise UsageError(f"{TIMEOUT_VARIABLE}={text} is no number of seconds from 0.1 to 3600")
    return seconds


@dataclass(frozen=True)
class Network:
    """Between client and board: seconds there and back, and bytes a second to it."""

    latency_seconds: float
    bytes_per_second: float


class Board:
    """Connected from the start. Raises BoardError when it cannot be reached."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.timeout = timeout_seconds()
        self.guard: Guard | None = None
        self.layers = range(0)
        self.taken: dict[str, Any] = {}  # what ready() said
        self.last_status: dict[str, Any] = {}
        self._token = b""
        self._failed = False
        self._why: str | None = None
        self._lock = threading.RLock()
        self._closed = threading.Event()
        try:
            self._lines = Lines(self._connect(CONTROL))
        except OSError as e:
            raise BoardError(
                f"board {address} cannot be reached ({e.strerror or e}); is `moe-edge worker` running there?"
            ) from e
        try:
            self.facts = self.ask("hello")
        except BaseException:
            self.close()
            raise

    def _connect(self, kind: bytes) -> socket.socket:
        connection = socket.create_connection((self.address.host, self.address.port), timeout=self.timeout)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(kind + (self._token if kind == RPC else b""))
        except OSError:
            connection.close()
            raise
        return connection

    # ---- questions

    def ask(self, op: str, *, within: float | None = None, data: bytes = b"", **more: Any) -> dict[str, Any]:
        """The answer. Raises BoardError, naming the board, when there is none; and what the board raised."""
        with self._lock:
            if self._why is not None:
                raise BoardError(self._why)
            try:
                self._lines.connection.settimeout(within or self.timeout)
                self._lines.send({"op": op, **more})
                if data:
                    self._lines.connection.sendall(data)
                answer = self._lines.receive()
            except TimeoutError as e:
                self._give_up(f"did not answer within {within or self.timeout:g} s")
                raise BoardError(self._why or "") from e
            except OSError as e:
                self._give_up(f"is gone: {e.strerror or e}")
                raise BoardError(self._why or "") from e
        if "error" in answer:
            raise self._raised(answer)
        return answer

    def _raised(self, answer: dict[str, Any]) -> MoeEdgeError:
        text = f"board {self.address}: {answer['error']}"
        kind = getattr(errors, str(answer.get("kind")), None)
        if kind is BudgetTooSmall:
            return BudgetTooSmall(text, int(answer.get("needed_bytes", 0)))
        return UsageError(text) if kind is not None and issubclass(kind, UsageError) else BoardError(text)

    def _give_up(self, why: str) -> None:
        if self._why is None:
            self._why = (
                f"board {self.address} {why}; when it is back, go on: the conversation is computed again from its start"
            )
        if self.guard is not None:
            self.guard.lose()

    def check(self, content_id: str, versions: dict[str, Any]) -> None:
        """Raises BoardError when the board has another model, or another version of what computes it."""
        theirs = self.facts.get("versions")
        theirs = theirs if isinstance(theirs, dict) else {}
        for name, ours in versions.items():
            if theirs.get(name) != ours:
                raise BoardError(
                    f"board {self.address} has {name} {theirs.get(name)} and this machine {ours}; install the same on "
                    "both"
                )
        if self.facts.get("content_id") != content_id:
            raise BoardError(
                f"board {self.address} has another model: its {self.facts.get('name')} is "
                f"{str(self.facts.get('content_id'))[:12]}, ours is {content_id[:12]}; copy the same files to it"
            )

    def probe(self) -> Network:
        """Measure the network by itself. Raises BoardError."""
        seconds = []
        for _ in range(8):
            begun = time.perf_counter()
            self.ask("ping")
            seconds.append(time.perf_counter() - begun)
        latency = statistics.median(seconds)
        begun = time.perf_counter()
        self.ask("take", data=bytes(PROBE_BYTES), bytes=PROBE_BYTES)
        return Network(latency, PROBE_BYTES / max(1e-9, time.perf_counter() - begun - latency))

    # ---- a session

    def open(self, layers: range, **asked: Any) -> None:
        """Give it these layers. Raises what the board raises: BudgetTooSmall, UsageError; BoardError."""
        answer = self.ask("open", within=max(OPENING, self.timeout), layers=[layers.start, layers.stop], **asked)
        self.layers = layers
        self._token = str(answer["token"]).encode()
        self.guard = Guard(lambda: self._connect(RPC))
        threading.Thread(target=self._watch, name=f"moe-edge-watch-{self.address}", daemon=True).start()

    def ready(self) -> None:
        """llama.cpp has everything there: the rest is for experts. Raises BudgetTooSmall, BoardError."""
        self.taken = self.ask("ready", within=max(OPENING, self.timeout))

    def _watch(self) -> None:
        progress, changed = -1, time.monotonic()
        while not self._closed.wait(min(ASK_EVERY, self.timeout / 3)):
            try:
                now = int(self.ask("ping")["progress"])
            except MoeEdgeError:
                return
            busy = self.guard is not None and self.guard.is_waiting
            if now != progress or not busy:
                progress, changed = now, time.monotonic()
            elif time.monotonic() - changed > STILL * self.timeout:
                self._give_up(f"has not got on for {STILL * self.timeout:g} s")
                return

    @property
    def why_lost(self) -> str | None:
        """The sentence about a board that is lost; None while all is well."""
        if self._why is None and self.guard is not None and self.guard.is_lost:
            with self._lock:
                self._give_up("closed the connection that its layers are computed over")
        return self._why

    def has_failed(self) -> bool:
        """Whether what it computed last is of no use: it is lost, or a graph failed, which take_failure() explains."""
        if self.guard is not None and self.guard.take_failed():
            self._failed = True
        return self._failed or self.why_lost is not None

    def take_failure(self) -> str | None:
        """Why a graph failed, once; None when none did. Raises BoardError."""
        if not self._failed:
            return None
        self._failed = False
        return str(self.ask("failed")["why"])

    def status(self) -> dict[str, Any]:
        """Counters of the board, see Session.status(); the last ones known when it is lost."""
        with contextlib.suppress(MoeEdgeError):  # it is lost, or has no session yet
            self.last_status = self.ask("status")
        return self.last_status

    def traffic(self) -> GuardCounts:
        return self.guard.counts() if self.guard is not None else GuardCounts()

    def let_go(self) -> None:
        """End the session. llama.cpp may still free what it had there: the guard answers."""
        self._closed.set()
        if self.guard is not None:
            self.guard.lose()
        # A shutdown wakes a question under way, which would hold the lock up to its time-out.
        with contextlib.suppress(OSError):
            self._lines.connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._why = self._why or f"board {self.address} was let go"
            self._lines.connection.close()

    def close(self) -> None:
        """After llama.cpp has freed what it had there."""
        self.let_go()
        if self.guard is not None:
            self.guard.close()
