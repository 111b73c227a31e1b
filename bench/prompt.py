"""Where a prompt's time goes: time to the first token over prompt lengths and disk speeds, and what binds.

    python bench/prompt.py big.gguf --cap 8GiB --prompt 128,512,2048 --disk 1200MB/s,440MB/s,90MB/s --rounds 2

Arms, in turns: `moe-edge` under the cap, with its reads paced by the engine as a disk of that speed; `stock-mmap` under
the same cap, slowed by the kernel's throttle, which is kind to it: it lets a process that did not read for a while read
faster afterwards; `moe-edge`, no cap, the prompt a second time, so that all its experts are in memory (`computing`);
and `stock-read`, no cap. Page caches are dropped before each. A cell's cold row is the first prompt of a process, its
warm row the second, of another text. `read MB` are those of experts; `unused` were read ahead and dropped again.

`bound` is the larger of computing alone and of the bytes read over the disk's speed; `over` is the time over that.
`planned` is what `moe-edge plan` says of the cold row over what was measured: before anything ran, and after, when it
knows what share of the experts these prompts touched (runner/touched_file.py); both alike where it knew before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import limits
import texts
from compare import drop_page_cache, parse_cap, parse_speed, run_worker
from moe_edge.models.formats.gguf import open_gguf
from moe_edge.models.store.skeleton import skeleton_for
from moe_edge.runner.measure.plan import plan
from moe_edge.schedulers.budget import PROGRAM_ALLOWANCE_BYTES
from worker import Job

CONTEXT_STEP = 256
N_TOKENS = 2  # decoded behind each prompt, and not looked at


@dataclass
class Cell:
    """Seconds to the first token of every round, by arm and by state; and what moe-edge read, in bytes."""

    n_prompt: int
    disk: int | None
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    read_bytes: dict[str, list[float]] = field(default_factory=dict)
    unused_bytes: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    planned: float | None = None
    planned_after: float | None = None

    def median(self, arm: str, state: str) -> float | None:
        found = self.seconds.get((arm, state))
        return statistics.median(found) if found else None


class Bench:
    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        parts = [part.path for part in open_gguf(o.model).parts]
        self.files = [*parts, skeleton_for(o.model)]
        self.cap = parse_cap(o.cap, sum(path.stat().st_size for path in parts))
        self.computing: dict[int, list[float]] = {}
        self.stock: dict[int, list[float]] = {}

    def job(self, arm: str, n_prompt: int, join: list[str], *, capped: bool, pace: int | None) -> Job:
        """Two texts under a cap, one text twice without."""
        o = self.o
        n_ctx = -(-(n_prompt + N_TOKENS + 2) // CONTEXT_STEP) * CONTEXT_STEP
        _, text = texts.read_text(o.text)
        tokens = texts.pick_tokens(o.model, text, 2, n_prompt + N_TOKENS + 1)
        tokens = tokens if capped else tokens[:1] * 2
        ram = self.cap - PROGRAM_ALLOWANCE_BYTES if capped and self.cap is not None else None
        ubatch = min(o.ubatch, max(n_prompt, 32))
        return Job(arm, str(o.model.absolute()), tokens, n_prompt, n_ctx, ubatch, o.threads, ram, join, pace=pace)

    def passes(self, arm: str, n_prompt: int, disk: int | None, *, capped: bool) -> list[dict[str, Any]] | str:
        """The prompts that one process ran, or why there are none."""
        throttle = disk if arm != "moe-edge" and capped else None
        pace = disk if arm == "moe-edge" and capped else None
        try:
            with limits.Limits(self.cap if capped else None, throttle, self.o.model) as groups:
                drop_page_cache(self.files, everything=True)
                done = run_worker(self.job(arm, n_prompt, groups.join, capped=capped, pace=pace), self.o.timeout)
        except limits.NotPossible as why:
            return str(why)
        if "error" in done:
            return str(done["error"])
        found: list[dict[str, Any]] = done["passes"]
        return found

    def unlimited(self, n_prompt: int) -> None:
        """Computing alone: the second prompt of a process that holds everything in memory."""
        for arm, kept in (("moe-edge", self.computing), ("stock-read", self.stock)):
            done = self.passes(arm, n_prompt, None, capped=False)
            if not isinstance(done, str):
                kept.setdefault(n_prompt, []).append(done[-1]["ttft_s"])

    def turn(self, cell: Cell, arm: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {cell.n_prompt} tokens, disk {cell.disk}: {arm}", file=sys.stderr)
        done = self.passes(arm, cell.n_prompt, cell.disk, capped=True)
        if isinstance(done, str):
            cell.missing[arm] = done
            return
        for state, each in zip(("cold", "warm"), done, strict=True):
            cell.seconds.setdefault((arm, state), []).append(each["ttft_s"])
            if arm == "moe-edge":
                cell.read_bytes.setdefault(state, []).append(each["prefill"]["bytes_read"])
                cell.unused_bytes.setdefault(state, []).append(each["prefill"]["wasted_bytes"])

    def planned(self, cell: Cell) -> float | None:
        o = self.o
        job = self.job("moe-edge", cell.n_prompt, [], capped=True, pace=None)
        found = plan(
            o.model, job.ram_bytes, n_ctx=job.n_ctx, n_ubatch=job.n_ubatch, n_threads=o.threads,
            n_prompt=cell.n_prompt, disk_bytes_per_second=cell.disk,
        )  # fmt: skip
        return found.estimate.ttft_seconds.expected if found.estimate else None

    def run(self) -> list[Cell]:
        o = self.o
        disks = [parse_speed(each) for each in o.disk.split(",")]
        cells = [Cell(int(n), disk) for n in o.prompt.split(",") for disk in disks]
        arms = ["moe-edge"] + ([] if o.no_stock else ["stock-mmap"])
        for cell in cells:
            cell.planned = self.planned(cell)
        for _ in range(o.rounds):
            for n_prompt in dict.fromkeys(cell.n_prompt for cell in cells):
                self.unlimited(n_prompt)
            for cell in cells:
                for arm in arms:
                    self.turn(cell, arm)
        for cell in cells:
            cell.planned_after = self.planned(cell)
        return cells


def spread(values: Sequence[float] | None) -> str:
    if not values:
        return "N/A"
    text = f"{statistics.median(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def table(bench: Bench, cells: Sequence[Cell]) -> str:
    lines = [
        "| tokens | disk | prompt | moe-edge s | stock mmap s | ratio | computing s | read MB | unused | bound s | "
        "over | binds | planned |",
        "|" + "---|" * 13,
    ]
    for cell in cells:
        for state in ("cold", "warm"):
            ours, theirs = cell.median("moe-edge", state), cell.median("stock-mmap", state)
            read = statistics.median(cell.read_bytes.get(state, [0.0]))
            unused = statistics.median(cell.unused_bytes.get(state, [0.0]))
            compute = statistics.median(bench.computing.get(cell.n_prompt, [0.0]))
            reading = read / cell.disk if cell.disk else 0.0
            bound = max(compute, reading)
            cells_of_row = [
                str(cell.n_prompt), f"{cell.disk / 1e6:.0f} MB/s" if cell.disk else "as it is", state,
                spread(cell.seconds.get(("moe-edge", state))), spread(cell.seconds.get(("stock-mmap", state))),
                f"{theirs / ours:.1f}x" if ours and theirs else "N/A", f"{compute:.2f}", f"{read / 1e6:.0f}",
                f"{unused / read:.0%}" if read else "", f"{bound:.2f}",
                f"{ours / bound:.2f}x" if ours and bound else "N/A",
                "reading" if reading > compute else "computing",
                f"{cell.planned / ours:.2f}, {cell.planned_after / ours:.2f}"
                if state == "cold" and cell.planned and cell.planned_after and ours
                else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells_of_row) + " |")
        lines += [f"N/A: {arm}: {why}" for arm, why in cell.missing.items()]
    lines.append("")
    for n_prompt, seconds in bench.computing.items():
        stock = bench.stock.get(n_prompt)
        lines.append(f"{n_prompt} tokens, all in memory: moe-edge {spread(seconds)} s, stock {spread(stock)} s")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="a stock GGUF")
    p.add_argument("--cap", default="45%", help="memory of the capped arms: 8GiB or 45%% of the file")
    p.add_argument("--prompt", default="128,512,2048", help="tokens of a prompt, a list")
    p.add_argument("--disk", default="1200MB/s,440MB/s,90MB/s", help="a list; `none`: as it is")
    p.add_argument("--ubatch", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--text", type=Path, help="file to take the texts from")
    p.add_argument("--no-stock", action="store_true", help="leave stock mmap away, which takes most of the time")
    p.add_argument("--timeout", type=float, default=3600.0, help="seconds one process may take")
    o = p.parse_args()
    bench = Bench(o)
    cells = bench.run()
    print(table(bench, cells))
    data = [
        {**vars(cell), "seconds": {" ".join(key): value for key, value in cell.seconds.items()}} for cell in cells
    ]
    print(json.dumps(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
