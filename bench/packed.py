"""Packed experts against raw ones: the same model converted twice, at shares of its experts and speeds of the disk.

    moe-edge convert BF16.gguf -o raw.gguf; moe-edge convert BF16.gguf -o packed.gguf --pack planes
    python bench/packed.py raw.gguf packed.gguf --shares 25,40,60 --disks none,440MB/s

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
from moe_edge.runner.sizes import sizes_of

ARMS = ("raw", "packed")


def work(path: Path, share: int, pace: int, n_prompt: int, n_tokens: int) -> dict[str, Any]:
    """One run: a prompt, then tokens one by one. Seconds and counts."""
    options = EngineOptions(n_ctx=n_prompt + n_tokens + 8, n_threads=0)
    sizes = sizes_of(path, options)
    arena = sizes.layout.total_bytes * share // 100
    options = EngineOptions(
        n_ctx=options.n_ctx, n_threads=0, ram_bytes=sizes.plan.fixed.total_bytes + arena, proof="nothing"
    )
    tokens = random.Random(7).choices(range(3, 250), k=n_prompt + n_tokens)
    with Engine(path, options) as engine, engine.decoding():
        engine.native.pace(pace)
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
        "hits": c.hits / c.uses, "arena": arena,
    }  # fmt: skip


def run(path: Path, share: int, pace: int, o: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", str(path), str(share), str(pace), str(o.prompt), str(o.tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        path, *numbers = sys.argv[2:]
        print(json.dumps(work(Path(path), *map(int, numbers))))
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("raw", type=Path)
    p.add_argument("packed", type=Path)
    p.add_argument("--shares", default="25,40,60", help="percent of the experts' bytes in memory")
    p.add_argument("--disks", default="none,440MB/s", help="none: as it is")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--tokens", type=int, default=48)
    o = p.parse_args()
    rows = []
    for disk in o.disks.split(","):
        pace = 0 if disk == "none" else parse_disk_speed(disk)
        for share in map(int, o.shares.split(",")):
            found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
            for _ in range(o.rounds):
                for arm in ARMS:
                    found[arm].append(run(getattr(o, arm), share, pace, o))
            row: dict[str, Any] = {"disk": disk, "share": share, "runs": found}
            medians = {a: {k: statistics.median(r[k] for r in found[a]) for k in found[a][0]} for a in ARMS}
            row["decode_ratio"] = medians["packed"]["tok_s"] / medians["raw"]["tok_s"]
            row["ttft_ratio"] = medians["raw"]["prefill_s"] / medians["packed"]["prefill_s"]
            rows.append(row)
            print(
                f"{disk:9} {share:3} %: decode raw {spread([r['tok_s'] for r in found['raw']])} packed "
                f"{spread([r['tok_s'] for r in found['packed']])} tok/s, {row['decode_ratio']:.2f}x; prompt raw "
                f"{spread([r['prefill_s'] for r in found['raw']])} packed "
                f"{spread([r['prefill_s'] for r in found['packed']])} s, {row['ttft_ratio']:.2f}x; "
                f"{medians['raw']['bytes_per_token'] / 1e6:.0f} and {medians['packed']['bytes_per_token'] / 1e6:.0f} "
                f"MB a token, hits {100 * medians['raw']['hits']:.0f} %",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
