"""What a lossy policy gains in speed: exact and lossy in turns on one converted model, same cap, same disk.

    python bench/lossy.py big.gguf --text held.txt --share 0.333 --disk 440MB/s --rounds 3 \
        --arm 'dymoe:{"retention": 0.75}' --arm 'damage:{"price": 0.0003}'

Every run is a process of its own in a memory cgroup of --ram plus 80 MiB with its page cache dropped before, the arms
in turns (exact first in each round), on given tokens. bench/pareto.py measures KLD; here is the loss of the text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import limits
import texts
from compare import drop_page_cache, parse_speed, run_worker
from moe_edge.models.store.store import open_model
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.budget import MIB, PROGRAM_ALLOWANCE_BYTES, format_bytes
from worker import Job

SHOWN = ("tok_s", "ttft_s", "nll")


def ram_for(model: Path, share: float, n_ctx: int, n_ubatch: int, n_threads: int) -> int:
    """--ram that gives the arena this share of the high level's expert bytes."""
    options = EngineOptions(n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, flash_attn=False)
    sizes = sizes_of(model, options)
    return sizes.plan.fixed.total_bytes + int(share * sizes.layout.total_bytes)


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    """`dymoe:{"retention": 0.75}` -> (its name in the table, PolicyOptions fields)."""
    name, _, knobs = text.partition(":")
    fields = json.loads(knobs) if knobs else {}
    label = " ".join([name, *(f"{k} {v}" for k, v in fields.items())])
    return label, {"name": name, **fields}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1 / 3)
    parser.add_argument("--disk", type=parse_speed, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-tokens", type=int, default=64)
    parser.add_argument("--n-texts", type=int, default=2, help="given one after the other; the first finds no cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--json", type=Path, help="every run with all its counts")
    o = parser.parse_args(arguments)
    n_ctx = o.n_prompt + o.n_tokens + 1
    arms = [("exact", {}), *map(parse_arm, o.arm)]
    ram = ram_for(o.model, o.share, n_ctx, o.n_prompt, o.threads)
    opened = open_model(o.model)
    _, text = texts.read_text(o.text)
    tokens = texts.pick_tokens(opened.skeleton, text, o.n_texts, n_ctx)
    cap = ram + PROGRAM_ALLOWANCE_BYTES + 16 * MIB
    print(f"{o.model}, --ram {format_bytes(ram)}, disk {o.disk or 'free'}, prompt {o.n_prompt}, {o.n_tokens} decoded")
    results: dict[str, list[dict[str, Any]]] = {label: [] for label, _ in arms}
    for _ in range(o.rounds):
        for label, policy in arms:
            with limits.Limits(cap, o.disk, opened.files[0]) as groups:
                drop_page_cache([*opened.files, opened.skeleton], everything=True)
                job = Job(
                    "moe-edge", str(o.model.absolute()), tokens, o.n_prompt, n_ctx, o.n_prompt, o.threads, ram,
                    groups.join, policy,
                )  # fmt: skip
                done = run_worker(job, 1800)
            if "error" in done:
                print(f"{label}: {done['error']}", file=sys.stderr)
                return 1
            results[label] += done["passes"]
            last = done["passes"][-1]
            print(f"  {label}: {last['tok_s']:.2f} tok/s, first token {last['ttft_s']:.2f} s", file=sys.stderr)
    columns = "arm, tok/s (range), of exact, first token s (range), of exact, MB/token, MB prompt, low, skipped, NLL"
    print(f"| {columns.replace(', ', ' | ')} |\n{'|---' * 10}|")
    base = {key: statistics.median(p[key] for p in results["exact"]) for key in SHOWN}
    for label, passes in results.items():
        mid = {key: statistics.median(p[key] for p in passes) for key in SHOWN}
        low, high = min(p["tok_s"] for p in passes), max(p["tok_s"] for p in passes)
        first = [p["ttft_s"] for p in passes]
        decode = [p["decode"] for p in passes]
        uses = sum(d["uses"] + d["skipped_uses"] for d in decode)
        print(
            f"| {label} | {mid['tok_s']:.2f} ({low:.2f}-{high:.2f}) | {mid['tok_s'] / base['tok_s']:.2f}x | "
            f"{mid['ttft_s']:.2f} ({min(first):.2f}-{max(first):.2f}) | {base['ttft_s'] / mid['ttft_s']:.2f}x | "
            f"{sum(d['bytes_read'] for d in decode) / len(passes) / passes[0]['n_decoded'] / 1e6:.1f} | "
            f"{statistics.mean(p['prefill']['bytes_read'] for p in passes) / 1e6:.0f} | "
            f"{sum(d['low_uses'] for d in decode) / uses:.0%} | {sum(d['skipped_uses'] for d in decode) / uses:.0%} | "
            f"{mid['nll']:.4f} |"
        )
    if o.json:
        o.json.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
