"""What stands before every path: the log, who may ask, and what a page in a browser may not.

Pure ASGI, so that a stream passes through untouched.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from moe_edge.runner.serve.access_log import AccessLog, Entry
from moe_edge.runner.serve.body import header, send_json
from moe_edge.runner.serve.fields import ApiError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ErrorJson = Callable[[str, ApiError], Mapping[str, Any]]  # path, error -> in the words of that path's dialect

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/health", "/v1/health", "/openapi.json")  # need no key
OPEN_FOLDERS = ("/page/",)


@dataclass(frozen=True)
class Access:
    """Who may ask. api_key None: anybody who reaches the port. origins: pages that may, `*` for all.

    hosts: the names by which this server may be called; empty: any. Without it, a page could let its own name point at
    127.0.0.1 and read what is meant for programs of this machine.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


class Log:
    """Writes one line for each request; `scope["moe_edge"]` is its Entry."""

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        client = scope.get("client")
        entry = Entry(scope["method"], scope["path"], client[0] if client else "")
        scope["moe_edge"] = entry

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._log.write(entry)


class Guard:
    """Refuses whom the Access does not let in."""

    def __init__(self, app: ASGIApp, access: Access, error_json: ErrorJson) -> None:
        self._app, self._access, self._error_json = app, access, error_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope)
        if error is None:
            await self._app(scope, receive, send)
            return
        more = {"www-authenticate": "Bearer", "connection": "close"} if error.status == 401 else {"connection": "close"}
        await send_json(send, error.status, self._error_json(scope["path"], error), more)

    def _refusal(self, scope: Scope) -> ApiError | None:
        a, path = self._access, scope["path"]
        host = header(scope, b"host") or ""
        if a.hosts and host_name(host) not in a.hosts:
            return ApiError(
                403, f"this server is not called '{host[:80]}'; ask {a.hosts[0]}, or start it with --api-key",
                kind="permission_error",
            )  # fmt: skip
        origin = header(scope, b"origin")
        if origin is not None and not may_ask(origin, host, a.origins):
            return ApiError(
                403, f"pages of {origin[:80]} may not ask this server; start it with --cors {origin[:80]}",
                kind="permission_error",
            )  # fmt: skip
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
        if a.api_key is not None and not is_open and not has_key(scope, a.api_key):
            return ApiError(
                401, "this server needs its key, as Authorization: Bearer KEY or x-api-key: KEY",
                kind="authentication_error", code="invalid_api_key",
            )  # fmt: skip
        return None


def host_name(host: str) -> str:
    """The name in a Host header, without the port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def may_ask(origin: str, host: str, origins: Sequence[str]) -> bool:
    """Whether a page of this origin may ask: it is the server's own, or named by --cors."""
    if "*" in origins or origin in origins:
        return True
    try:
        return urlsplit(origin).netloc == host and bool(host)
    except ValueError:
        return False


def has_key(scope: Scope, key: str) -> bool:
    given = [header(scope, b"x-api-key") or ""]
    scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(token.strip())
    return any(hmac.compare_digest(each.encode("latin-1", "replace"), key.encode()) for each in given)
