"""Packed experts against raw ones: the same model converted twice, at shares of its experts and speeds of the disk.

    moe-edge convert BF16.gguf -o raw.gguf; moe-edge convert BF16.gguf -o packed.gguf --pack planes
    python bench/packed.py raw.gguf packed.gguf --shares 25,40,60 --disks none,440MB/s
    python bench/packed.py raw.gguf packed.gguf --arms packed,packed:auto,packed:80%   # with and without packed cache

An arm is raw or packed, with `:` and a --packed-cache behind it, off unless named. The first arm is what the others are
compared with. auto needs `moe-edge doctor`, once; the planner is then told the disk that the reads are paced as.

Arms in turns, each in a process of its own, with the same tokens: random ones, so that a random model routes widely.
Prints a row for each cell, medians and (lowest - highest) over the rounds, and JSON at the end. Reads are paced by the
engine itself, as a disk of that speed would serve them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moe_edge.runner.commands.parameters import parse_disk_speed
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.packed_split import auto_split
from moe_edge.runner.sizes import sizes_of

ARMS = "raw,packed"


def work(path: Path, packed_cache: str, share: int, pace: int, n_prompt: int, n_tokens: int) -> dict[str, Any]:
    """One run: a prompt, then tokens one by one. Seconds and counts."""
    options = EngineOptions(n_ctx=n_prompt + n_tokens + 8, n_threads=0)
    sizes = sizes_of(path, options)
    arena = sizes.layout.total_bytes * share // 100
    options = EngineOptions(
        n_ctx=options.n_ctx, n_threads=0, ram_bytes=sizes.plan.fixed.total_bytes + arena, proof="nothing",
        packed_cache=packed_cache, packed_planner=auto_split, disk_bytes_per_second=pace or None,
    )  # fmt: skip
    tokens = random.Random(7).choices(range(3, 250), k=n_prompt + n_tokens)
    with Engine(path, options) as engine, engine.decoding():
        llama = engine.llama
        started = time.perf_counter()
        llama.eval(tokens[:n_prompt])
        prefill, before = time.perf_counter() - started, engine.counters()
        started = time.perf_counter()
        for token in tokens[n_prompt:]:
            llama.eval([token])
        decode, c = time.perf_counter() - started, engine.counters().since(before)
    return {
        "prefill_s": prefill, "tok_s": n_tokens / decode, "bytes_per_token": c.bytes_read / n_tokens,
        "stall_s": c.stall_seconds / n_tokens, "unpack_s": c.unpack_seconds / n_tokens,
        "hits": c.hits / c.uses, "arena": arena, "packed_cache": engine.plan.packed_bytes,
        "packed_hits": c.packed_hits / c.uses, "part_hits": (c.exponent_hits + c.mantissa_hits) / c.uses,
    }  # fmt: skip


def run(arm: str, share: int, pace: int, o: argparse.Namespace) -> dict[str, Any]:
    model, _, packed_cache = arm.partition(":")
    numbers = map(str, (share, pace, o.prompt, o.tokens))
    command = [sys.executable, __file__, "--worker", str(getattr(o, model)), packed_cache or "off", *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        path, packed_cache, *numbers = sys.argv[2:]
        print(json.dumps(work(Path(path), packed_cache, *map(int, numbers))))
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("raw", type=Path)
    p.add_argument("packed", type=Path)
    p.add_argument("--shares", default="25,40,60", help="percent of the experts' bytes in memory")
    p.add_argument("--disks", default="none,440MB/s", help="none: as it is")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--tokens", type=int, default=48)
    p.add_argument("--arms", default=ARMS, help="like packed,packed:auto,packed:80%%")
    o = p.parse_args()
    arms = o.arms.split(",")
    if any(arm.partition(":")[0] not in ("raw", "packed") for arm in arms):
        p.error(f"--arms {o.arms}: an arm is raw or packed, with a packed cache behind it or without")
    rows = []
    for disk in o.disks.split(","):
        pace = 0 if disk == "none" else parse_disk_speed(disk)
        for share in map(int, o.shares.split(",")):
            found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
            for _ in range(o.rounds):
                for arm in arms:
                    found[arm].append(run(arm, share, pace, o))
            medians = {a: {k: statistics.median(r[k] for r in found[a]) for k in found[a][0]} for a in arms}
            first = medians[arms[0]]
            print(f"{disk}, {share} % of the experts' bytes in memory", flush=True)
            for arm in arms:
                m = medians[arm]
                print(
                    f"  {arm:12} decode {spread([r['tok_s'] for r in found[arm]])} tok/s, "
                    f"{m['tok_s'] / first['tok_s']:.2f}x; prompt {spread([r['prefill_s'] for r in found[arm]])} s, "
                    f"{first['prefill_s'] / m['prefill_s']:.2f}x; {m['bytes_per_token'] / 1e6:.1f} MB a token; hits "
                    f"{100 * m['hits']:.0f} %, packed {100 * m['packed_hits']:.0f} %, parts {100 * m['part_hits']:.0f} "
                    f"%; packed cache {m['packed_cache'] / 1e6:.0f} of {m['arena'] / 1e6:.0f} MB",
                    flush=True,
                )
            rows.append({"disk": disk, "share": share, "runs": found, "medians": medians})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
