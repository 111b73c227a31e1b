"""A worker: computes the layers that a client gives it. One port, one client at a time."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from moe_edge.models.errors import BudgetTooSmall, EngineError, MoeEdgeError, UsageError
from moe_edge.runner.capi import loaded_ggml_version
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.loading import Loading
from moe_edge.runner.memory import auto_budget_bytes
from moe_edge.runner.workers import guard
from moe_edge.runner.workers.part import content_id, expert_bytes_by_block, n_blocks
from moe_edge.runner.workers.wire import CONTROL, PROTOCOL, RPC, TOKEN_BYTES, Address, Lines, is_loopback
from moe_edge.runner.workers.worker_session import Session, session_options
from moe_edge.schedulers.options import PolicyOptions

LETTING_GO_SECONDS = 2.0  # how long one client waits for another, which may have gone: its session is being closed
SILENT_SECONDS = 30.0  # a client that says nothing for so long is gone; it says something every second


def versions() -> dict[str, Any]:
    """What must be the same on client and worker."""
    return {
        "protocol": PROTOCOL,
        "moe_edge": version("moe-edge"),
        "llama_cpp_python": version("llama-cpp-python"),
        "ggml": loaded_ggml_version(),
    }


@dataclass(frozen=True)
class _Peer:
    name: str
    since: float


class Worker:
    """Listens from start() on. options: ram_bytes None is `auto`. disk_bytes_per_second: to pace its disk.

    measure: MachineSpeeds as a dict, or why there are none; given whether to do without measuring. Raises UsageError
    for an address that others reach, unless `anywhere`; and what opening the model raises.
    """

    def __init__(
        self,
        path: str,
        options: EngineOptions,
        address: Address,
        *,
        anywhere: bool = False,
        measure: Callable[[bool], dict[str, float] | str] = lambda _: "this worker was not told how",
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        guard.rpc_library()
        if not anywhere and not is_loopback(address.host):
            raise UsageError(
                f"{address.host} can be reached from other machines, and a worker asks nobody for a password; listen "
                "on 127.0.0.1 and let clients come through ssh -L or WireGuard (docs/WORKERS.md), or say "
                "--listen-anywhere"
            )
        self._path, self._options, self._tell = path, options, tell
        self._loading = Loading(path, options)
        self._loading.prove()
        self._content_id = content_id(self._loading.model)
        ram = options.ram_bytes
        self.ram_bytes = auto_budget_bytes() if ram is None else ram
        self._measure = measure
        self._session: Session | None = None
        self._peer: _Peer | None = None
        self._token = b""
        self._lock = threading.Lock()  # of the session: who has it
        self._free = threading.Condition(self._lock)  # told when nobody has
        self._relays: dict[threading.Thread, socket.socket] = {}
        self._inner = 0
        self._server: socket.socket | None = None
        self._address = address
        self.ended = threading.Event()
        self.why_ended = ""

    # ---- the process

    def start(self) -> Address:
        """Begin to listen; the address, with the port that was chosen if it was 0. Raises UsageError."""
        try:
            family = socket.AF_INET6 if ":" in self._address.host else socket.AF_INET
            self._server = socket.create_server((self._address.host, self._address.port), family=family)
        except OSError as e:
            raise UsageError(f"cannot listen on {self._address}: {e.strerror or e}; try another --port") from e
        self._start_rpc()
        address = Address(self._address.host, int(self._server.getsockname()[1]))
        threading.Thread(target=self._accept, name="moe-edge-worker", daemon=True).start()
        return address

    def _start_rpc(self) -> None:
        """ggml's own server, on a port of the loopback address that the relay alone connects to."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._inner = int(free.getsockname()[1])

        def run() -> None:
            self._end(guard.run_board(self._inner, self._options.threads()))

        threading.Thread(target=run, name="moe-edge-rpc", daemon=True).start()

    def _end(self, why: str) -> None:
        self.why_ended = why
        self.ended.set()

    def stop(self) -> None:
        """Accept nobody any more, and let the client go."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
        self._close_session()
        self.ended.set()

    def _accept(self) -> None:
        assert self._server is not None
        while True:
            try:
                connection, peer = self._server.accept()
            except OSError:
                return
            name = f"{peer[0]}:{peer[1]}"
            threading.Thread(target=self._serve, args=(connection, name), daemon=True).start()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        with connection, contextlib.suppress(OSError):
            guard.prepared(connection)
            connection.settimeout(SILENT_SECONDS)
            kind = connection.recv(1)
            if kind == CONTROL:
                self._control(connection, peer)
            elif kind == RPC:
                self._relay(connection)
            elif kind:
                self._tell(f"{peer} does not speak moe-edge's protocol and was sent away")

    # ---- ggml's protocol

    def _relay(self, connection: socket.socket) -> None:
        token = b""
        while len(token) < TOKEN_BYTES:
            data = connection.recv(TOKEN_BYTES - len(token))
            if not data:
                return
            token += data
        with self._lock:
            if self._session is None or not secrets.compare_digest(token, self._token):
                return
            self._relays[threading.current_thread()] = connection
        try:
            with self._connected() as server:
                guard.prepared(connection)
                guard.relay_board(connection, server)
        finally:
            with self._lock:
                self._relays.pop(threading.current_thread(), None)

    def _connected(self) -> socket.socket:
        """To ggml's server, which may still be starting. Raises OSError."""
        for _ in range(100):
            try:
                return guard.prepared(socket.create_connection(("127.0.0.1", self._inner), timeout=5))
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise ConnectionRefusedError("ggml's RPC server does not answer")

    # ---- our own

    def _control(self, connection: socket.socket, peer: str) -> None:
        lines = Lines(connection)
        mine = False
        try:
            while True:
                asked = lines.receive()
                try:
                    answer = self._answer(lines, asked, peer, mine)
                except MoeEdgeError as e:
                    answer = {"error": str(e), "kind": type(e).__name__}
                    if isinstance(e, BudgetTooSmall):
                        answer["needed_bytes"] = e.needed_bytes
                except (KeyError, TypeError, ValueError, RuntimeError) as e:  # a question of another form than ours
                    answer = {"error": f"the question '{asked.get('op')}' could not be answered: {e!r}"}
                mine = mine or "token" in answer
                lines.send(answer)
        finally:
            if mine:
                self._close_session()

    def _answer(self, lines: Lines, asked: dict[str, Any], peer: str, mine: bool) -> dict[str, Any]:
        op = asked.get("op")
        if op == "hello":
            return self._hello()
        if op == "ping":
            return self._ping()
        if op == "take":  # so many bytes follow: how fast is the network?
            lines.swallow(max(0, min(int(asked.get("bytes", 0)), 64 << 20)))
            return {}
        if op == "speeds":
            return self._speeds(bool(asked.get("measured_only")))
        if op == "open":
            return self._open(asked, peer)
        if not mine or self._session is None:
            raise UsageError(f"'{op}' is only for a client that has opened a session")
        return self._of_session(self._session, str(op))

    def _of_session(self, session: Session, op: str) -> dict[str, Any]:
        if op == "ready":
            plan = session.ready()
            return {"arena_bytes": plan.arena_bytes, "floor_bytes": plan.floor_bytes, "buffer_bytes":
                    plan.fixed.dense_bytes, "fixed_bytes": plan.fixed.total_bytes, "resident_bytes":
                    plan.resident_bytes, "ram_bytes": plan.budget_bytes}  # fmt: skip
        if op == "denied":
            return {"denied": session.denied()}
        if op == "status":
            return session.status()
        if op == "failed":
            return {"why": session.take_error()}
        if op == "resident":
            return {"units": session.native.resident_units()}
        if op == "recency":
            return {"units": session.oldest_use_first()}
        if op in ("stop", "go"):
            session.set_stop(op == "stop")
            return {}
        if op == "new_conversation":
            if session.policy is not None:
                session.policy.new_conversation()
            return {}
        raise UsageError(f"unknown question '{op}'")

    def _hello(self) -> dict[str, Any]:
        model, peer = self._loading.model, self._peer
        blocks = n_blocks(model.architecture, self._loading.metadata)
        return {
            "versions": versions(), "content_id": self._content_id, "name": self._loading.name,
            "ram_bytes": self.ram_bytes, "threads": self._options.threads(), "n_blocks": blocks,
            "expert_bytes": expert_bytes_by_block(model, blocks), "in_use_by": peer.name if peer else None,
        }  # fmt: skip

    def _speeds(self, measured_only: bool) -> dict[str, Any]:
        """Of this board's disk and processor, measured once and kept. measured_only: not now, if it has not been."""
        with self._lock:
            if peer := self._stays():
                raise UsageError(f"is at work for {peer.name}, so its speeds cannot be measured now")
        found = self._measure(measured_only)
        return {"why_not": found} if isinstance(found, str) else {"speeds": found}

    def _stays(self) -> _Peer | None:
        """Who has the board and keeps it, asked under the lock; None when it is free, or was so soon."""
        self._free.wait_for(lambda: self._peer is None, LETTING_GO_SECONDS)
        return self._peer

    def _ping(self) -> dict[str, Any]:
        """progress changes as long as something is computed or read."""
        counts, session = guard.board_counts(), self._session
        steps = reads = 0
        if session is not None:
            with contextlib.suppress(EngineError):
                now = session.native.counters()
                steps, reads = now.steps, now.reads
        return {"progress": counts.graphs + steps + reads + counts.bytes_in}

    def _open(self, asked: dict[str, Any], peer: str) -> dict[str, Any]:
        with self._lock:
            if other := self._stays():
                raise UsageError(
                    f"is at work for {other.name} since {time.monotonic() - other.since:.0f} s; a board "
                    "serves one client at a time"
                )
            self._peer = _Peer(peer, time.monotonic())
        try:
            options = session_options(self._options, asked)
            begin, end = (int(each) for each in asked["layers"])
            policy = PolicyOptions(cache=str(asked["cache"]), lookahead=str(asked["lookahead"]))
            session = Session(self._path, options, self.ram_bytes, begin, end, policy)
        except BaseException:
            self._let_go()
            raise
        with self._lock:
            self._session, self._token = session, secrets.token_hex(TOKEN_BYTES // 2).encode()
        self._tell(f"layers {begin} to {end - 1} for {peer}")
        return {"token": self._token.decode()}

    def _let_go(self) -> _Peer | None:
        """The board is free; who had it."""
        with self._lock:
            peer, self._peer = self._peer, None
            self._free.notify_all()
        return peer

    def _close_session(self) -> None:
        with self._lock:
            session, self._session, self._token = self._session, None, b""
            for connection in self._relays.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            relays = list(self._relays)
        if session is None:
            return
        session.set_stop(True)
        for thread in relays:
            thread.join()
        session.close()
        peer = self._let_go()
        self._tell(f"{peer.name if peer else 'the client'} has gone")
