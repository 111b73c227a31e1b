"""moe-edge against stock llama.cpp: same weights, same tokens, same memory cap, same disk.

    python bench/compare.py big.gguf --cap 55%,none --disk none,440MB/s --plot tok_s.png

Each arm runs in its own process and control group, in turns (A B A B ...), with the page cache dropped before it.
A worker decodes several texts: the first is the cold row, the others are the warm one. Prints the ceiling, a table,
what moe-edge's time went into; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import facts
import limits
import report
import texts
from moe_edge.models.errors import MoeEdgeError, UsageError
from moe_edge.models.formats.gguf import open_gguf
from moe_edge.models.store.skeleton import skeleton_for
from moe_edge.schedulers.budget import PROGRAM_ALLOWANCE_BYTES, format_bytes, parse_bytes
from report import COLD, WARM, Case, Sample
from worker import ARMS, CEILING, Job

BENCH = Path(__file__).resolve().parent
CONTEXT_STEP = 256  # llama.cpp rounds n_ctx up to it
MAX_NLL_DIFFERENCE = 0.05  # nats a token; other kernels differ by a hundredth of it
SIGKILL_STATUS = -9


@dataclass(frozen=True)
class Options:
    """What to run; see --help."""

    model: Path
    cases: tuple[Case, ...]
    arms: tuple[str, ...] = ARMS
    rounds: int = 3
    text: Path | None = None
    n_texts: int = 3
    n_prompt: int = 512
    n_tokens: int = 256
    n_threads: int = 0
    n_ubatch: int = 512
    ram_bytes: int | None = None
    headroom_bytes: int = PROGRAM_ALLOWANCE_BYTES
    moe_edge_model: Path | None = None
    drop_caches: bool = True
    timeout_s: float = 3600.0

    @property
    def n_ctx(self) -> int:
        return -(-(self.n_prompt + self.n_tokens + 1) // CONTEXT_STEP) * CONTEXT_STEP

    @property
    def threads(self) -> int:
        return self.n_threads or facts.machine_facts()["cores"]


class Comparison:
    """Runs the workers of one comparison and keeps their samples."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model = facts.model_facts(options.model)
        self.text_name, text = texts.read_text(options.text)
        n_tokens = options.n_prompt + options.n_tokens + 1
        self.tokens = texts.pick_tokens(options.model, text, options.n_texts, n_tokens)
        self.files = [part.path for part in open_gguf(options.model).parts]
        if "moe-edge" in options.arms and options.moe_edge_model is None:
            self.files.append(skeleton_for(options.model))  # written now, so that no row pays for it
        elif options.moe_edge_model is not None:
            self.files += sorted(options.moe_edge_model.parent.glob(f"{options.moe_edge_model.stem}*.gguf"))
        self.ceilings: dict[int | None, list[dict[str, float | None]]] = {}  # by disk speed, one for each round
        self.drop_note = ""

    def run(self) -> list[Sample]:
        """Every case, round and arm, the arms in turns."""
        samples: list[Sample] = []
        for case in self.options.cases:
            try:
                samples += self._run_case(case)
            except limits.NotPossible as error:
                samples += [Sample(case, arm, COLD, 0, 0, missing=str(error)) for arm in self.options.arms]
        return mark_agreement(samples, self.options.arms)

    def _run_case(self, case: Case) -> list[Sample]:
        samples: list[Sample] = []
        for round_number in range(self.options.rounds):
            self._measure_ceiling(case)
            if round_number == 0:
                print("\n".join(self.ceiling_lines(case)), flush=True)
            for arm in self.options.arms:
                samples += self._turn(case, arm, round_number)
        return samples

    def _measure_ceiling(self, case: Case) -> None:
        """In every round, since disks vary too; without the memory cap, since its buffers are not the model's."""
        with limits.Limits(case.cap_bytes, None, self.options.model):
            pass  # raises when the cap is not possible, before any row
        measured = self._work(replace(case, cap_bytes=None), CEILING, [])
        self.ceilings.setdefault(case.disk_bytes_per_second, []).append(measured)

    def ceiling(self, case: Case, what: str) -> float | None:
        """The best speed of `disk` or `memory` seen so far, in bytes a second; None where it cannot be measured."""
        found = self.ceilings.get(case.disk_bytes_per_second, [])
        return max((speed for each in found if (speed := each.get(f"{what}_bytes_per_second"))), default=None)

    def ceiling_lines(self, case: Case) -> list[str]:
        """What the hardware allows, and what that makes in tokens per second for this model and cap."""
        disk, memory = self.ceiling(case, "disk"), self.ceiling(case, "memory")
        m = self.model
        lines = [
            f"ceiling, cap {case.cap}, disk {case.disk}: disk "
            + (f"{disk / 1e6:.0f} MB/s (direct, 4 x 1 MiB)" if disk else "N/A (no direct reads here)")
            + (f", memory {memory / 1e9:.1f} GB/s" if memory else ", memory N/A"),
            f"  a token uses {format_bytes(m.active_bytes)}: {format_bytes(m.dense_bytes)} dense, "
            f"{format_bytes(m.active_expert_bytes)} of experts",
        ]
        if memory:
            lines.append(f"  memory allows {memory / m.active_bytes:.1f} tok/s")
        if disk and case.cap_bytes is not None:
            room = max(0, case.cap_bytes - self.options.headroom_bytes - m.dense_bytes)
            missed = m.active_expert_bytes * max(0.0, 1 - room / m.expert_bytes)
            allows = f"{disk / missed:.1f} tok/s" if missed else "every expert in memory"
            lines.append(f"  disk allows {allows}, were every expert used equally often")
        return lines

    def ceiling_spread_lines(self) -> list[str]:
        """How steady the disk was: one line for each disk speed that was measured more than once."""
        lines = []
        for limit, found in self.ceilings.items():
            speeds = [speed for each in found if (speed := each.get("disk_bytes_per_second"))]
            if len(speeds) > 1:
                name = Case(None, limit).disk
                lines.append(
                    f"disk {name}: {min(speeds) / 1e6:.0f}-{max(speeds) / 1e6:.0f} MB/s in {len(speeds)} measurements"
                )
        return lines

    def _turn(self, case: Case, arm: str, round_number: int) -> list[Sample]:
        """One worker: a cold sample and warm ones. The texts rotate, and are the same for all arms of a round."""
        n = len(self.tokens)
        order = [(round_number + i) % n for i in range(n)]
        states = [COLD, *[WARM] * (n - 1)]
        if arm == "stock-read" and case.cap_bytes is not None and self.model.file_bytes > case.cap_bytes:
            missing = f"the model has {format_bytes(self.model.file_bytes)} and does not fit"
            return [Sample(case, arm, state, round_number, 0, missing=missing) for state in dict.fromkeys(states)]
        self._progress(case, arm, round_number)
        result = self._work(case, arm, [self.tokens[i] for i in order])
        if "error" in result:
            missing = result["error"]
            return [Sample(case, arm, state, round_number, 0, missing=missing) for state in dict.fromkeys(states)]
        passes = result.pop("passes")
        return [
            Sample(case, arm, state, round_number, text, {**result, **values})
            for state, text, values in zip(states, order, passes, strict=True)
        ]

    def _progress(self, case: Case, arm: str, round_number: int) -> None:
        text = f"round {round_number + 1}/{self.options.rounds}, cap {case.cap}, disk {case.disk}: {arm}"
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def _work(self, case: Case, arm: str, tokens: list[list[int]]) -> dict[str, Any]:
        """A worker's result; {"error": why} when it failed or was killed. Raises NotPossible."""
        o = self.options
        ram = o.ram_bytes
        if ram is None and case.cap_bytes is not None:
            ram = case.cap_bytes - o.headroom_bytes
        model = o.moe_edge_model if arm == "moe-edge" and o.moe_edge_model else o.model
        with limits.Limits(case.cap_bytes, case.disk_bytes_per_second, o.model) as groups:
            job = Job(
                arm, str(model.absolute()), tokens, o.n_prompt, o.n_ctx, o.n_ubatch, o.threads, ram, groups.join
            )  # fmt: skip
            self.drop_note = drop_page_cache(self.files, everything=o.drop_caches)
            return run_worker(job, o.timeout_s)


def run_worker(job: Job, timeout_s: float) -> dict[str, Any]:
    """Start worker.py and read the last line it prints."""
    with tempfile.TemporaryDirectory(prefix="moe-edge-bench-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(asdict(job)))
        try:
            done = subprocess.run(
                [sys.executable, str(BENCH / "worker.py"), str(path)],
                capture_output=True, text=True, timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    if done.returncode == SIGKILL_STATUS:
        return {"error": "killed: out of memory under the cap"}
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"ended with status {done.returncode}: {last}"}


def drop_page_cache(files: Sequence[Path], *, everything: bool) -> str:
    """Forget the model's pages, and all others where that is allowed. Returns what was done."""
    if hasattr(os, "posix_fadvise"):
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if everything:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return "drop_caches and fadvise"
    return "fadvise on the model's files" if hasattr(os, "posix_fadvise") else "not dropped"


def mark_agreement(samples: Sequence[Sample], arms: Sequence[str]) -> list[Sample]:
    """Each sample with the share of positions where its argmax is the reference arm's on the same text."""
    reference: dict[int, list[int]] = {}
    for arm in sorted(arms, key=lambda each: each == "moe-edge"):  # a stock arm where one has run
        for sample in samples:
            if sample.arm == arm and not sample.missing:
                reference.setdefault(sample.text, sample.values["argmax"])
    marked = []
    for sample in samples:
        if not sample.missing:
            pairs = list(zip(sample.values["argmax"], reference[sample.text], strict=True))
            share = sum(a == b for a, b in pairs) / len(pairs)
            sample = replace(sample, values={**sample.values, "same_argmax": share})
        marked.append(sample)
    return marked


def problems(samples: Sequence[Sample]) -> list[str]:
    """What must not be: moe-edge saying different things at different budgets, or arms disagreeing about the text."""
    found: dict[str, None] = {}
    losses: dict[int, float] = {}
    hashes: dict[int, str] = {}
    for sample in samples:
        if sample.missing:
            continue
        loss = losses.setdefault(sample.text, sample.values["nll"])
        if not abs(sample.values["nll"] - loss) <= MAX_NLL_DIFFERENCE:
            found[f"text {sample.text}: {sample.arm} has NLL {sample.values['nll']:.4f}, another arm {loss:.4f}"] = None
        if sample.arm == "moe-edge":
            first = hashes.setdefault(sample.text, sample.values["argmax_sha256"])
            if sample.values["argmax_sha256"] != first:
                found[f"text {sample.text}: moe-edge's argmax differs between runs or budgets"] = None
    return list(found)


def parse_cap(text: str, file_bytes: int) -> int | None:
    """`1.6GiB`, `55%` of the model file, `none`. Raises UsageError."""
    if text == "none":
        return None
    if not text.endswith("%"):
        return parse_bytes(text)
    try:
        return int(float(text[:-1]) / 100 * file_bytes)
    except ValueError as error:
        raise UsageError(f"--cap {text}: is not a percentage; write for instance 55%") from error


def parse_speed(text: str) -> int | None:
    """`90MB/s`, `none`. Raises UsageError."""
    return None if text == "none" else parse_bytes(text.removesuffix("/s"))


def parse_options(arguments: Sequence[str] | None = None) -> tuple[Options, argparse.Namespace]:
    o = _parser().parse_args(arguments)
    arms = tuple(o.arms.split(","))
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UsageError(f"unknown arm '{unknown[0]}'; known: {', '.join(ARMS)}")
    if min(o.rounds, o.texts, o.prompt, o.tokens) < 1:
        raise UsageError("--rounds, --texts, --prompt and --tokens must be at least 1")
    file_bytes = facts.model_facts(o.model).file_bytes
    cases = tuple(
        Case(parse_cap(cap, file_bytes), parse_speed(disk)) for disk in o.disk.split(",") for cap in o.cap.split(",")
    )
    options = Options(
        model=o.model, cases=cases, arms=arms, rounds=o.rounds, text=o.text, n_texts=o.texts, n_prompt=o.prompt,
        n_tokens=o.tokens, n_threads=o.threads, n_ubatch=o.ubatch, ram_bytes=parse_bytes(o.ram) if o.ram else None,
        headroom_bytes=parse_bytes(o.headroom), moe_edge_model=o.moe_edge_model, drop_caches=not o.keep_caches,
        timeout_s=o.timeout,
    )  # fmt: skip
    return options, o


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="a stock GGUF; moe-edge reads its experts in place")
    p.add_argument("--cap", default="none", help="memory of each arm, a list: 1.6GiB,55%%,none (%% of the file)")
    p.add_argument("--disk", default="none", help="disk speed, a list: 90MB/s,440MB/s,none")
    p.add_argument("--arms", default=",".join(ARMS), help=f"of {','.join(ARMS)} (default all)")
    p.add_argument("--rounds", type=int, default=3, help="how often the arms take turns (default 3)")
    p.add_argument("--text", type=Path, help="file to take the texts from")
    p.add_argument("--texts", type=int, default=3, help="texts of a worker: one cold, the others warm (default 3)")
    p.add_argument("--prompt", type=int, default=512, help="tokens of the prefill (default 512)")
    p.add_argument("--tokens", type=int, default=256, help="tokens decoded one by one (default 256)")
    p.add_argument("--threads", type=int, default=0, help="default: one for each core")
    p.add_argument("--ubatch", type=int, default=512)
    p.add_argument("--ram", help="moe-edge's --ram (default: the cap less --headroom)")
    p.add_argument("--headroom", default=str(PROGRAM_ALLOWANCE_BYTES), help="for the program itself (default 64MiB)")
    p.add_argument("--moe-edge-model", type=Path, help="a converted model for the moe-edge arm")
    p.add_argument("--keep-caches", action="store_true", help="forget the model's pages only, not all of the machine's")
    p.add_argument("--timeout", type=float, default=3600.0, help="seconds a worker may take (default 3600)")
    p.add_argument("--machine", default="", help="name of the CSV file (default: CPU, cores, memory)")
    p.add_argument("--csv", type=Path, help="another file for the rows")
    p.add_argument("--plot", type=Path, help="a picture of tok/s against the cap; needs matplotlib")
    return p


def heading(comparison: Comparison) -> Iterator[str]:
    o, m = comparison.options, comparison.model
    machine = facts.machine_facts()
    yield f"# {m.name}: {m.architecture}, {m.shape}, {'/'.join(m.types)}, {format_bytes(m.file_bytes)}"
    yield f"header {m.header_sha256}, commit {machine['commit'] or 'unknown'}"
    versions = ", ".join(f"{name} {version or '?'}" for name, version in machine["versions"].items())
    yield f"{machine['cpu']}, {o.threads} of {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}"
    yield f"{versions}, Python {machine['python']}"
    yield (
        f"{o.n_texts} texts of {comparison.text_name}: prefill {o.n_prompt}, then {o.n_tokens} given tokens one "
        f"by one; context {o.n_ctx}, micro-batch {o.n_ubatch}, {o.rounds} rounds"
    )
    yield "all arms: use_extra_bufts off, flash attention off, F16 KV; timed: llama_decode, argmax, softmax"


def record(comparison: Comparison, samples: Sequence[Sample], rows: Sequence[report.Row]) -> dict[str, Any]:
    """Everything, for the JSON line; the predictions stay out, their hash stays in."""

    def slim(sample: Sample) -> dict[str, Any]:
        values = {key: value for key, value in sample.values.items() if key != "argmax"}
        return {**asdict(sample), "values": values}

    o = comparison.options
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts.machine_facts(),
        "model": asdict(comparison.model),
        "options": {**asdict(o), "n_ctx": o.n_ctx, "threads": o.threads},
        "text": comparison.text_name,
        "page_cache": comparison.drop_note,
        "ceilings": [{"limit": limit, "measured": found} for limit, found in comparison.ceilings.items()],
        "rows": report.rows_to_json(rows),
        "samples": [slim(sample) for sample in samples],
        "problems": problems(samples),
    }


def csv_facts(data: dict[str, Any]) -> dict[str, str]:
    """The columns that say what a row of the CSV file is about."""
    o, machine, model = data["options"], data["machine"], data["model"]
    return {
        "date": data["date"],
        "commit": machine["commit"],
        "llama_cpp_python": str(machine["versions"]["llama-cpp-python"] or machine["versions"]["moe-edge-runtime"]),
        "model": model["name"],
        "header_sha256": model["header_sha256"],
        "file_mib": f"{model['file_bytes'] / report.MIB:.0f}",
        "text": data["text"],
        "threads": str(o["threads"]),
        "n_ctx": str(o["n_ctx"]),
        "n_prompt": str(o["n_prompt"]),
        "n_tokens": str(o["n_tokens"]),
        "page_cache": data["page_cache"],
    }


def compare(options: Options, csv_path: Path, plot_path: Path | None) -> int:
    """Run, print and keep everything; the exit status: 1 when the results are wrong."""
    comparison = Comparison(options)
    print("\n".join(heading(comparison)), flush=True)
    samples = comparison.run()
    rows = report.make_rows(samples)
    data = record(comparison, samples, rows)
    disk_speed = {case: comparison.ceiling(case, "disk") for case in options.cases}
    print("\n" + report.table(rows) + "\n")
    lines = [*report.ratios(rows), *report.engine_lines(rows, disk_speed), *comparison.ceiling_spread_lines()]
    print("\n".join([*lines, *(f"WRONG: {each}" for each in data["problems"])]))
    report.write_csv(csv_path, rows, csv_facts(data))
    print(f"rows appended to {csv_path}; page cache before each arm: {comparison.drop_note or 'not dropped'}")
    if plot_path is not None:
        report.plot(plot_path, rows, comparison.model.name, comparison.model.file_bytes)
    print(json.dumps(data, default=str))
    return int(bool(data["problems"]))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options, o = parse_options(arguments)
        if o.plot is not None:
            report.need_matplotlib()
        csv_path = o.csv or BENCH / "results" / f"{o.machine or facts.machine_name()}.csv"
        return compare(options, csv_path, o.plot)
    except MoeEdgeError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
