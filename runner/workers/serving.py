"""The process of a worker: from its first line to its last."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from moe_edge.models.errors import EngineError
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.probe import Unmeasured
from moe_edge.runner.workers.wire import Address
from moe_edge.runner.workers.worker import Worker
from moe_edge.schedulers.budget import format_bytes


def serve(
    path: str, options: EngineOptions, address: Address, *, anywhere: bool, tell: Callable[[str], None]
) -> int:
    """Work until a signal comes; the exit status. Raises what Worker raises, EngineError when ggml's server ends."""
    _keep_output()
    worker = Worker(path, options, address, anywhere=anywhere, measure=partial(_speeds, path, options), tell=tell)
    came: list[int] = []
    ended = threading.Event()

    def note(number: int, _frame: object) -> None:
        came.append(number)
        ended.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        listening = worker.start()
        tell(f"worker at {listening}: memory {format_bytes(worker.ram_bytes)}; Ctrl-C ends it")
        while not ended.is_set() and not worker.ended.is_set():
            ended.wait(0.2)
        if not came:
            raise EngineError(f"the worker cannot go on: {worker.why_ended}")
        worker.stop()
        return 128 + came[0] if came[0] == signal.SIGTERM else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _speeds(path: str, options: EngineOptions, measured_only: bool) -> dict[str, float] | str:
    from moe_edge.runner.measure.boards_plan import are_measured, speeds_here

    if measured_only and not are_measured(path, options):
        return "its disk and processor were never measured"
    found = speeds_here(path, options, lambda _: None)
    return found.why if isinstance(found, Unmeasured) else asdict(found)


def _keep_output() -> None:
    """ggml's server writes its news to standard output by itself; they go nowhere. Ours go to standard error."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
