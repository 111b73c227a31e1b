"""`moe-edge bench`: what this machine does with a model, in a block to paste.

Probes the storage and the memory, then runs the same prompts at several budgets, each budget in a process of its own so
that its peak memory is its own. The first prompt of a process is the cold row, the others are the warm one.
Against stock llama.cpp, under caps that the kernel enforces: bench/compare.py in the repository.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_edge.models.errors import UsageError, WorkError, printable
from moe_edge.models.store.store import ExpertModel, open_model
from moe_edge.runner.llama_package import llama_build
from moe_edge.runner.measure.probe import disk_bytes_per_second, memory_bytes_per_second
from moe_edge.runner.memory import available_bytes
from moe_edge.schedulers.budget import MIB, format_bytes

PROMPTS = (
    "The history of the lighthouse begins with fires on the shore. Over the centuries",
    "To configure the server, first open the configuration file and set the following parameters:",
    "It was late in the evening when the travellers reached the inn, and the landlord said",
)


@dataclass(frozen=True)
class BenchJob:
    """One process: a model at one budget."""

    model: str
    ram_bytes: int
    n_tokens: int
    n_ctx: int
    n_threads: int
    n_ubatch: int
    n_prompts: int = len(PROMPTS)
    pace_bytes_per_second: int | None = None


@dataclass(frozen=True)
class BenchRow:
    """One line of the table; None where there is nothing to say. Rates in tokens a second, times in seconds."""

    name: str
    ram_bytes: int
    load_s: float
    ttft_s: float
    decode_tok_s: float
    spread_tok_s: tuple[float, float]
    expert_hit_rate: float
    expert_bytes_per_token: float
    stall_s_per_token: float
    peak_rss_bytes: int


def run_job(job: BenchJob) -> list[dict[str, Any]]:
    """Run all prompts of a job in this process; one generation's JSON for each."""
    from moe_edge.runner.engine import Engine
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.runner.generate import Sampling, generate

    options = EngineOptions(
        ram_bytes=job.ram_bytes, n_ctx=job.n_ctx, n_threads=job.n_threads, n_ubatch=job.n_ubatch, charge_program=True,
        disk_bytes_per_second=job.pace_bytes_per_second,
    )  # fmt: skip
    results = []
    with Engine(job.model, options) as engine:
        for prompt in PROMPTS[: job.n_prompts]:
            engine.new_conversation()
            done = generate(engine, prompt, job.n_tokens, Sampling(temp=0), ignore_end=True)
            results.append(done.to_json(engine))
    return results


def run_in_child(job: BenchJob) -> list[dict[str, Any]]:
    """run_job in a child process. Raises WorkError with its last words."""
    child = subprocess.run(
        [sys.executable, "-m", "moe_edge.runner.measure.bench", json.dumps(asdict(job))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode != 0:
        said = [line for line in child.stderr.splitlines() if line.strip()] or [f"status {child.returncode}"]
        kind = UsageError if child.returncode == UsageError.exit_status else WorkError
        raise kind(f"{job.model}: the run at --ram {format_bytes(job.ram_bytes)} failed: {said[-1]}")
    rows: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return rows


def make_row(name: str, results: Sequence[dict[str, Any]]) -> BenchRow:
    """Median and spread over the generations of one row."""
    speeds = [r["decode_tok_s"] for r in results]

    def median(key: str) -> float:
        return float(statistics.median(r[key] for r in results))

    return BenchRow(
        name=name,
        ram_bytes=results[0]["ram_budget_bytes"],
        load_s=results[0]["load_s"],
        ttft_s=median("ttft_s"),
        decode_tok_s=statistics.median(speeds),
        spread_tok_s=(min(speeds), max(speeds)),
        expert_hit_rate=median("expert_hit_rate"),
        expert_bytes_per_token=median("expert_bytes_per_token"),
        stall_s_per_token=statistics.median(r["stall_s"] / max(1, r["generated_tokens"]) for r in results),
        peak_rss_bytes=max(r["peak_rss_bytes"] for r in results),
    )


def default_budgets(facts: dict[str, Any]) -> dict[str, int]:
    """Name -> --ram: a quarter and a half of the experts, and all of them where the machine can hold them."""
    fixed = facts["ram_resident_bytes"] - facts["expert_bytes"]
    wanted = {f"{part} % of experts": fixed + facts["expert_bytes"] * part // 100 for part in (25, 50)}
    wanted["resident"] = facts["ram_resident_bytes"]
    room = available_bytes()
    return {
        name: max(ram, facts["ram_floor_bytes"])
        for name, ram in wanted.items()
        if name != "resident" or ram < room
    }


def bench(
    model: str | Path,
    budgets: dict[str, int] | None,
    n_tokens: int,
    *,
    n_ctx: int = 0,
    n_threads: int = 0,
    n_ubatch: int = 0,
    pace_bytes_per_second: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything `bench --json` prints. budgets: name -> bytes; None for the defaults. pace_bytes_per_second: read
    experts as a disk of this speed would; None: as fast as it is. tell: called before each run.
    """
    from moe_edge.runner.measure.show import describe

    if n_tokens < 2:
        raise UsageError(f"-n {n_tokens}: a speed needs at least 2 tokens")
    facts = describe(model, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads)
    opened: ExpertModel = open_model(Path(model))
    tell("probing storage and memory")
    disk = disk_bytes_per_second(max(opened.files, key=lambda f: f.stat().st_size))
    memory = memory_bytes_per_second(n_threads or 2)
    rows: list[BenchRow] = []
    for name, ram in (budgets or default_budgets(facts)).items():
        tell(f"{name}: --ram {format_bytes(ram)}, {len(PROMPTS)} prompts of {n_tokens} tokens")
        pace = pace_bytes_per_second
        job = BenchJob(str(model), ram, n_tokens, n_ctx, n_threads, n_ubatch, pace_bytes_per_second=pace)
        results = run_in_child(job)
        rows += [make_row(f"{name}, cold", results[:1]), make_row(f"{name}, warm", results[1:])]
    return {
        "machine": machine(),
        "model": facts,
        "n_tokens": n_tokens,
        "disk_bytes_per_second": disk,
        "paced_bytes_per_second": pace_bytes_per_second,
        "memory_bytes_per_second": memory,
        "could_hold_the_model": facts["ram_resident_bytes"] < available_bytes(),
        "rows": [asdict(row) for row in rows],
    }


def machine() -> dict[str, str]:
    """System, processor and versions."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "moe-edge": metadata.version("moe-edge"),
        "llama.cpp": llama_build(),
    }


def markdown(result: dict[str, Any]) -> str:
    """The block to paste."""
    m, f = result["machine"], result["model"]
    disk = result["disk_bytes_per_second"]
    used = f["expert_bytes"] * f["n_expert_used"] / f["n_expert"] + f["dense_bytes"]
    lines = [
        f"**{printable(Path(f['model']).name)}** "
        f"({f['architecture']}, {f['n_moe_layers']} x {f['n_expert']} experts, top {f['n_expert_used']}, "
        f"{format_bytes(f['expert_bytes'])} of experts), moe-edge {m['moe-edge']}, "
        f"{m['llama.cpp']}, {m['system']}, {m['processor']}",
        "",
        f"ceiling: disk {'not measurable by direct reads' if disk is None else f'{disk / 1e6:.0f} MB/s'}, memory "
        f"{result['memory_bytes_per_second'] / 1e9:.1f} GB/s, which allows "
        f"{result['memory_bytes_per_second'] / used:.0f} tok/s; a token uses {format_bytes(int(used))}",
        "",
        "| row | --ram | tok/s | first token | hits | read/token | stall/token | peak RSS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        low, high = r["spread_tok_s"]
        read = format_bytes(int(r["expert_bytes_per_token"]))
        lines.append(
            f"| {r['name']} | {format_bytes(r['ram_bytes'])} | {r['decode_tok_s']:.1f} ({low:.1f}-{high:.1f}) | "
            f"{r['ttft_s']:.2f} s | {100 * r['expert_hit_rate']:.0f} % | {read} | "
            f"{1e3 * r['stall_s_per_token']:.1f} ms | {r['peak_rss_bytes'] / MIB:.0f} MiB |"
        )
    lines += ["", f"{len(PROMPTS)} prompts, {result['n_tokens']} tokens each, greedy; the first is cold, the rest warm"]
    if result["paced_bytes_per_second"]:
        lines.append(f"experts read as from a disk of {result['paced_bytes_per_second'] / 1e6:.0f} MB/s")
    if result["could_hold_the_model"]:
        lines.append("optimistic: this machine could hold the model; its host may cache what a small one's cannot")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(json.dumps(run_job(BenchJob(**json.loads(sys.argv[1])))))
    except (UsageError, WorkError) as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_status)
