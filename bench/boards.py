"""Several boards against one machine: the same model, text and disk speed, a third of the memory each or all of it.

    python bench/boards.py big.gguf --boards 2,3 --pace 440MB/s --latency 0,0.2,1

The boards are workers of this machine, each with a memory budget for all experts of its own layers. They decode in
turns with one machine that holds everything, and one that holds a share of the experts as large as one board's. A
token passes through the boards one after the other, so only one of them computes at a time; each arm's processor time
per token is printed, and shows what waiting threads took. `--threads 1` leaves none that could wait awake. Latency is
added by a relay of ours in between, there and back, since not every kernel has netem; its own time at 0 ms is in the
row of 0.

Prints a row for each arm, median and spread over the rounds, what `plan` foresaw, and the bytes on the wire; the last
line of stdout is one JSON object. The text must be the same in all arms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import facts
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Sampling, generate
from moe_edge.runner.measure.boards_plan import plan_boards
from moe_edge.runner.prove import LOADS
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.runner.workers.boards_engine import BoardsEngine
from moe_edge.runner.workers.wire import Address
from moe_edge.schedulers.budget import MIB, format_bytes, parse_bytes
from moe_edge.schedulers.workers import MEMORY

PROMPT = "The king said to his daughter that the road to the sea was long, and that nobody had ever come back from it."
SPIN_SECONDS = 150e-6  # a sleeping thread wakes up that late; the rest is waited for awake


@dataclass(frozen=True)
class Sample:
    """One reply. cpu_seconds: of all processes of the arm, for each token after the first."""

    tokens_per_second: float
    cpu_seconds: float
    text: str
    reports: list[dict[str, Any]]


class Latency:
    """Passes connections on to a port of `host`, each chunk `seconds` later; at 127.0.0.1, on a port of its own."""

    def __init__(self, to: int, seconds: float, host: str = "127.0.0.1") -> None:
        self._to, self._seconds = (host, to), seconds
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for a, b in ((near, far), (far, near)):
                    chunks: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    threading.Thread(target=self._take, args=(a, chunks), daemon=True).start()
                    threading.Thread(target=self._give, args=(b, chunks), daemon=True).start()

    def close(self) -> None:
        """Accept nobody any more, and end what is open."""
        for each in (self._server, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _take(self, a: socket.socket, chunks: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"?"
        while data:
            try:
                data = a.recv(1 << 18)
            except OSError:
                data = b""
            chunks.put((time.perf_counter() + self._seconds, data))

    def _give(self, b: socket.socket, chunks: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = chunks.get()
                if (left := due - time.perf_counter()) > SPIN_SECONDS:
                    time.sleep(left - SPIN_SECONDS)
                while time.perf_counter() < due:
                    pass
                if not data:
                    b.shutdown(socket.SHUT_RDWR)
                    return
                b.sendall(data)


class Worker:
    """`moe-edge worker` on this machine."""

    def __init__(self, model: Path, ram: int, pace: str | None, n_threads: int) -> None:
        command = [sys.executable, "-m", "moe_edge.runner.start", "worker", str(model), "--ram", str(ram)]
        command += ["--port", "0", "-t", str(n_threads), *(["--pace", pace] if pace else [])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.port = 0
        for line in self.process.stderr:
            if found := re.match(r"worker at \S*:(\d+):", line):
                self.port = int(found[1])
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        if not self.port:
            raise SystemExit("a worker did not start")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def measure(engine: Engine, n_tokens: int, workers: Sequence[Worker]) -> Sample:
    """A reply to warm the caches, then one that counts."""
    generate(engine, PROMPT, n_tokens, Sampling(temp=0), ignore_end=True)
    engine.new_conversation()
    generate(engine, PROMPT, 1, Sampling(temp=0), ignore_end=True)
    before = time.process_time() + sum(w.cpu_seconds() for w in workers)
    result = generate(engine, PROMPT, n_tokens, Sampling(temp=0), ignore_end=True)
    cpu = time.process_time() + sum(w.cpu_seconds() for w in workers) - before
    n = max(1, result.generated_tokens - 1)
    return Sample(n / result.decode_seconds, cpu / n, result.text, engine.board_reports())


def one_machine(model: Path, options: EngineOptions, n_tokens: int) -> Sample:
    with Engine(model, options) as engine:
        return measure(engine, n_tokens, ())


@dataclass(frozen=True)
class Boards:
    """Workers that stay for all rounds, and the address of each at each latency, in seconds there and back."""

    workers: tuple[Worker, ...]
    addresses: dict[float, tuple[Address, ...]]
    rams: tuple[int, ...]


@contextlib.contextmanager
def boards_of(
    model: Path, n: int, options: EngineOptions, pace: str | None, latencies: Sequence[float], n_threads: int
) -> Iterator[Boards]:
    """n boards, each with memory for all experts of its own layers. Its other needs are asked of one with plenty."""
    client = replace(options, ram_bytes=NO_LIMIT, disk_bytes_per_second=None)
    with contextlib.ExitStack() as stack:

        def start(ram: int) -> Worker:
            worker = Worker(model, ram, pace, n_threads)
            stack.callback(worker.end)
            return worker

        first = [start(1 << 40) for _ in range(n)]
        with BoardsEngine(
            model, client, [Address("127.0.0.1", w.port) for w in first], split=MEMORY
        ) as engine:  # fmt: skip
            rams = tuple(int(board.taken["resident_bytes"]) + 4 * MIB for board in engine.boards)
        workers = tuple(start(ram) for ram in rams)
        for worker in first:
            worker.end()
        addresses = {
            latency: tuple(Address("127.0.0.1", Latency(w.port, latency / 2).port) for w in workers)
            for latency in latencies
        }
        yield Boards(workers, addresses, rams)


def row(name: str, samples: Sequence[Sample], foreseen: float | None) -> dict[str, Any]:
    speeds = [each.tokens_per_second for each in samples]
    out: dict[str, Any] = {
        "arm": name, "tokens_per_second": statistics.median(speeds), "least": min(speeds), "most": max(speeds),
        "cpu_seconds_per_token": statistics.median(each.cpu_seconds for each in samples), "foreseen": foreseen,
        "boards": samples[-1].reports,
    }  # fmt: skip
    foreseen_text = f", foreseen {foreseen:.2f}" if foreseen else ""
    print(
        f"{name:28} {out['tokens_per_second']:7.2f} tok/s ({min(speeds):.2f} to {max(speeds):.2f}){foreseen_text}, "
        f"processor {1e3 * out['cpu_seconds_per_token']:.1f} ms a token"
    )
    for report in samples[-1].reports:
        print(
            f"    {report['board']}: layers {report['layers'][0]} to {report['layers'][1]}, computing "
            f"{report['compute_seconds']:.2f} s, stalled {report['stall_seconds']:.2f} s, network "
            f"{report['network_seconds']:.2f} s, sent {format_bytes(report['bytes_sent'])}, expert stubs "
            f"{format_bytes(report['stub_bytes_sent'])}, {report['graphs_sent']} of {report['graphs']} graphs sent"
        )
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boards", default="2,3")
    parser.add_argument("--pace", default="440MB/s", help="of every disk; `none`: as it is")
    parser.add_argument("--latency", default="0,0.2,1", help="milliseconds there and back")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    o = parser.parse_args(arguments)
    pace = None if o.pace == "none" else o.pace
    n_threads = o.threads or len(os.sched_getaffinity(0))
    latencies = [float(each) * 1e-3 for each in o.latency.split(",")]
    options = EngineOptions(
        ram_bytes=NO_LIMIT, n_ctx=512, n_threads=n_threads, proof=LOADS,
        disk_bytes_per_second=parse_bytes(pace.removesuffix("/s")) if pace else None,
    )  # fmt: skip
    engine = Engine(o.model, options)
    fixed, experts = engine.plan.fixed.total_bytes, engine.layout.total_bytes
    engine.close()
    print(f"{o.model.name}: experts {format_bytes(experts)}, everything else {format_bytes(fixed)}; pace {o.pace}")

    counts = [int(each) for each in o.boards.split(",")]
    shares = {n: replace(options, ram_bytes=fixed + experts // n) for n in counts}
    with contextlib.ExitStack() as stack:
        made = {n: stack.enter_context(boards_of(o.model, n, options, pace, latencies, n_threads)) for n in counts}
        foreseen: dict[str, float] = {}
        for n, latency in ((n, latency) for n in counts for latency in latencies):
            plan = plan_boards(o.model, made[n].addresses[latency], n_ctx=512, n_threads=n_threads)
            foreseen[f"{n} boards, {1e3 * latency:g} ms"] = plan.forecast.tokens_per_second
        samples: dict[str, list[Sample]] = {}
        for _ in range(o.rounds):
            samples.setdefault("one machine, all", []).append(one_machine(o.model, options, o.tokens))
            for n in counts:
                name = f"one machine, 1/{n}"
                samples.setdefault(name, []).append(one_machine(o.model, shares[n], o.tokens))
                for latency in latencies:
                    name = f"{n} boards, {1e3 * latency:g} ms"
                    client = replace(options, disk_bytes_per_second=None)
                    with BoardsEngine(o.model, client, made[n].addresses[latency]) as engine:
                        samples.setdefault(name, []).append(measure(engine, o.tokens, made[n].workers))
        rows = [row(name, found, foreseen.get(name)) for name, found in samples.items()]
    same = len({each.text for found in samples.values() for each in found}) == 1
    print(f"text the same in all arms: {'yes' if same else 'NO'}")
    rams = {n: list(each.rams) for n, each in made.items()}
    print(json.dumps({"machine": facts.machine_facts(), "rows": rows, "same_text": same, "board_rams": rams}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
