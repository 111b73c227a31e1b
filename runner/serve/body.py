"""Reading a request's body within limits of size and time, and writing answers that are one piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from moe_edge.models.errors import MoeEdgeError
from moe_edge.runner.serve.fields import ApiError
from starlette.types import Receive, Scope, Send

MOST_BYTES = 4 << 20  # a conversation of a million tokens; parsed, it is memory beside the budget
CHUNK_SECONDS, WHOLE_SECONDS = 15.0, 120.0
DRAINED = 16  # times the limit that are read and thrown away, so that the client hears why it was refused


class Left(MoeEdgeError):
    """The client has closed the connection."""


async def read_body(
    scope: Scope, receive: Receive, most: int = MOST_BYTES, *, seconds: float = CHUNK_SECONDS,
    whole_seconds: float = WHOLE_SECONDS,
) -> bytes:  # fmt: skip
    """The whole body. Raises ApiError: 413 when it is too long, 408 when it comes too slowly; Left."""
    named = header(scope, b"content-length")
    if named is not None and named.isdigit() and int(named) > most * DRAINED:
        raise _too_long(most)
    until = asyncio.get_running_loop().time() + whole_seconds
    data, n = bytearray(), 0
    while True:
        patience = min(seconds, until - asyncio.get_running_loop().time())
        try:
            message = await asyncio.wait_for(receive(), max(0.0, patience))
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time", kind="timeout_error") from None
        if message["type"] == "http.disconnect":
            raise Left
        chunk = message.get("body", b"")
        n += len(chunk)
        if n <= most:
            data += chunk
        elif n > most * DRAINED:
            raise _too_long(most)
        if not message.get("more_body", False):
            if n > most:
                raise _too_long(most)
            return bytes(data)


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes, which are the most", code="body_too_long")


def header(scope: Scope, name: bytes) -> str | None:
    """A request's header; name: in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


async def send_start(send: Send, status: int, media_type: str, headers: Mapping[str, str] | None = None) -> None:
    lines = {"content-type": media_type} | dict(headers or {})
    if status in (408, 413):
        lines["connection"] = "close"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_bytes(
    send: Send, status: int, data: bytes, media_type: str, headers: Mapping[str, str] | None = None
) -> None:
    """An answer in one piece."""
    more = {"content-length": str(len(data))} | dict(headers or {})
    await send_start(send, status, media_type, more)
    await send({"type": "http.response.body", "body": data})


async def send_json(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    await send_bytes(send, status, data, "application/json", headers)
