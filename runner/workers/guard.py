"""The native side of several boards, by ctypes: native/capi_boards.h."""

from __future__ import annotations

import ctypes
import socket
import sys
import threading
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from moe_edge.models.errors import EngineError, WrongLibrary
from moe_edge.runner.capi import ERROR_BYTES, library
from moe_edge.runner.native import NativeModel, ThreadPool

HOW_TO_BUILD = (
    'CMAKE_ARGS="-DGGML_RPC=ON" pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python==0.3.36'
)

SO_NOSIGPIPE = 0x1022  # macOS, sys/socket.h; Python does not name it


class _BoardNumbers(Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "buffer_bytes", "peak_buffer_bytes", "denied_bytes", "graphs", "new_graphs", "compute_ns", "bytes_in",
            "bytes_out",
        )
    ]  # fmt: skip


class _GuardNumbers(Structure):
    _fields_ = [
        (name, c_int64)
        for name in ("bytes_sent", "bytes_received", "commands", "graphs", "new_graphs", "stub_bytes", "wait_ns")
    ]


@dataclass(frozen=True)
class GuardCounts:
    """What went over one board's connection. stub_bytes: of expert tensors, which are stubs; part of bytes_sent.

    graphs: those that were computed; new_graphs: those of them that were sent, the others being the one before again.
    wait_seconds: for the board's answers, its computing included.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    commands: int = 0
    graphs: int = 0
    new_graphs: int = 0
    stub_bytes: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class BoardCounts:
    """buffer_bytes: what the client has on the board now; denied_bytes: the last request that did not fit."""

    buffer_bytes: int = 0
    peak_buffer_bytes: int = 0
    denied_bytes: int = 0
    graphs: int = 0
    new_graphs: int = 0
    compute_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


def since(now: BoardCounts, earlier: BoardCounts) -> BoardCounts:
    """What was counted between two looks; the buffers as they are now."""
    return replace(
        now, graphs=now.graphs - earlier.graphs, new_graphs=now.new_graphs - earlier.new_graphs,
        compute_seconds=now.compute_seconds - earlier.compute_seconds, bytes_in=now.bytes_in - earlier.bytes_in,
        bytes_out=now.bytes_out - earlier.bytes_out,
    )  # fmt: skip


@lru_cache(maxsize=1)
def rpc_library() -> Any:
    """The native library, with the functions of this file. Raises WrongLibrary when llama.cpp lacks the RPC backend."""
    lib = library()
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "me_rpc_is_built": (c_int32, []),
        "me_board_run": (c_int32, [c_char_p, c_int32, c_void_p, c_char_p]),
        "me_board_use": (None, [c_void_p]),
        "me_board_limit": (None, [c_int64]),
        "me_board_counts": (None, [POINTER(_BoardNumbers)]),
        "me_board_relay": (None, [c_int32, c_int32]),
        "me_guard_new": (c_void_p, []),
        "me_guard_free": (None, [c_void_p]),
        "me_guard_relay": (None, [c_void_p, c_int32, c_int32]),
        "me_guard_counts": (None, [c_void_p, POINTER(_GuardNumbers)]),
        "me_guard_is_lost": (c_int32, [c_void_p]),
        "me_guard_is_waiting": (c_int32, [c_void_p]),
        "me_guard_lose": (None, [c_void_p]),
        "me_guard_take_failed": (c_int32, [c_void_p]),
        "me_rpc_device": (c_void_p, [c_char_p]),
        "me_cpu_buffer_type": (c_void_p, []),
    }
    for name, (restype, argtypes) in signatures.items():
        f = getattr(lib, name)
        f.restype, f.argtypes = restype, argtypes
    check_rpc(bool(lib.me_rpc_is_built()))
    return lib


def check_rpc(is_built: bool) -> None:
    """Raises WrongLibrary, with the command that helps, when llama.cpp has no RPC backend."""
    if not is_built:
        raise WrongLibrary(
            "the installed llama-cpp-python was built without llama.cpp's RPC backend, which several boards need; "
            f"build it again with it: {HOW_TO_BUILD}"
        )


def run_board(port: int, n_threads: int) -> str:
    """Run ggml's RPC server on the loopback address; returns only when it ended, with a sentence why."""
    lib = rpc_library()
    pool = lib.me_threadpool_new(n_threads) if ThreadPool.is_needed() and n_threads > 1 else None
    error = ctypes.create_string_buffer(ERROR_BYTES)
    lib.me_board_run(f"127.0.0.1:{port}".encode(), n_threads, pool, error)
    return error.value.decode(errors="replace")


def use_experts(native: NativeModel | None) -> None:
    """Compute expert products of graphs with this model from now on; waits for a graph under way."""
    rpc_library().me_board_use(native._handle if native is not None else None)


def limit_buffers(n_bytes: int) -> None:
    """What all buffers of the client may take together; what was refused before is forgotten."""
    rpc_library().me_board_limit(n_bytes)


def board_counts() -> BoardCounts:
    n = _BoardNumbers()
    rpc_library().me_board_counts(ctypes.byref(n))
    return BoardCounts(
        n.buffer_bytes, n.peak_buffer_bytes, n.denied_bytes, n.graphs, n.new_graphs, n.compute_ns * 1e-9, n.bytes_in,
        n.bytes_out,
    )  # fmt: skip


def relay_board(client: socket.socket, server: socket.socket) -> None:
    """Pass one connection of a client on to ggml's RPC server, until either side closes."""
    rpc_library().me_board_relay(client.fileno(), server.fileno())


def prepared(connection: socket.socket) -> socket.socket:
    """A connection of short messages, that answers a vanished peer with an error and not with a signal."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "darwin":  # which has no MSG_NOSIGNAL
        connection.setsockopt(socket.SOL_SOCKET, SO_NOSIGPIPE, 1)
    connection.settimeout(None)
    return connection


def cpu_buffer_type() -> int:
    """ggml's buffer type of ordinary memory."""
    return int(rpc_library().me_cpu_buffer_type())


class Guard:
    """Stands between llama.cpp and one board, see native/relay.h. llama.cpp connects to `endpoint`.

    connect: makes the connection to the board; called for each connection that llama.cpp makes, from a thread.
    """

    def __init__(self, connect: Any) -> None:
        self._lib, self._connect = rpc_library(), connect
        self._handle: int | None = self._lib.me_guard_new()
        self._lock = threading.Lock()
        self._boards: set[socket.socket] = set()
        self._relays: set[threading.Thread] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, name="moe-edge-guard", daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                llama, _ = self._server.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(llama,), name="moe-edge-relay", daemon=True)
            with self._lock:
                self._relays.add(thread)
            thread.start()

    def _relay(self, llama: socket.socket) -> None:
        board: socket.socket | None = None
        try:
            if not self.is_lost:
                try:
                    board = prepared(self._connect())
                except OSError:
                    board = None
            if board is not None:
                with self._lock:
                    self._boards.add(board)
                if self.is_lost:  # meanwhile
                    self._shut(board)
            with llama:
                prepared(llama)
                self._lib.me_guard_relay(self._handle, llama.fileno(), board.fileno() if board is not None else -1)
        finally:
            with self._lock:
                if board is not None:
                    self._boards.discard(board)
                    board.close()
                self._relays.discard(threading.current_thread())

    @staticmethod
    def _shut(board: socket.socket) -> None:
        try:
            board.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed by the other side already
            pass

    @property
    def device(self) -> int:
        """The RPC device behind this guard, for llama.cpp. Raises EngineError."""
        device = self._lib.me_rpc_device(self.endpoint.encode())
        if not device:
            raise EngineError("llama.cpp offers no device behind an RPC connection")
        return int(device)

    @property
    def is_lost(self) -> bool:
        """Whether the board was lost: what llama.cpp computed since is of no use."""
        return bool(self._lib.me_guard_is_lost(self._handle))

    @property
    def is_waiting(self) -> bool:
        """Whether llama.cpp waits for an answer of the board."""
        return bool(self._lib.me_guard_is_waiting(self._handle))

    def lose(self) -> None:
        """Give the board up: llama.cpp's calls come to an end, with zeros."""
        self._lib.me_guard_lose(self._handle)
        with self._lock:
            for board in self._boards:
                self._shut(board)

    def take_failed(self) -> bool:
        """Whether a graph has failed on the board since the last call."""
        return bool(self._lib.me_guard_take_failed(self._handle))

    def counts(self) -> GuardCounts:
        n = _GuardNumbers()
        self._lib.me_guard_counts(self._handle, ctypes.byref(n))
        return GuardCounts(
            n.bytes_sent, n.bytes_received, n.commands, n.graphs, n.new_graphs, n.stub_bytes, n.wait_ns * 1e-9
        )

    def close(self) -> None:
        """After llama.cpp has freed what it had on the board."""
        self.lose()
        self._shut(self._server)  # wakes the thread that accepts
        self._server.close()
        for thread in list(self._relays):
            thread.join(timeout=5)
