"""A server in this process, for tests: a port of its own, a thread that decodes, and ways to break a connection."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from moe_edge.runner.protocol import ServedModel
from moe_edge.runner.serve.server import Running, ServerOptions

PATIENCE = 20.0  # seconds until a test gives up; nothing is timed

# One request for each path that generates: path, body, what is whole in the answer.
MESSAGES = [{"role": "user", "content": "Hello"}]
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1000},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1000},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "Hello"},
}


@dataclass
class Server:
    """url: without a slash at its end. log: the lines of the access log."""

    url: str
    port: int
    running: Running
    log: list[str] = field(default_factory=list)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return request("POST", self.url + path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return request("GET", self.url + path, **more)

    def idle(self) -> bool:
        """Whether nothing runs and nothing waits, within the patience of a test."""
        return eventually(lambda: self.running.service.n_running == 0 and self.running.service.n_waiting == 0)


def request(method: str, url: str, **more: Any) -> httpx.Response:
    """One request. Without certificates to read, which takes longer than all else here."""
    with httpx.Client(verify=False, timeout=PATIENCE) as client:
        return client.request(method, url, **more)


def eventually(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.005)
    return False


@contextmanager
def serving(model: ServedModel | None, limits: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Server]:
    """model None: never loaded. limits: of the Context. options: of ServerOptions."""
    log: list[str] = []
    running = Running(ServerOptions(port=0, **options), log.append, **(limits or {}))
    worker = threading.Thread(target=running.work, args=(model,)) if model is not None else None
    if worker is not None:
        worker.start()
    try:
        server = Server(f"http://127.0.0.1:{running.port}", running.port, running, log)
        if worker is not None:
            assert eventually(lambda: running.service.loaded is not None)
        yield server
    finally:
        running.close()
        if worker is not None:
            worker.join(PATIENCE)
            assert not worker.is_alive(), "the thread that decodes has not ended"


def raw_request(path: str, body: Any, *, headers: str = "", length: int | None = None) -> bytes:
    """The bytes of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    n = len(data) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {n}\r\n{headers}\r\n".encode() + data


def exchange(port: int, request: bytes, *, at_most: int = 1 << 30) -> bytes:
    """Send bytes, read until the other side closes or so many have come, and leave."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as there:
        there.sendall(request)
        got = b""
        while len(got) < at_most:
            piece = there.recv(min(65536, at_most - len(got)))
            if not piece:
                break
            got += piece
        return got


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of every `data:` line but the last `[DONE]`."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(path: str, body: str) -> str:
    """The answer's text in a stream of any dialect."""
    if path.startswith("/api/"):
        lines = [json.loads(line) for line in body.splitlines()]
        return "".join(line["message"]["content"] if "message" in line else line.get("response", "") for line in lines)
    said = ""
    for event in events_of(body):
        if event.get("type") == "response.output_text.delta":
            said += event["delta"]
        elif event.get("type") == "content_block_delta":
            said += event["delta"].get("text", "")
        elif event.get("choices"):
            choice = event["choices"][0]
            said += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return said
