"""Run a function of ours in a child process, with limits on time, memory and what it may say.

What llama.cpp does to a process that gives it a contradictory model (it aborts, or crashes) then happens to the child.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

KEPT_BYTES = 1 << 16  # of each stream, its last ones
TIMED_OUT = 1 << 16  # a status no process has

# The child imports what this process would, whatever its folder, its sys.path[0] or PYTHONPATH.
_CODE = (
    "import json, sys; task = json.loads(sys.argv.pop()); sys.path[:] = task['path']; "
    "from moe_edge.runner.child import begin; begin(task)"
)


@dataclass(frozen=True)
class Ended:
    """How a child ended. status: as subprocess gives it, below zero for a signal; or TIMED_OUT."""

    status: int
    out: str
    err: str


def run(function: str, seconds: float, **arguments: Any) -> Ended:
    """Call `module:function` with JSON values as arguments in a child, and wait for it.

    However this ends, the child has ended too. Raises OSError when no process can be started.
    """
    task = {"path": sys.path, "function": function, "seconds": seconds, "arguments": arguments}
    child = subprocess.Popen(
        [sys.executable, "-c", _CODE, json.dumps(task)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # ggml would start a debugger to print one
    )  # fmt: skip
    try:
        streams = _read_until(child, time.monotonic() + seconds)
        if streams is None:
            child.kill()
            child.wait()
            return Ended(TIMED_OUT, "", "")
        return Ended(child.wait(), *(each.decode(errors="replace") for each in streams))
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _read_until(child: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes] | None:
    """The last bytes of both streams once they have ended; None when the time is over before."""
    tails = {child.stdout: b"", child.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in tails:
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            for key, _ in selector.select(left):
                data = os.read(key.fd, KEPT_BYTES)
                stream = key.fileobj  # type: ignore[assignment]
                if data:
                    tails[stream] = (tails[stream] + data)[-KEPT_BYTES:]
                else:
                    selector.unregister(stream)  # type: ignore[arg-type]
    return tails[child.stdout], tails[child.stderr]


def begin(task: dict[str, Any]) -> None:
    """The child's side: set the limits that do not depend on the work, and do it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    if hasattr(signal, "alarm"):
        signal.alarm(int(task["seconds"]) + 5)  # in case the parent is gone by then
    limit("RLIMIT_CORE", 0)
    module, name = task["function"].split(":")
    function = getattr(import_module(module), name)
    function(**task["arguments"])


def limit(name: str, value: int) -> None:
    """Lower or raise one soft limit of this process, where the system has it and lets us."""
    try:
        import resource

        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(which, (value, hard))
    except (ImportError, AttributeError, ValueError, OSError):
        pass
