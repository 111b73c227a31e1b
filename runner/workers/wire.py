"""How a client and a worker talk: one port, two kinds of connection, told apart by the first byte.

`C`: questions and answers, one JSON object a line, beside the RPC protocol: who are you, take these layers, how are
you. `R`, a session's token and then ggml's RPC protocol as native/relay.h changes it. There is no password: whoever
reaches the port may use the board. So a worker listens on the loopback address unless it is told otherwise.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from dataclasses import dataclass
from typing import Any

from moe_edge.models.errors import UsageError

PROTOCOL = 2  # of these lines; both sides must have the same
DEFAULT_PORT = 50052
CONTROL, RPC = b"C", b"R"
TOKEN_BYTES = 32
LONGEST_LINE = 16 << 20
MOST_BOARDS = 16  # llama.cpp's own limit of devices


@dataclass(frozen=True)
class Address:
    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """`board1`, `board1:50052`, `[fe80::1]:50052`. Raises UsageError."""
    text = text.strip()
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        if rest:
            port = rest.removeprefix(":")
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"'{text}' is no board; write HOST or HOST:PORT, like 192.168.1.5:{DEFAULT_PORT}")
    return Address(host, int(port))


def parse_addresses(text: str) -> tuple[Address, ...]:
    """`board1:50052,board2`. Raises UsageError, also for a board that is named twice."""
    found = tuple(parse_address(each) for each in text.split(","))
    for address in found:
        if found.count(address) > 1:
            raise UsageError(f"board {address} is named twice in --workers; each board can take one part")
    if len(found) > MOST_BOARDS:
        raise UsageError(f"--workers names {len(found)} boards; llama.cpp works with at most {MOST_BOARDS}")
    return found


class Lines:
    """JSON objects over a connection, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """Raises OSError."""
        self.connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Raises OSError, ConnectionError at the end of the connection and for what is no JSON object."""
        while b"\n" not in self._rest:
            data = self.connection.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection was closed")
            self._rest += data
            if len(self._rest) > LONGEST_LINE:
                raise ConnectionError(f"a line of more than {LONGEST_LINE} bytes came")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as e:
            raise ConnectionError("what came is not of moe-edge's protocol") from e
        if not isinstance(message, dict):
            raise ConnectionError("what came is not of moe-edge's protocol")
        return message

    def swallow(self, n: int) -> None:
        """Take n bytes that follow a line. Raises OSError."""
        here, self._rest = self._rest[:n], self._rest[n:]
        n -= len(here)
        while n > 0:
            data = self.connection.recv(min(n, 1 << 18))
            if not data:
                raise ConnectionError("the connection was closed")
            n -= len(data)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address; for a name, whether that holds for all it stands for."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(each).split("%")[0]).is_loopback for each in found)
