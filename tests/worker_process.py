"""Workers as processes of their own, for tests; and what stands between them and a client: a tunnel."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

START_SECONDS = 120


class WorkerProcess:
    """`moe-edge worker MODEL`, listening. before: a command that runs it, such as `ip netns exec NAME`."""

    def __init__(
        self, model: Path, ram: int | str, *, port: int = 0, host: str = "127.0.0.1", before: Sequence[str] = (),
        more: Sequence[str] = (), environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.ram, self.host = model, ram, host
        command = [*before, sys.executable, "-m", "moe_edge.runner.start", "worker", str(model), "--ram", str(ram)]
        self.process = subprocess.Popen(
            [*command, "--host", host, "--port", str(port), "-t", "1", *more],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.said: list[str] = []
        self._port = port
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.said.append(line.rstrip())
                if found := re.match(r"worker at \S*:(\d+):", line):
                    self._port = int(found[1])
                    self._listens.set()
        self._listens.set()

    @property
    def port(self) -> int:
        assert self._listens.wait(START_SECONDS), "the worker did not start"
        assert self.process.poll() is None, self.said
        return self._port

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def peak_rss_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def end(self) -> int:
        """Ask it to end; its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        status = self.process.wait(60)
        self._reader.join()
        return status


@contextlib.contextmanager
def workers(model: Path, rams: Sequence[int | str], **more: object) -> Iterator[list[WorkerProcess]]:
    """One for each budget; ended at the end."""
    made: list[WorkerProcess] = []
    try:
        for ram in rams:
            made.append(WorkerProcess(model, ram, **more))  # type: ignore[arg-type]
        yield made
    finally:
        for each in made:
            each.end()


class Tunnel:
    """Passes connections on, as `ssh -L` does. cut_after: so many bytes have gone there, then it breaks for good; with
    `silently` it does not close anything, it only stops."""

    def __init__(self, port: int, cut_after: int | None = None, silently: bool = False) -> None:
        self._to, self._cut_after, self._silently = port, cut_after, silently
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.carried = 0
        self.data = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._open += [near, far]
            if self.is_cut:
                self._cut()
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, a: socket.socket, b: socket.socket, there: bool) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                if there:
                    self.carried += len(data)
                    self.data += data
                if self.is_cut:
                    self._cut()
                    break
                b.sendall(data)
        for each in (a, b):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        a.close()

    @property
    def is_cut(self) -> bool:
        return self._cut_after is not None and self.carried > self._cut_after

    def _cut(self) -> None:
        if self._silently:
            threading.Event().wait()  # this thread is over, its connections stay
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
