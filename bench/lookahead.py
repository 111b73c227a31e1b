"""Look-ahead on and off in turns, over shares of the experts and disk speeds; and what `moe-edge plan` says of each.

    python bench/lookahead.py big.gguf --text heldout.txt --plan-text calibration.txt --share 25,40,60 \
        --disk none,440MB/s,90MB/s --rounds 3

A cell is a share and a speed: one process in a memory cgroup of --ram plus 80 MiB. All arms decode the same given
tokens, in turns (off first in each round), each from a context of its own and from the experts that the arm before
left. The ratio compares, token by token, the medians over the rounds; in brackets that of the single rounds, lowest and
highest. Before the first round the arms run once, uncounted; `auto` for as long as it takes to come to a decision.

Arms: `off`, the rules of --lookahead, and `perfect`: fetching what the next layer will indeed use, as recorded in the
uncounted pass of `off`. No rule that looks one layer ahead can do better, so it is the ceiling of the others.

`plan tok/s` is what `moe-edge plan --trace` says of the cell before it ran, with a trace of another text (--plan-text),
and `of bench` that over the measured speed of `off`; a free disk is taken to be as fast as it was while `off` read,
since here it varies by a factor of ten within minutes.

Slower disks are the engine's own pacing (EngineOptions.disk_bytes_per_second), not a cgroup limit: the kernel's
throttle lets a process that did not read for some milliseconds read so much faster afterwards that hiding reads behind
computing gains nothing there. A disk does not save up its idle time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import limits
import texts
from compare import drop_page_cache, parse_speed
from lossy import ram_for
from moe_edge.models.store.store import open_model
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.plan import plan
from moe_edge.runner.measure.record import record_trace
from moe_edge.schedulers.budget import MIB, PROGRAM_ALLOWANCE_BYTES
from moe_edge.schedulers.layout import Ahead, Layout, Step, StepPlan
from moe_edge.schedulers.lookahead.around import LookAheadPolicy
from moe_edge.schedulers.lookahead.rules import LOOKAHEADS
from moe_edge.schedulers.lookahead.rules.rule import Predicted, Served
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policy import Policy, make_policy
from moe_edge.schedulers.replay.trace import Trace
from worker import Decoder, die_with_parent

N_CTX, N_UBATCH = 1024, 32
WARM_TOKENS = 8
LEAST_TOKENS = 16
PLAN_TOKENS = 400
DECIDE_TOKENS, DECIDE_SECONDS = 160, 30.0  # until `auto` has had a trial or two
PERFECT = "perfect"


@dataclass(frozen=True)
class Cell:
    """What one process runs. seconds: how long a pass of `off` should take; its tokens are chosen by that.

    join: cgroup.procs files of the groups to enter. disk_bytes_per_second None: the disk as it is.
    """

    model: str
    tokens: list[int]
    ram_bytes: int
    disk_bytes_per_second: int | None
    arms: list[str]
    rounds: int
    seconds: float
    n_threads: int
    join: list[str]
    least_tokens: int = LEAST_TOKENS


class Recorded:
    """A rule that knows: the experts of the next layer in each token, as they were recorded."""

    depth = 1

    def __init__(self, recorded: Sequence[dict[int, Sequence[int]]]) -> None:
        self._recorded = recorded
        self.restart()

    def restart(self) -> None:
        self._token, self._last = 0, -1

    def predict(self, layer: int, ahead: Sequence[Ahead], width: int, n_used: int, served: Served) -> list[Predicted]:
        self._token += layer <= self._last
        self._last = layer
        return [Predicted(layer + 1, expert, 1.0) for expert in self._recorded[self._token].get(layer + 1, ())]


class CellRun:
    """The arms of one cell in this process."""

    def __init__(self, cell: Cell, engine: Engine) -> None:
        self._cell, self._engine = cell, engine
        self._decoder = Decoder(engine.llama._ctx.ctx, engine.llama._model.model, engine.n_ubatch)
        self._recorded: list[dict[int, Sequence[int]]] = []
        self._rule = Recorded(self._recorded)
        self._policies: dict[str, Policy] = {}
        self._n_tokens = 0

    def run(self) -> dict[str, Any]:
        self._n_tokens = min(len(self._cell.tokens), WARM_TOKENS + LEAST_TOKENS)
        took = self._pass("off")["token_s"]
        wanted = max(self._cell.least_tokens, int(self._cell.seconds / took))
        self._n_tokens = min(len(self._cell.tokens), WARM_TOKENS + wanted)
        self._record()
        for arm in self._cell.arms[1:]:
            n, until = DECIDE_TOKENS if arm == "auto" else self._n_tokens, time.monotonic() + DECIDE_SECONDS
            while n > 0:
                n -= self._n_tokens
                self._pass(arm)
                n = n if time.monotonic() < until else 0
        passes = [self._pass(arm) for _ in range(self._cell.rounds) for arm in self._cell.arms]
        facts = {"arena_bytes": self._engine.plan.arena_bytes, "ram_bytes": self._engine.plan.budget_bytes}
        return {"passes": passes, "n_tokens": self._n_tokens - WARM_TOKENS, **facts}

    def _policy(self, arm: str) -> Policy:
        made = self._policies.get(arm)
        if made is None:
            layout, arena_bytes = self._engine.layout, self._engine.plan.arena_bytes
            inner = make_policy(PolicyOptions(lookahead="off" if arm == PERFECT else arm), layout, arena_bytes)
            made = self._perfect(inner, layout) if arm == PERFECT else inner
            self._policies[arm] = made
        return made

    def _perfect(self, inner: Any, layout: Layout) -> LookAheadPolicy:
        return LookAheadPolicy(inner, layout, "single", self._rule)

    def _record(self) -> None:
        """One pass of `off` that keeps which experts each token used."""
        engine = self._engine
        engine._use(self._policy("off"))
        schedule = engine.native.schedule
        assert schedule is not None

        def watched(step: Step) -> StepPlan | None:
            if step.layer == 0:
                self._recorded.append({})
            self._recorded[-1][step.layer] = list(step.experts)
            return schedule(step)

        engine.native.schedule = watched
        self._decoder.clear()
        with engine.decoding():
            for token in self._cell.tokens[: self._n_tokens]:
                self._decoder.feed([token])

    def _pass(self, arm: str) -> dict[str, Any]:
        engine = self._engine
        engine._use(self._policy(arm))
        self._rule.restart()
        self._decoder.clear()
        seconds = []
        best = []
        before = engine.counters()
        with engine.decoding():
            for at, token in enumerate(self._cell.tokens[: self._n_tokens]):
                if at == WARM_TOKENS:
                    before = engine.counters()
                t0 = time.perf_counter()
                logits = self._decoder.feed([token])
                seconds.append(time.perf_counter() - t0)
                best.append(int(logits.argmax()))
        policy = self._policies[arm]
        controller = policy.controller if isinstance(policy, LookAheadPolicy) else None
        timed = seconds[WARM_TOKENS:]
        return {
            "arm": arm,
            "token_s": sum(timed) / len(timed),
            "seconds": [round(s, 6) for s in timed],
            "argmax": hash(tuple(best)),
            "on": None if controller is None else controller.pays,
            "counts": asdict(engine.counters().since(before)),
        }


def engine_options(ram_bytes: int | None, n_threads: int, disk_bytes_per_second: int | None) -> EngineOptions:
    return EngineOptions(
        ram_bytes=ram_bytes, n_ctx=N_CTX, n_threads=n_threads, flash_attn=False, n_ubatch=N_UBATCH,
        disk_bytes_per_second=disk_bytes_per_second,
    )  # fmt: skip


def run_cell(cell: Cell) -> dict[str, Any]:
    with Engine(cell.model, engine_options(cell.ram_bytes, cell.n_threads, cell.disk_bytes_per_second)) as engine:
        return CellRun(cell, engine).run()


def in_child(cell: Cell) -> dict[str, Any]:
    """run_cell() in a process that enters its groups first. Raises RuntimeError with its last words."""
    with tempfile.TemporaryDirectory(prefix="moe-edge-bench-") as folder:
        path = Path(folder) / "cell.json"
        path.write_text(json.dumps(asdict(cell)))
        command = [sys.executable, __file__, "--cell", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def typical_token_s(passes: Sequence[dict[str, Any]]) -> float:
    """Seconds a token: of each token the median over the rounds, so that a disk that stalls once does not count."""
    return statistics.mean(map(statistics.median, zip(*(p["seconds"] for p in passes), strict=True)))  # type: ignore[no-any-return]


def row(share: float, disk: int | None, cell: dict[str, Any], arms: Sequence[str], planned_tok_s: float) -> str:
    of = {arm: [p for p in cell["passes"] if p["arm"] == arm] for arm in arms}
    off = of["off"]
    base = typical_token_s(off)
    ranges = [1e3 * f(p["token_s"] for p in off) for f in (min, max)]
    counts = [p["counts"] for p in off]
    n = cell["n_tokens"]
    busy = statistics.median(c["disk_busy_seconds"] for c in counts) / n
    cells = [
        f"{share:.0%}",
        "free" if disk is None else f"{disk / 1e6:.0f}",
        f"{1e3 * base:.1f} ({ranges[0]:.1f}-{ranges[1]:.1f})",
        f"{statistics.median(c['bytes_read'] for c in counts) / n / 1e6:.0f}",
        f"{busy / base:.0%}",
    ]
    for arm in arms[1:]:
        ratio = base / typical_token_s(of[arm])
        ratios = [a["token_s"] / b["token_s"] for a, b in zip(off, of[arm], strict=True)]
        on = "" if of[arm][-1]["on"] is None else " on" if of[arm][-1]["on"] else " off"
        cells.append(f"{ratio:.2f}x ({min(ratios):.2f}-{max(ratios):.2f}){on}")
    share_of = [c["schedule_seconds"] / (n * p["token_s"]) for p, c in zip(off, counts, strict=True)]
    cells += [f"{statistics.median(share_of):.1%}", f"{planned_tok_s:.1f}", f"{planned_tok_s * base:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plan-text", type=Path, required=True, help="for plan's trace")
    parser.add_argument("--share", default="25,40,60", help="of the experts in memory, per cent")
    parser.add_argument("--disk", default="90MB/s,440MB/s,none")
    parser.add_argument("--lookahead", default="auto", help="rules to compare, comma separated; empty: only `off`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a pass, about")
    parser.add_argument("--tokens", type=int, default=LEAST_TOKENS, help="of a pass, at least")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="every pass with all its counts")
    o = parser.parse_args(arguments)
    arms = ["off", *o.lookahead.split(","), PERFECT] if o.lookahead else ["off"]
    unknown = [each for each in arms[1:-1] if each not in LOOKAHEADS]
    if unknown:
        parser.error(f"unknown look-ahead '{unknown[0]}'; known: {', '.join(LOOKAHEADS)}")
    opened = open_model(o.model)
    _, text = texts.read_text(o.text)
    tokens = texts.pick_tokens(opened.skeleton, text, 1, N_CTX - 1)[0]
    print(f"{o.model}, {o.threads} threads, {o.rounds} rounds of passes of about {o.seconds:g} s")
    titles = ["experts", "disk MB/s", "off ms/token (range)", "MB/token", "disk busy", *arms[1:], "scheduler"]
    titles += ["plan tok/s", "of bench"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|", flush=True)
    kept = []
    trace = other_trace(o)
    for disk in map(parse_speed, o.disk.split(",")):
        for share in (float(each) / 100 for each in o.share.split(",")):
            ram = ram_for(o.model, share, N_CTX, N_UBATCH, o.threads)
            cap = ram + PROGRAM_ALLOWANCE_BYTES + 16 * MIB
            with limits.Limits(cap, None, opened.files[0]) as groups:
                drop_page_cache([*opened.files, opened.skeleton], everything=True)
                name = str(o.model.absolute())
                cell = Cell(name, tokens, ram, disk, arms, o.rounds, o.seconds, o.threads, groups.join, o.tokens)
                done = in_child(cell)
            if len({p["argmax"] for p in done["passes"]}) != 1:
                raise RuntimeError(f"{share:.0%} at {disk}: the arms do not predict the same tokens")
            planned = planned_tok_s(o, done, ram, disk, trace)
            kept.append({"share": share, "disk": disk, "planned_tok_s": planned, **done})
            print(row(share, disk, done, arms, planned), flush=True)
    if o.json:
        o.json.write_text(json.dumps(kept))
    return 0


def other_trace(o: argparse.Namespace) -> Trace:
    """The routing of PLAN_TOKENS tokens of the other text, one by one."""
    _, text = texts.read_text(o.plan_text)
    tokens = texts.pick_tokens(open_model(o.model).skeleton, text, 1, PLAN_TOKENS)[0]
    with Engine(o.model, engine_options(None, o.threads, None)) as engine:
        return record_trace(engine, tokens)


def planned_tok_s(
    o: argparse.Namespace, done: dict[str, Any], ram: int, disk: int | None, trace: Trace
) -> float:  # fmt: skip
    """What `plan` expects; see the top for the disk."""
    off = [p["counts"] for p in done["passes"] if p["arm"] == "off"]
    speed = disk or statistics.median(c["bytes_read"] / c["disk_busy_seconds"] for c in off)
    found = plan(
        o.model, ram, n_ctx=N_CTX, n_ubatch=N_UBATCH, n_threads=o.threads, disk_bytes_per_second=speed, trace=trace
    )
    assert found.estimate is not None
    return found.estimate.tokens_per_second.expected


def child(path: str) -> int:
    cell = Cell(**json.loads(Path(path).read_text()))
    die_with_parent()
    for procs in cell.join:
        Path(procs).write_text(str(os.getpid()))
    print(json.dumps(run_cell(cell)))
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2]) if sys.argv[1:2] == ["--cell"] else main())
