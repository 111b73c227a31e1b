"""A hub on loopback: lists, redirects to another host name, ranges, and what goes wrong on purpose."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """files: path in the repository -> bytes. The hooks change how files are sent.

    cut: (path, how often a file was asked for) -> end the connection after so many bytes of a response; None: whole.
    ignore_ranges: answer 200 with everything. other_sha256: lies of the list. expire: addresses are good for so many
    requests. token: wanted by the hub. slow: seconds between pieces of 64 KiB.
    """

    repo: str = "user/model-GGUF"
    files: dict[str, bytes] = field(default_factory=dict)
    cut: Callable[[str, int], int | None] = lambda path, n: None
    ignore_ranges: bool = False
    other_sha256: dict[str, str] = field(default_factory=dict)
    expire: int = 0
    token: str = ""
    slow: float = 0.0
    fail: int = 0  # so many requests of lists fail with 503 first
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, host and path, headers
    sent: int = 0  # bytes of files
    url: str = ""
    _asked: dict[str, int] = field(default_factory=dict)
    _uses: dict[str, int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def listing(self) -> dict[str, object]:
        siblings = []
        for path, data in self.files.items():
            entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
            if path.endswith((".gguf", ".safetensors")):
                sha = self.other_sha256.get(path) or hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 135}
            siblings.append(entry)
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, *, head: bool) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        host = self.headers.get("Host", "")
        with hub.lock:
            hub.requests.append((self.command, f"{host}{self.path}", dict(self.headers)))
        path = unquote(parts.path)
        if path.startswith("/cdn/"):
            return self.send_file(path.removeprefix("/cdn/"), parse_qs(parts.query), head)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "")
        if path.startswith("/api/models/"):
            return self.send_list(path.removeprefix("/api/models/"), head)
        prefix = f"/{hub.repo}/resolve/"
        if path.startswith(prefix):
            return self.redirect(path.removeprefix(prefix).split("/", 1)[1], head)
        return self.refuse(404, "EntryNotFound")

    def send_list(self, name: str, head: bool) -> None:
        if self.hub.fail > 0:
            self.hub.fail -= 1
            return self.refuse(503, "")
        repo = name.split("/revision/")[0].split("/tree/")[0]
        if repo != self.hub.repo:
            return self.refuse(404, "RepoNotFound")
        return self.send_body(200, json.dumps(self.hub.listing()).encode(), {"Content-Type": "application/json"}, head)

    def redirect(self, path: str, head: bool) -> None:
        data = self.hub.files.get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        sha = hashlib.sha256(data).hexdigest() if path.endswith((".gguf", ".safetensors")) else git_sha1(data)
        with self.hub.lock:
            self.hub._uses[str(len(self.hub._uses))] = 0
            ticket = str(len(self.hub._uses) - 1)
        other = self.hub.url.replace("127.0.0.1", "localhost")
        headers = {
            "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha}"', "ETag": f'"{sha}"',
            "Accept-Ranges": "bytes", "Location": f"{other}/cdn/{path}?ticket={ticket}",
        }  # fmt: skip
        return self.send_body(302, b"", headers, head)

    def send_file(self, path: str, query: dict[str, list[str]], head: bool) -> None:
        hub, data = self.hub, self.hub.files[path]
        ticket = query["ticket"][0]
        with hub.lock:
            hub._uses[ticket] += 1
            if hub.expire and hub._uses[ticket] > hub.expire:
                return self.refuse(403, "")
            hub._asked[path] = hub._asked.get(path, 0) + (not head)
            n = hub._asked[path]
        start, end, status = 0, len(data), 200
        wanted = self.headers.get("Range")
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted and not hub.ignore_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(len(data), int(last or len(data) - 1) + 1), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        most = None if head else hub.cut(path, n)
        self.send_body(status, data[start:end], headers, head, most)

    def send_body(
        self, status: int, body: bytes, headers: dict[str, str], head: bool, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if head:
            return
        whole = body if most is None else body[:most]
        for at in range(0, len(whole), 65536):
            self.wfile.write(whole[at : at + 65536])
            if self.path.startswith("/cdn/"):
                with self.hub.lock:
                    self.hub.sent += len(whole[at : at + 65536])
            if self.hub.slow:
                time.sleep(self.hub.slow)
        if most is not None and most < len(body):
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.send_body(status, b"no", headers, self.command == "HEAD")


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


@contextmanager
def hub_running(hub: FakeHub) -> Iterator[FakeHub]:
    handler = type("Bound", (Handler,), {"hub": hub})
    server = Quiet(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
