"""One arm of the comparison in a process of its own: `worker.py JOB.json` prints one JSON line.

Every arm decodes the same given tokens, so all do the same work; what a model would have said is kept as the argmax
at each position, and the loss of the given text as `nll`. Inside the timer: llama_decode, argmax and softmax.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import limits

ARMS = ("stock-mmap", "stock-read", "moe-edge")
CEILING = "ceiling"  # not an arm: measures the disk and the memory
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What to run. tokens: one list for each text, n_prompt of them in one prefill and the others one by one.

    join: the cgroup.procs files of the groups to enter. ram_bytes: for moe-edge; None: auto. policy: PolicyOptions of
    moe-edge; empty: exact. pace: bytes a second that moe-edge reads experts with, at most.
    """

    arm: str
    model: str
    tokens: list[list[int]]
    n_prompt: int
    n_ctx: int
    n_ubatch: int
    n_threads: int
    ram_bytes: int | None
    join: list[str]
    policy: dict[str, Any] = field(default_factory=dict)
    pace: int | None = None


@dataclass(frozen=True)
class Meters:
    """Counts of this process so far."""

    disk_bytes: int | None
    major_faults: int
    engine: dict[str, float]

    def since(self, earlier: Meters) -> dict[str, Any]:
        known = self.disk_bytes is not None and earlier.disk_bytes is not None
        return {
            "disk_bytes": (self.disk_bytes or 0) - (earlier.disk_bytes or 0) if known else None,
            "major_faults": self.major_faults - earlier.major_faults,
            **{key: value - earlier.engine[key] for key, value in self.engine.items()},
        }


class Decoder:
    """A llama_context that decodes given tokens as one sequence; logits of the last token of each call."""

    def __init__(self, ctx: Any, model: Any, n_batch: int) -> None:
        import llama_cpp
        import numpy as np

        self._np, self._llama = np, llama_cpp
        self._ctx, self._n_batch = ctx, n_batch
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
        self._position = 0

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._ctx), True)
        self._position = 0

    def feed(self, tokens: list[int]) -> Any:
        """Logits after the last of these tokens, (n_vocab,); valid until the next call. Raises RuntimeError."""
        for first in range(0, len(tokens), self._n_batch):
            self._fill(tokens[first : first + self._n_batch], is_last=first + self._n_batch >= len(tokens))
            status = self._llama.llama_decode(self._ctx, self._batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} at position {self._position}")
            self._position += self._batch.n_tokens
        pointer = self._llama.llama_get_logits_ith(self._ctx, -1)
        return self._np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))

    def predict(self, tokens: list[int], following: int) -> tuple[int, float]:
        """Feed tokens; the most likely next token, and the loss of the one that follows in nats."""
        logits = self.feed(tokens)
        best = int(logits.argmax())
        loss = self._np.log(self._np.exp(logits - logits[best]).sum()) + logits[best] - logits[following]
        return best, float(loss)

    def _fill(self, tokens: list[int], *, is_last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = is_last and i == len(tokens) - 1


def run(job: Job) -> dict[str, Any]:
    """Load, run every text, and report. Raises what the arm raises."""
    if job.arm == CEILING:
        return _ceiling(job)
    started = time.perf_counter()
    opened = _moe_edge(job) if job.arm == "moe-edge" else _stock(job)
    with opened as (decoder, engine_counters, facts):
        load_s = time.perf_counter() - started

        def read_meters() -> Meters:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            return Meters(disk_bytes_read(), faults, engine_counters())

        at_load = read_meters()
        passes = [run_text(decoder, tokens, job.n_prompt, read_meters) for tokens in job.tokens]
        usage = limits.read_usage(job.join)
        return {
            "load_s": load_s,
            "load_disk_bytes": at_load.disk_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "cgroup_peak_bytes": usage.peak_bytes,
            "cached_bytes": usage.cached_bytes,
            "passes": passes,
            **facts,
        }


def run_text(decoder: Decoder, tokens: list[int], n_prompt: int, read_meters: Callable[[], Meters]) -> dict[str, Any]:
    """Prefill n_prompt tokens, then decode the others but the last one by one; times, counts and predictions."""
    decoder.clear()
    before = read_meters()
    times = [time.perf_counter()]
    predictions = [decoder.predict(tokens[:n_prompt], tokens[n_prompt])]
    times.append(time.perf_counter())
    between = read_meters()
    times_of_tokens = [time.perf_counter()]
    for at in range(n_prompt, len(tokens) - 1):
        predictions.append(decoder.predict([tokens[at]], tokens[at + 1]))
        times_of_tokens.append(time.perf_counter())
    after = read_meters()
    best = [token for token, _ in predictions]
    return {
        "ttft_s": times[1] - times[0],
        "prefill": between.since(before),
        **_token_times([b - a for a, b in itertools.pairwise(times_of_tokens)]),
        "decode": after.since(between),
        "nll": sum(loss for _, loss in predictions) / len(predictions),
        "argmax": best,
        "argmax_sha256": hashlib.sha256(json.dumps(best).encode()).hexdigest()[:16],
    }


def _token_times(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "n_decoded": len(seconds),
        "decode_s": sum(seconds),
        "tpot_median_s": statistics.median(seconds),
        "tpot_p90_s": ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)],
        "tpot_mean_s": sum(seconds) / len(seconds),
        "tok_s": len(seconds) / sum(seconds),
    }


Opened = Iterator[tuple[Decoder, Callable[[], dict[str, float]], dict[str, Any]]]


@contextmanager
def _stock(job: Job) -> Opened:
    """Stock llama.cpp with moe-edge's settings: no extra buffers, one row of logits, no flash attention."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    p = llama_cpp.llama_model_default_params()
    p.n_gpu_layers = 0
    p.use_extra_bufts = False
    p.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if job.arm == "stock-mmap" else llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(os.fsencode(job.model), p)
    if not model:
        raise RuntimeError(f"{job.model}: stock llama.cpp does not load it")
    c = llama_cpp.llama_context_default_params()
    c.n_ctx, c.n_batch, c.n_ubatch = job.n_ctx, job.n_ubatch, job.n_ubatch
    c.n_threads = c.n_threads_batch = job.n_threads
    c.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    c.n_outputs_max = 1
    ctx = llama_cpp.llama_init_from_model(model, c)
    if not ctx:
        raise RuntimeError(f"{job.model}: llama.cpp makes no context of {job.n_ctx} tokens")
    try:
        yield Decoder(ctx, model, job.n_ubatch), dict, {}
    finally:
        llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)


@contextmanager
def _moe_edge(job: Job) -> Opened:
    from moe_edge.runner.engine import Engine
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.schedulers.options import PolicyOptions

    options = EngineOptions(
        ram_bytes=job.ram_bytes, n_ctx=job.n_ctx, n_ubatch=job.n_ubatch, n_threads=job.n_threads, flash_attn=False,
        disk_bytes_per_second=job.pace, policy=PolicyOptions(**job.policy),
        repack="off",  # as stock here
    )  # fmt: skip
    with Engine(job.model, options) as engine, engine.decoding():
        facts = {"ram_bytes": engine.plan.budget_bytes, "arena_bytes": engine.plan.arena_bytes}
        decoder = Decoder(engine.llama._ctx.ctx, engine.llama._model.model, job.n_ubatch)
        yield decoder, lambda: asdict(engine.counters()), {**facts, "plan": engine.plan.lines()}


def _ceiling(job: Job) -> dict[str, Any]:
    from moe_edge.runner.measure import probe

    return {
        "disk_bytes_per_second": probe.disk_bytes_per_second(Path(job.model)),
        "memory_bytes_per_second": probe.memory_bytes_per_second(job.n_threads),
    }


def disk_bytes_read() -> int | None:
    """Bytes this process, all threads, made the disks deliver: direct reads, reads and page faults alike."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def peak_rss_bytes() -> int:
    """VmHWM where there is one: ru_maxrss is inherited from the parent across exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def die_with_parent() -> None:
    """Linux: when compare.py is killed, so is this process, in whatever group it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    die_with_parent()
    for procs in job.join:  # before anything large is imported, so that it is charged to the group
        Path(procs).write_text(str(os.getpid()))
    try:
        result = run(job)
    except Exception as error:  # the arm failed: its row says so, and the other arms go on
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
