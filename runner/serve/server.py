"""`moe-edge serve` from its first socket to its exit.

The thread that calls serve() loads the model and is the only one that decodes. HTTP has a thread of its own, with its
own event loop, so that the port answers while the model loads and while a prompt is evaluated.

SIGTERM and SIGINT: no new requests; the reply that runs gets GRACE_SECONDS to end, then it is ended; what is to be kept
is saved. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from moe_edge.models.errors import UsageError, WorkError
from moe_edge.runner.protocol import ServedModel
from moe_edge.runner.serve.access_log import AccessLog
from moe_edge.runner.serve.app import build_app, new_context
from moe_edge.runner.serve.connection import PatientProtocol
from moe_edge.runner.serve.guards import LOOPBACK, Access
from moe_edge.runner.serve.notify import notify
from moe_edge.runner.serve.service import Service
from moe_edge.runner.signals import REQUESTS_TO_END

GRACE_SECONDS = 2.0  # for the reply that runs, of the 5 s in which a server has to be gone
DRAIN_SECONDS = 1.0  # for answers on their way, after that
MOST_CONNECTIONS = 256
MOST_HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class ServerOptions:
    """port 0: any free one. queue: requests that may wait. origins: pages that may ask, `*` for all."""

    host: str = "127.0.0.1"
    port: int = 8080
    queue: int = 8
    api_key: str | None = None
    no_api_key: bool = False
    origins: tuple[str, ...] = ()
    log_json: bool = False

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK or self.host.startswith("127.")

    def access(self) -> Access:
        """Raises UsageError for a server that anybody in the network could use and nobody meant to open."""
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise UsageError("--api-key is empty, or not plain ASCII; give a word that is hard to guess")
        if not self.is_local and self.api_key is None and not self.no_api_key:
            raise UsageError(
                f"--host {self.host} can be reached by other machines: give --api-key KEY (or MOE_EDGE_API_KEY), or "
                "say --no-api-key to let everybody in"
            )
        hosts = (self.host, *LOOPBACK) if self.is_local and self.api_key is None else ()
        return Access(self.api_key, self.origins, tuple(dict.fromkeys(hosts)))


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError for a name that is none, WorkError when the port is taken."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise UsageError(f"--host {host}: {e.strerror or e}; give an address of this machine") from e
    listener = socket.socket(family, kind, number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as e:
        listener.close()
        raise WorkError(f"cannot listen at {host} port {port}: {e.strerror}; try another --port, or 0 for any") from e
    listener.setblocking(False)
    return listener


class HttpThread:
    """uvicorn in a thread of its own."""

    def __init__(self, listener: socket.socket, app: Any) -> None:
        config = uvicorn.Config(
            app, http=PatientProtocol, ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="error",
            access_log=False, server_header=False, limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_graceful_shutdown=int(GRACE_SECONDS + DRAIN_SECONDS),
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-edge-http", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._begun.wait()

    def _run(self) -> None:
        if hasattr(signal, "pthread_sigmask"):  # signals are the main thread's, which waits for them
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *REQUESTS_TO_END})
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        await self._server.serve([self._listener])

    def call(self, work: Callable[[], None]) -> None:
        """Let the event loop do something soon; safe in a signal handler."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            pass  # it has ended

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """On the event loop: do something when so much time has passed."""
        assert self._loop is not None
        self._loop.call_later(seconds, work)

    def finish(self) -> None:
        """On the event loop: listen no more, and end when every answer is out."""
        self._server.should_exit = True

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)


class Running:
    """A server whose port is open. Call work() in the thread that decodes."""

    def __init__(self, options: ServerOptions, say: Callable[[str], None], **limits: Any) -> None:
        access = options.access()
        self._listener = open_socket(options.host, options.port)
        self.port = int(self._listener.getsockname()[1])
        self.service = Service(options.queue)
        self._context = new_context(self.service, **limits)
        log = AccessLog(say, as_json=options.log_json)
        self._http = HttpThread(self._listener, build_app(self._context, access, log))
        self._leaving = False
        self._http.start()

    def leave(self) -> None:
        """Begin to end; safe in a signal handler. Again: nothing."""
        if not self._leaving:
            self._leaving = True
            self._http.call(self._begin_to_leave)

    def _begin_to_leave(self) -> None:
        notify("STOPPING=1")
        self.service.close()
        self._http.later(GRACE_SECONDS, self.service.end_current)
        self._http.finish()

    def work(self, model: ServedModel, ready: Callable[[], None] = lambda: None) -> None:
        """Answer requests until leave(). ready: called once requests are taken."""
        self.service.ready(model)
        ready()
        self.service.work()

    def close(self) -> None:
        """Every answer is out, or cut off; the threads are gone."""
        self.leave()
        self._http.join(GRACE_SECONDS + 2 * DRAIN_SECONDS)
        self._context.threads.shutdown(wait=True, cancel_futures=True)
        self._listener.close()


@contextmanager
def ending_on_signals(leave: Callable[[], None]) -> Iterator[None]:
    """The first signal calls `leave`, the second one ends the process. Only in the main thread; else nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, *REQUESTS_TO_END)
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1:
            leave()
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(options: ServerOptions, open_model: Callable[[], ServedModel], say: Callable[[str], None]) -> None:
    """Listen, load, answer until a signal comes. say: for lines of the log.

    Raises UsageError and WorkError for options and ports, and whatever open_model raises.
    """
    running = Running(options, say)
    try:
        where = f"http://{options.host if ':' not in options.host else f'[{options.host}]'}:{running.port}"
        say(f"listening at {where}, loading the model")
        model = open_model()
        try:
            with ending_on_signals(running.leave):

                def ready() -> None:
                    say(f"ready at {where}: OpenAI {where}/v1, Anthropic and Ollama {where}")
                    notify("READY=1")

                running.work(model, ready)
                running.close()
        finally:
            running.close()
            model.close()
    finally:
        running.close()
