"""Every cache rule against Belady's, every step one event: fitted on one text, replayed on another; behind a prompt.

    python bench/rules.py MODEL.gguf --calibrate TEXT --text HELDOUT [--tokens 2048] [--parts rules,constants,prompt]

rules: reads of each rule as a multiple of what the event-atomic Belady's rule reads, one token at a time: on the
held-out text from an empty memory, and behind the calibration text, with what the rule has learned there.
constants: those of the learned rule, the best of a grid on one text replayed on the other, both ways.
prompt: reads of 64 tokens decoded behind a prompt of 512, as a multiple of what the same tokens read when the 512 were
decoded one by one before them; counted by a replay and by the engine.
Texts are taken in chunks of 256 tokens, evenly spread. Nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import MoeEdgeError
from moe_edge.runner.calibrate.observe import spread_chunks
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.logits import IntArray, cut_chunks, read_text, tokenize_text
from moe_edge.runner.measure.record import TraceRecorder, record_trace
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.eviction import ENTRIES
from moe_edge.schedulers.eviction.learned import Learned
from moe_edge.schedulers.eviction.next_use import NextUse
from moe_edge.schedulers.layout import SKIP, Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.replay.belady import Belady
from moe_edge.schedulers.replay.simulate import MakePlanner, Planner, simulate
from moe_edge.schedulers.replay.trace import Trace

SHARES = (0.13, 0.25, 0.40, 0.60)
CHUNK = 256
PROMPT, DECODED = 512, 64
SHARE, RATE, WAIT = (0.5, 0.7, 0.9), (0.025, 0.05, 0.1), (0.15, 0.25, 0.4)  # of the learned rule; those in use inside


@dataclass(frozen=True)
class Options:
    model: Path
    calibrate: Path
    text: Path
    tokens: int = 2048
    chunks: int = 16  # of the part `prompt`
    shares: tuple[float, ...] = SHARES
    parts: tuple[str, ...] = ("rules", "constants", "prompt")


# ---- replaying ---------------------------------------------------------------------------------------------


class Watched:
    """A planner that counts the units it reads, micro-batch by micro-batch."""

    def __init__(self, inner: Planner, layout: Layout) -> None:
        self._inner, self._layout = inner, layout
        self._memory: set[int] = set()
        self._last = layout.n_layers
        self.loads: list[int] = []

    def reset(self, resident: Any) -> None:
        self._inner.reset(resident)
        self._memory = set(resident)

    def plan(self, step: Step) -> StepPlan | None:
        if step.layer <= self._last:
            self.loads.append(0)
        self._last = step.layer
        plan = self._inner.plan(step)
        if plan is not None:
            first, n_levels = self._layout.first_unit[step.layer], self._layout.n_levels
            for at, level, gone in zip(*plan, strict=True):
                self._memory.difference_update(gone)
                unit = first + step.experts[at] * n_levels + level
                if level != SKIP and unit not in self._memory:
                    self._memory.add(unit)
                    self.loads[-1] += 1
        return plan

    def meanwhile(self, step: Step) -> Sequence[Prefetch]:
        ahead = self._inner.meanwhile(step)
        for unit, gone in ahead:
            self._memory.difference_update(gone)
            self._memory.add(unit)
            self.loads[-1] += 1
        return ahead


def loads_of(trace: Trace, make: MakePlanner, arena_bytes: int, *, atomic: bool = True) -> list[int]:
    """Units read in each micro-batch. atomic: every step is one event; else as the engine has it."""
    watched: list[Watched] = []

    def watch(layout: Layout, arena: int) -> Planner:
        watched.append(Watched(make(layout, arena), layout))
        return watched[0]

    simulate(trace, watch, arena_bytes, atomic=atomic)
    return watched[0].loads


def of_rule(name: str) -> MakePlanner:
    def make(layout: Layout, arena_bytes: int) -> Planner:
        policy = make_policy(PolicyOptions(cache=name), layout, arena_bytes)
        policy.cache.streams = False
        return policy

    return make


def of_belady(trace: Trace) -> MakePlanner:
    return lambda layout, arena: Belady(trace, layout, arena, atomic=True)


def of_constants(share: float, rate: float, wait: float) -> MakePlanner:
    """The learned rule with other constants than its own."""

    class Other(Learned):
        SHARE, RATE = share, rate

        def _set_least(self, layer: int, least: float) -> None:
            kept, NextUse.WAIT = NextUse.WAIT, wait
            super()._set_least(layer, least)
            NextUse.WAIT = kept

    def make(layout: Layout, arena_bytes: int) -> Planner:
        policy = ExactLru(layout, arena_bytes)
        policy.cache = ExpertCache(layout, arena_bytes, Other(layout, arena_bytes))
        policy.cache.streams = False
        return policy

    return make


def joined(first: Trace, second: Trace) -> Trace:
    """One trace behind the other."""
    both: dict[str, Any] = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("batch_tokens", "step_tokens", "experts", "weights")
    }
    starts = np.concatenate([first.chunk_starts, second.chunk_starts + len(first.batch_tokens)]).astype(np.int32)
    return replace(
        first, **both, chunk_starts=starts, compute_seconds=None, other_seconds=None, recorded=None, attention=None,
        ahead_experts=None, ahead_scores=None,
    )  # fmt: skip


# ---- the parts ---------------------------------------------------------------------------------------------


def rules(calibration: Trace, heldout: Trace, shares: Sequence[float]) -> list[dict[str, Any]]:
    total, both, n = heldout.layout().total_bytes, joined(calibration, heldout), len(calibration.batch_tokens)
    rows = []
    for share in shares:
        arena = int(share * total)
        for warm, trace, start in (("cold", heldout, 0), ("warm", both, n)):
            best = sum(loads_of(trace, of_belady(trace), arena)[start:])
            for name in ENTRIES:
                found = sum(loads_of(trace, of_rule(name), arena)[start:])
                rows.append({"share": share, "start": warm, "rule": name, "loads": found, "belady": best})
    return rows


def constants(calibration: Trace, heldout: Trace, shares: Sequence[float]) -> list[dict[str, Any]]:
    """The best constants on one text, replayed on the other."""
    rows = []
    for share in shares:
        arena = int(share * heldout.layout().total_bytes)
        found: dict[str, dict[tuple[float, ...], int]] = {"calibration": {}, "heldout": {}}
        for each in itertools.product(SHARE, RATE, WAIT):
            for name, trace in (("calibration", calibration), ("heldout", heldout)):
                found[name][each] = sum(loads_of(trace, of_constants(*each), arena))
        for fitted, on in (("calibration", "heldout"), ("heldout", "calibration")):
            best = min(found[fitted], key=found[fitted].__getitem__)
            trace = heldout if on == "heldout" else calibration
            rows.append({
                "share": share, "fitted_on": fitted, "replayed_on": on, "constants": best, "loads": found[on][best],
                "in_use": found[on][Learned.SHARE, Learned.RATE, NextUse.WAIT], "best_there": min(found[on].values()),
                "belady": sum(loads_of(trace, of_belady(trace), arena)),
            })  # fmt: skip
    return rows


def behind_a_prompt(model: Path, chunks: IntArray, shares: Sequence[float]) -> list[dict[str, Any]]:
    """[replayed and counted] reads of the decoded tokens of all chunks but the first, which warms the memory up."""
    rows = []
    for share in shares:
        for one_by_one in (False, True):
            options = EngineOptions(n_ctx=PROMPT + DECODED, n_ubatch=PROMPT, n_threads=1, proof="nothing")
            dry = Engine(model, replace(options, ram_bytes=NO_LIMIT))
            ram = dry.plan.fixed.total_bytes + int(share * dry.layout.total_bytes)
            dry.close()
            with Engine(model, replace(options, ram_bytes=ram)) as engine:
                trace, counted = traced(engine, chunks, one_by_one)
                arena = engine.plan.arena_bytes
            per_chunk = len(trace.batch_tokens) // len(chunks)
            for atomic in (False, True):
                loads = np.array(loads_as(trace, arena, atomic)).reshape(len(chunks), per_chunk)
                rows.append({
                    "share": share, "prompt": not one_by_one, "atomic": atomic, "counted": counted[1:],
                    "replayed": loads[1:, -DECODED:].sum(1).tolist(),
                })  # fmt: skip
    return rows


def loads_as(trace: Trace, arena_bytes: int, atomic: bool) -> list[int]:
    """Units read in each micro-batch under the default rule, steps one event or as in the engine."""
    if atomic:
        return loads_of(trace, of_rule("auto"), arena_bytes)
    return loads_of(trace, lambda layout, arena: make_policy(PolicyOptions(), layout, arena), arena_bytes, atomic=False)


def traced(engine: Engine, chunks: IntArray, one_by_one: bool) -> tuple[Trace, list[int]]:
    """A trace of the chunks, each a prompt and the tokens behind it; and what the engine read for those."""
    recorder = TraceRecorder(engine, chunks.size)
    engine.policy.measure_prompts(None)  # a replay has no clock
    engine.native.observe = recorder.observe
    counted = []
    for chunk in chunks.tolist():
        engine.llama.reset()
        engine.llama._ctx.kv_cache_clear()
        prompt, decoded = chunk[:PROMPT], chunk[PROMPT:]
        for i, piece in enumerate([*([[t] for t in prompt] if one_by_one else [prompt]), *([t] for t in decoded)]):
            if i == (PROMPT if one_by_one else 1):
                before = engine.counters()
            recorder.begin(len(piece), starts_chunk=i == 0)
            with engine.decoding():
                engine.llama.eval(piece)
            recorder.end()
        counted.append(engine.counters().since(before).loads)
    engine.native.observe = None
    return recorder.trace(), counted


# ---- texts, tables, command --------------------------------------------------------------------------------


def chunks_of(model: Path, text: Path, size: int, n: int) -> IntArray:
    with Engine(model, EngineOptions(n_ctx=CHUNK, n_threads=1)) as engine:
        tokens = tokenize_text(engine, read_text(text))
    return spread_chunks(cut_chunks(tokens, size), n * size)


def trace_of(model: Path, text: Path, n_tokens: int) -> Trace:
    chunks = chunks_of(model, text, CHUNK, n_tokens // CHUNK)
    with Engine(model, EngineOptions(n_ctx=CHUNK, n_threads=1, proof="nothing")) as engine:
        return record_trace(engine, [int(token) for token in chunks.ravel()])


def lines_of(part: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    if part == "rules":
        for start in ("cold", "warm"):
            mine = [row for row in rows if row["start"] == start]
            yield f"{start} | " + " | ".join(f"{share:.0%}" for share in dict.fromkeys(r["share"] for r in mine))
            for name in dict.fromkeys(row["rule"] for row in mine):
                yield f"{name} | " + " | ".join(f"{r['loads'] / r['belady']:.3f}" for r in mine if r["rule"] == name)
    elif part == "constants":
        for row in rows:
            ratios = ", ".join(f"{key} {row[key] / row['belady']:.3f}" for key in ("loads", "in_use", "best_there"))
            yield f"{row['share']:.0%}, {row['fitted_on']} -> {row['replayed_on']}: {row['constants']}: {ratios}"
    else:
        for share, atomic in dict.fromkeys((row["share"], row["atomic"]) for row in rows):
            prompt, steady = (
                next(r for r in rows if (r["share"], r["atomic"], r["prompt"]) == (share, atomic, which))
                for which in (True, False)
            )
            for how in ("replayed", "counted"):
                a, b = sum(prompt[how]), sum(steady[how])
                yield f"{share:.0%}, {'atomic' if atomic else 'streamed'}, {how}: {a} / {b} = {a / b:.3f}"


def run(o: Options) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if {"rules", "constants"} & set(o.parts):
        calibration, heldout = (trace_of(o.model, text, o.tokens) for text in (o.calibrate, o.text))
    for part in o.parts:
        if part == "prompt":
            chunks = chunks_of(o.model, o.text, PROMPT + DECODED, o.chunks)
            rows = behind_a_prompt(o.model, chunks, o.shares)
        else:
            rows = (rules if part == "rules" else constants)(calibration, heldout, o.shares)
        result[part] = rows
        print("\n".join([f"## {part}", *lines_of(part, rows), ""]), flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--calibrate", type=Path, required=True, help="text to fit on")
    p.add_argument("--text", type=Path, required=True, help="held-out text to replay on")
    p.add_argument("--tokens", type=int, default=2048, help="of each text (default 2048)")
    p.add_argument("--chunks", type=int, default=16, help="prompts of the part `prompt` (default 16)")
    p.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the experts in memory")
    p.add_argument("--parts", default="rules,constants,prompt")
    a = p.parse_args(arguments)
    try:
        shares = tuple(map(float, a.shares.split(",")))
        o = Options(a.model, a.calibrate, a.text, a.tokens, a.chunks, shares, tuple(a.parts.split(",")))
        print(json.dumps(run(o)))
    except MoeEdgeError as error:
        print(f"rules.py: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
