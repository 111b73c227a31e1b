"""A path that generates: body in, reply out, streamed or in one piece, and nothing made for a client that has left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_edge.runner.events import Progress
from moe_edge.runner.protocol import End, Event, Prepared, ServedModel, Usage
from moe_edge.runner.serve.access_log import Entry
from moe_edge.runner.serve.body import MOST_BYTES, Left, read_body, send_json, send_start
from moe_edge.runner.serve.dialects.dialect import Call, Encoder, Reply, Route
from moe_edge.runner.serve.faults import as_api_error
from moe_edge.runner.serve.fields import ApiError, parse_json
from moe_edge.runner.serve.metrics import Metrics
from moe_edge.runner.serve.service import Job, Service
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
KEEP_ALIVE_SECONDS = 10.0  # without a byte, after which a client is told that all is well
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx would keep a stream back
_LEFT = Left()
Mail = asyncio.Queue["Event | BaseException"]


@dataclass(frozen=True)
class Context:
    """What every path shares. threads: for what would keep the event loop busy, rendering and tokenizing."""

    service: Service
    metrics: Metrics
    threads: Executor
    most_bytes: int = MOST_BYTES
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    body_seconds: float = 15.0

    async def aside(self, work: Callable[[], T]) -> T:
        """Run it beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


class Generating:
    """One Route as an ASGI application."""

    def __init__(self, route: Route, context: Context) -> None:
        self._route, self._context = route, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry: Entry = scope["moe_edge"]
        try:
            await self._answer(scope, receive, send, entry)
        except Left:
            entry.finish = entry.finish or "left"
        except Exception as e:
            error = as_api_error(e)
            entry.finish = "error"
            if error.status == 500 and not isinstance(e, ApiError):
                self._context.metrics.count_failed()
            await send_error(send, self._route.error(error), error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, entry: Entry) -> None:
        c, route = self._context, self._route
        model = c.service.model
        data = await read_body(scope, receive, c.most_bytes, seconds=c.body_seconds)
        call, prepared = await c.aside(lambda: self._prepare(model, data))
        if call.answer is not None:
            await send_json(send, 200, call.answer)
            return
        assert prepared is not None
        if route.counts_only is not None:
            await send_json(send, 200, route.counts_only(len(prepared.tokens)))
            return
        reply = Reply(
            secrets.token_hex(12), int(time.time()), call.model or model.facts.name, model.facts, call.options,
            len(prepared.tokens),
        )  # fmt: skip
        exchange = _Exchange(c, entry, route, route.encoder(reply))
        await exchange.run(prepared, call.stream, receive, send)

    def _prepare(self, model: ServedModel, data: bytes) -> tuple[Call, Prepared | None]:
        call = self._route.parse(parse_json(data))
        return call, None if call.answer is not None else model.prepare(call.request)


class _Exchange:
    """One reply on its way: events come in by `mail` from the thread that decodes."""

    def __init__(self, context: Context, entry: Entry, route: Route, encoder: Encoder) -> None:
        self._context, self._entry, self._route, self._encoder = context, entry, route, encoder
        self._mail: Mail = asyncio.Queue()

    async def run(self, prepared: Prepared, streamed: bool, receive: Receive, send: Send) -> None:
        loop, service = asyncio.get_running_loop(), self._context.service

        def deliver(event: Event | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it every client
                loop.call_soon_threadsafe(self._mail.put_nowait, event)

        job = service.submit(prepared, deliver)
        watch = asyncio.ensure_future(self._watch(job, receive))
        try:
            await (self._stream(send) if streamed else self._whole(send))
        finally:
            service.cancel(job)  # nothing when it has ended
            watch.cancel()

    async def _watch(self, job: Job, receive: Receive) -> None:
        """A client that leaves ends its reply at once, whatever it is waiting for."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._context.service.cancel(job)
        self._mail.put_nowait(_LEFT)

    async def _next(self) -> Event:
        event = await self._mail.get()
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, End):
            self._entry.end, self._entry.finish = event, event.reason
        return event

    # ---- in one piece

    async def _whole(self, send: Send) -> None:
        events = [await self._next()]
        while not isinstance(events[-1], End):
            if isinstance(events[-1], Progress):
                events.pop()
            events.append(await self._next())
        usage = events[-1].usage
        await send_json(send, 200, self._encoder.whole(events), {"x-moe-edge": traded_header(usage)})

    # ---- as a stream

    async def _stream(self, send: Send) -> None:
        await send_start(send, 200, self._route.media_type, STREAM_HEADERS)
        await self._write(send, self._encoder.opening())
        try:
            await self._events(send)
        except Left:
            raise
        except Exception as e:  # the answer has begun: the error is part of the stream
            self._entry.finish = "error"
            self._context.metrics.count_failed()
            await self._write(send, self._encoder.failed(as_api_error(e)))
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, send: Send) -> None:
        """What has come goes out together, before anything is waited for."""
        loop = asyncio.get_running_loop()
        patience = self._context.keep_alive_seconds
        silent_since, said = loop.time(), ""
        while True:
            if said and self._mail.empty():
                await self._write(send, said)
                silent_since, said = loop.time(), ""
            try:  # most often something is there already, and waiting with a deadline is not free
                here, left = not self._mail.empty(), max(0.0, silent_since + patience - loop.time())
                event = await (self._next() if here else asyncio.wait_for(self._next(), left))
            except asyncio.TimeoutError:
                said = self._encoder.keep_alive()
                silent_since = loop.time()
                continue
            except Exception:
                await self._write(send, said)
                raise
            said += self._encoder.event(event)
            if isinstance(event, End):
                await self._write(send, said)
                return

    async def _write(self, send: Send, text: str) -> None:
        if text:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def traded_header(usage: Usage) -> str:
    """What was traded, as JSON in one header."""
    return json.dumps(dict(usage.traded), separators=(",", ":"))


async def send_error(send: Send, value: Mapping[str, Any], error: ApiError) -> None:
    more = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    await send_json(send, error.status, value, more)
