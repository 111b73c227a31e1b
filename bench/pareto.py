"""Quality against bytes: what fewer bits, dymoe and hobbit cost in KLD, and what each would have to beat.

    python bench/pareto.py SOURCE.gguf --calibrate TEXT --text HELDOUT --out DIR [--parts static,dynamic,ablation]

static: KLD from the source against bits a weight, by how the bits are shared out. dynamic: KLD against expert bytes
read a token, under one memory cap, one token at a time; the curve to beat is one type for all experts, served exactly.
ablation: what each part of the policies adds, at that cap, in KLD from exact on the same model.
Converted models, tables and rows stay in DIR; what is there is not done again. A last line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import facts
import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import MoeEdgeError, UsageError
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.store import open_model
from moe_edge.runner.calibrate.observe import spread_chunks
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import eval_options
from moe_edge.runner.measure.logits import (
    BLOCK_VALUES,
    PassWork,
    ReferenceLogits,
    bos_token,
    cut_chunks,
    kld_of_rows,
    logits_pass,
    nll_of_rows,
    read_text,
    scored_positions,
    standard_error,
    tokenize_text,
)
from moe_edge.runner.sizes import NO_LIMIT
from moe_edge.schedulers.budget import format_bytes
from moe_edge.schedulers.options import PolicyOptions
from pareto_models import Models, bits_a_weight, is_number
from pareto_points import Point, bytes_at_kld, front, kld_ratio, saving
from pareto_settings import (
    ABLATION,
    COMPARISONS,
    EXACT,
    OURS,
    PARTS,
    PREFILL,
    REPLACING,
    Options,
    Setting,
    ablation_settings,
    damage_settings,
    dynamic_settings,
    hobbit_options,
    tell,
)
from pareto_tables import Row, plot, points_of, table, write_csv
from rivals import Rival, make_rival

ALLOCATIONS = ("uniform", "frequency", "layer", "global")
TARGETS = (0.0005, 0.001, 0.002)  # nats a token
IntArray = npt.NDArray[np.int32]


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Mode:
    """How tokens are fed: prefill in micro-batches, or decode one by one. options: of every engine, but the memory."""

    name: str
    options: EngineOptions
    chunks: IntArray
    warm_up: IntArray
    references: dict[Path, ReferenceLogits] = field(default_factory=dict)

    @property
    def one_by_one(self) -> bool:
        return self.name == "decode"


class Bench:
    """Runs settings and keeps their rows: DIR/rows/<hash>.json, and each token's KLD beside it."""

    def __init__(self, o: Options, models: Models) -> None:
        self.options, self.models, self.source = o, models, models.source
        self.folder = o.out / "rows"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text_sha256 = hashlib.sha256(read_text(o.text)).hexdigest()
        with Engine(self.source, EngineOptions(n_ctx=o.n_ctx, n_threads=o.n_threads)) as engine:
            tokens, bos = tokenize_text(engine, read_text(o.text)), bos_token(engine)
        self.n_vocab = read_gguf(open_model(self.source).skeleton).tensors["token_embd.weight"].shape[1]
        chunks = cut_chunks(tokens, o.n_ctx, bos=bos)  # evenly spread: a text's kinds must all be in
        self.prefill = self._mode("prefill", spread_chunks(chunks, (o.n_chunks + 1) * o.n_ctx))
        self.decode = self._mode("decode", spread_chunks(chunks, (o.n_decode_chunks + 1) * o.n_ctx))

    def _mode(self, name: str, chunks: IntArray) -> Mode:
        """The last chunk warms the cache up and is not counted. Micro-batch and attention are the source's choice."""
        if len(chunks) < 2:
            raise UsageError(f"{self.options.text} has less than 2 chunks of {self.options.n_ctx} tokens")
        n_ubatch = self.options.n_ubatch if name == "prefill" else 0
        asked = EngineOptions(n_ubatch=n_ubatch, n_threads=self.options.n_threads)
        settled = eval_options(self.source, asked, self.options.n_ctx, one_by_one=name == "decode")
        return Mode(name, settled, chunks[:-1], chunks[-1:])

    def fixed_and_experts(self, model: Path, mode: Mode) -> tuple[int, int]:
        """(bytes besides the experts, bytes of all experts at the high level)."""
        engine = Engine(model, replace(mode.options, ram_bytes=NO_LIMIT))
        try:
            return engine.plan.fixed.total_bytes, engine.layout.total_bytes
        finally:
            engine.close()

    def row(
        self, part: str, model: Path, setting: Setting, mode: Mode, ram_bytes: int | None, against: dict[str, Path]
    ) -> Row:
        """The row of one setting, measured unless it is in DIR. against: column -> model whose exact logits to take."""
        key = {
            "store": open_model(model).store_id or model.name, "setting": asdict(setting), "mode": mode.name,
            "ram_bytes": ram_bytes, "n_ubatch": mode.options.n_ubatch, "chunks": mode.chunks.shape,
            "text": self.text_sha256, "against": sorted(against), "source": self.source.name,
        }  # fmt: skip
        path = self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
        if self.options.again or not path.exists():
            tell(f"{part}: {model.stem}, {setting.name}")
            references = {column: self._reference(other, mode) for column, other in against.items()}
            with Engine(model, replace(mode.options, ram_bytes=ram_bytes, policy=setting.options)) as engine:
                values, klds = measure(engine, setting, mode, references, self.n_vocab)
            np.savez(path.with_suffix(".npz"), **klds)  # type: ignore[arg-type]  # numpy's stub
            path.write_text(json.dumps({**values, "key": key}))
        values = json.loads(path.read_text())
        values.pop("key")
        about = {"part": part, "model": model.stem, "family": setting.family, "setting": setting.label}
        return {**about, "mode": mode.name, "bits": bits_a_weight(model), **values, "kld_tokens": path.stem + ".npz"}

    def _reference(self, model: Path, mode: Mode) -> ReferenceLogits:
        """The logits of a model under exact, run when first wanted; rewound."""
        if model not in mode.references:
            tell(f"reference: {model.stem}, {mode.name}")
            kept = mode.references[model] = ReferenceLogits()
            kept.check_room(len(mode.chunks) * len(scored_positions(mode.chunks.shape[1])), self.n_vocab)
            with Engine(model, replace(mode.options, ram_bytes=None)) as engine:
                for block in logits_pass(engine, mode.chunks, one_by_one=mode.one_by_one):
                    kept.write(block.rows)
        mode.references[model].rewind()
        return mode.references[model]

    def paired(self, ours: Row, theirs: Row) -> tuple[float, float]:
        """Mean difference of two rows' KLD from the source, token by token, and its standard error."""
        with np.load(self.folder / ours["kld_tokens"]) as a, np.load(self.folder / theirs["kld_tokens"]) as b:
            difference = a["source"] - b["source"]
        return float(difference.mean()), standard_error(difference)

    def close(self) -> None:
        for mode in (self.prefill, self.decode):
            for kept in mode.references.values():
                kept.__exit__()


def measure(
    engine: Engine, setting: Setting, mode: Mode, references: dict[str, ReferenceLogits], n_vocab: int
) -> tuple[Row, dict[str, npt.NDArray[np.float64]]]:
    """One pass of a loaded engine over the chunks, after the warm-up: (values of the row, KLD of each token)."""
    if setting.rival is not None:
        engine._use(make_rival(setting.rival, engine.layout, engine.plan.arena_bytes, engine.model.calibration))
        engine.native.set_renormalise(setting.renormalise)
    for _ in logits_pass(engine, mode.warm_up, one_by_one=mode.one_by_one):
        pass
    counters, stats, work = engine.counters(), engine.policy.stats.copy(), PassWork()
    nll: list[npt.NDArray[np.float64]] = []
    klds: dict[str, list[npt.NDArray[np.float64]]] = {column: [] for column in references}
    same: dict[str, list[npt.NDArray[np.bool_]]] = {column: [] for column in references}
    n = max(1, BLOCK_VALUES // n_vocab)
    for block in logits_pass(engine, mode.chunks, one_by_one=mode.one_by_one, work=work):
        following = mode.chunks[block.chunk, block.position + 1 :]
        for at in range(0, len(block.rows), n):
            rows = block.rows[at : at + n]
            nll.append(nll_of_rows(rows, following[at : at + len(rows)]))
            for column, kept in references.items():
                theirs = kept.read(*rows.shape)
                klds[column].append(kld_of_rows(theirs, rows))
                same[column].append(theirs.argmax(-1) == rows.argmax(-1))
    counters, stats = engine.counters().since(counters), engine.policy.stats.since(stats)
    tokens_kld = {column: np.concatenate(found) for column, found in klds.items()}
    row: Row = {
        "ram_bytes": engine.plan.budget_bytes, "arena_bytes": engine.plan.arena_bytes, "n_tokens": work.tokens,
        "n_scored": sum(map(len, nll)), "nll": float(np.concatenate(nll).mean()),
        "bytes_per_token": counters.bytes_read / work.tokens,
        "hit_rate": counters.hits / counters.uses if counters.uses else 0.0,
        "low_share": stats.low_uses / max(1, stats.uses), "skip_share": stats.skipped_uses / max(1, stats.uses),
        "wanted_high_share": stats.wanted_high / max(1, stats.wanted_high + stats.wanted_low + stats.wanted_skip),
        "expected_damage": None if stats.expected_damage is None else stats.expected_damage / work.tokens,
        "tok_s": work.tokens / work.seconds,
    }  # fmt: skip
    for column, values in tokens_kld.items():
        row |= {
            f"kld_{column}": max(0.0, float(values.mean())), f"kld_{column}_se": standard_error(values),
            f"kld_{column}_p99": float(np.quantile(values, 0.99)),
            f"top1_{column}": float(np.concatenate(same[column]).mean()),
        }  # fmt: skip
    return row, tokens_kld


# ---- the parts ---------------------------------------------------------------------------------------------


def run_static(bench: Bench) -> tuple[list[Row], list[str]]:
    o, rows = bench.options, []
    wanted = [(how, f"{bits:g}") for bits in o.bits for how in ALLOCATIONS] + [("plain", name) for name in o.plain]
    for family, high in wanted:
        model = bench.models.get(high, how=family)
        setting = Setting(family, high)
        rows.append(bench.row("static", model, EXACT, bench.prefill, None, {"source": bench.source}))
        rows[-1] |= {"family": setting.family, "setting": setting.label}
    return rows, static_lines(rows, bench.paired)


def static_lines(rows: Sequence[Row], paired: Callable[[Row, Row], tuple[float, float]]) -> list[str]:
    """Each allocation against the others at its bits, and against the curves of uniform and of plain types."""
    lines = []
    curves = {name: points_of(rows, name, "bits", "kld_source") for name in ("uniform", "plain")}
    by_name = {(row["family"], row["setting"]): row for row in rows}
    for row in rows:
        if row["family"] in ("uniform", "plain"):
            continue
        uniform = by_name["uniform", row["setting"]]
        difference, se = paired(row, uniform)
        point = row["bits"], row["kld_source"]
        text = f"{row['family']} {row['setting']}: KLD {row['kld_source'] / uniform['kld_source']:.3f}x uniform's"
        text += f" (paired {difference:+.4g} ± {se:.2g})"
        for name, curve in curves.items():
            found = saving(point, curve)
            text += f"; bits saved at equal KLD against {name}: {found if found and found.tells else 'N/A'}"
        lines.append(text)
    return lines


def run_dynamic(bench: Bench) -> tuple[list[Row], list[str]]:
    o, rows, lines = bench.options, [], []
    for high, low in o.pairs:
        model, ram = _pair_and_cap(bench, high, low)
        against = {"source": bench.source, "exact": model}
        mine = []
        for name in o.exact:
            family = "exact, bits shared out" if is_number(name) else "exact, one type"
            setting = Setting("exact", "")
            row = bench.row("dynamic", bench.models.get(name), setting, bench.decode, ram, against)
            mine.append({**row, "family": family, "setting": name})
        for setting in [EXACT, *dynamic_settings(o)]:
            mine.append(bench.row("dynamic", model, setting, bench.decode, ram, against))
        best = front((row["bytes_per_token"], row["kld_source"]) for row in mine)
        for row in mine:
            row |= {"pair": f"{high}+{low}", "front": (row["bytes_per_token"], row["kld_source"]) in best}
        rows += mine
        lines += [f"{high}+{low}, --ram {format_bytes(ram)}:", *dynamic_lines(mine), ""]
        lines += [*at_equal_kld(mine), ""]
    return rows, lines


def at_equal_kld(rows: Sequence[Row]) -> list[str]:
    """Bytes a token of each family at some KLDs; of those that replace experts against the best of the others."""
    families = [f for f in dict.fromkeys(row["family"] for row in rows) if f != "exact"]
    start = points_of(rows, "exact", "bytes_per_token", "kld_source")
    curves = {f: start + points_of(rows, f, "bytes_per_token", "kld_source") for f in families}
    replacing = [f for f in families if f.endswith(REPLACING) or f.startswith(("reroute", "cache-prior"))]
    best = [point for f in families if f not in replacing for point in curves[f]]
    lines = ["| KiB a token at a KLD of | " + " | ".join(f"{kld:g}" for kld in TARGETS) + " |"]
    lines.append("|" + "---|" * (len(TARGETS) + 1))
    for family, curve in {"the best that replaces nothing": best, **curves}.items():
        cells = []
        for kld in TARGETS:
            found, base = bytes_at_kld(curve, kld), bytes_at_kld(best, kld)
            share = f" ({100 * (found / base - 1):+.0f} %)" if found and base and family in replacing else ""
            cells.append("N/A" if found is None else f"{found / 1024:.0f}{share}")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return lines


def _pair_and_cap(bench: Bench, high: str, low: str) -> tuple[Path, int]:
    model = bench.models.get(high, low)
    fixed, experts = bench.fixed_and_experts(model, bench.decode)
    return model, fixed + int(bench.options.share * experts)


def dynamic_lines(rows: Sequence[Row]) -> list[str]:
    """Each row of a policy of ours: bytes saved at equal KLD against the exact curve and each rival family.

    A rival's curve begins at exact on the same model, where it leaves nothing out.
    """
    curves: dict[str, list[Point]] = {}
    start = points_of(rows, "exact", "bytes_per_token", "kld_source")
    for family in dict.fromkeys(row["family"] for row in rows):
        points = points_of(rows, family, "bytes_per_token", "kld_source")
        if family.startswith("exact, "):
            curves[family] = points
        elif family != "exact" and not family.startswith(OURS):
            curves[family] = start + points
    lines = [
        "bytes saved at equal KLD (<, >: compared with the end of a curve; N/A: that says nothing):", "",
        "| setting | the hardest | " + " | ".join(curves) + " |", "|" + "---|" * (len(curves) + 2),
    ]  # fmt: skip
    for row in rows:
        if not row["family"].startswith(OURS):
            continue
        point = row["bytes_per_token"], row["kld_source"]
        found = {family: each for family, curve in curves.items() if (each := saving(point, curve)) and each.tells}
        row["saving"] = {family: asdict(each) for family, each in found.items()}
        hardest = min(found.items(), key=lambda item: item[1].share, default=None)
        cells = [f"{row['family']} {row['setting']}", f"{hardest[1]}, {hardest[0]}" if hardest else "N/A"]
        cells += [str(found.get(family, "N/A")) for family in curves]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def run_ablation(bench: Bench) -> tuple[list[Row], list[str]]:
    o, rows, lines = bench.options, [], []
    decode = [
        Setting("on demand", "", rival=Rival("on demand")),
        Setting("cache only", ""),
        *(Setting("hobbit low", f"{t:g}:1", PolicyOptions("hobbit", t1=t, t2=1.0)) for t in (0.0, 0.2, 0.4, 0.6, 0.8)),
        Setting("hobbit fit", "", PolicyOptions("hobbit")),
        *ablation_settings(o, ABLATION),
        *damage_settings(o),
    ]
    prefill = [Setting("prefill exact", ""), *ablation_settings(o, PREFILL)]
    for high, low in o.pairs:
        model, ram = _pair_and_cap(bench, high, low)
        arena = ram - bench.fixed_and_experts(model, bench.decode)[0]
        prefill_ram = bench.fixed_and_experts(model, bench.prefill)[0] + arena  # the same arena
        mine = [bench.row("ablation", model, s, bench.decode, ram, {"exact": model}) for s in decode]
        mine += [bench.row("ablation", model, s, bench.prefill, prefill_ram, {"exact": model}) for s in prefill]
        for row in mine:
            row["pair"] = f"{high}+{low}"
        rows += mine
        lines += [f"{high}+{low}, --ram {format_bytes(ram)}:", *ablation_lines(mine)]
    return rows, lines


def ablation_lines(rows: Sequence[Row]) -> list[str]:
    found = {
        family: points_of(rows, family, "bytes_per_token", "kld_exact")
        for family in dict.fromkeys(row["family"] for row in rows)
    }
    lines = []
    for ours, base in COMPARISONS:
        ratio = kld_ratio(found.get(ours, []), found.get(base, []))
        shown = "no bytes in common" if ratio is None else f"{ratio:.3f}x the KLD at equal bytes"
        lines.append(f"  {ours} against {base}: {shown}")
    return lines


# ---- command -----------------------------------------------------------------------------------------------


def run(o: Options) -> dict[str, Any]:
    """All parts; tables to stdout, files to o.out; what the JSON line says."""
    parts = {"static": run_static, "dynamic": run_dynamic, "ablation": run_ablation}
    machine = facts.machine_facts()
    data: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine, "options": asdict(o),
        "seconds": {}, "summary": {},
    }  # fmt: skip
    with Models(o) as models, contextlib.closing(Bench(o, models)) as bench:
        data |= {"text_sha256": bench.text_sha256}
        for part in o.parts:
            started = time.monotonic()
            rows, lines = parts[part](bench)
            data["seconds"][part], data["summary"][part] = round(time.monotonic() - started, 1), lines
            (o.out / f"{part}.json").write_text(json.dumps({**data, "rows": rows}, default=str, indent=1))
            write_csv(o.out / f"{part}.csv", rows)
            print("\n".join(heading(bench, part)) + "\n\n" + table(rows, part) + "\n\n" + "\n".join(lines) + "\n")
            if not plot(o.out / f"{part}.png", part, rows, f"{part}, {o.source.name}"):
                tell("no picture: pip install matplotlib")
    return data


def heading(bench: Bench, part: str) -> Iterator[str]:
    o, mode = bench.options, bench.prefill if part == "static" else bench.decode
    yield f"## {part}: {o.source.name}"
    tokens = f"{len(mode.chunks)} chunks of {mode.chunks.shape[1]} tokens of {o.text.name}, second halves scored"
    fed = "one token at a time" if mode.one_by_one else f"micro-batches of {mode.options.n_ubatch}"
    yield f"{tokens}; {fed}; calibrated on {o.calibrate_tokens} tokens of {o.calibrate.name}; commit {facts.commit()}"
    if part != "static":
        yield f"--ram = all else + {o.share:.3g} of the high level's expert bytes; after one chunk of warm-up"
    if part == "ablation":
        few = bench.prefill
        yield f"prefill rows: {len(few.chunks)} chunks in micro-batches of {few.options.n_ubatch}, the same arena"


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    o = _parser().parse_args(arguments)
    unknown = [part for part in o.parts.split(",") if part not in PARTS]
    if unknown:
        raise UsageError(f"unknown part '{unknown[0]}'; known: {', '.join(PARTS)}")
    pairs = [tuple(pair.split("+")) for pair in o.pairs.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"--pairs {o.pairs}: write high+low, for instance Q4_K+Q2_K,Q6_K+Q3_K")
    if min(o.chunks, o.decode_chunks) < 1 or not 0 < o.share <= 1:
        raise UsageError("--chunks and --decode-chunks are at least 1, --share is above 0 and at most 1")
    words, numbers = _words, _numbers
    for text in words(o.hobbit):
        hobbit_options(text)
    return Options(
        source=o.source, calibrate=o.calibrate, text=o.text, out=o.out, parts=words(o.parts), bits=numbers(o.bits),
        types=words(o.types), plain=words(o.plain), pairs=tuple((high, low) for high, low in pairs),
        exact=words(o.exact), share=o.share, strengths=numbers(o.strength), prior=numbers(o.prior),
        retentions=numbers(o.retention), thresholds=words(o.hobbit),
        prices=numbers(o.price), cold=numbers(o.cold), below=numbers(o.below),
        ablation_retentions=numbers(o.ablation_retention),
        calibrate_tokens=o.calibrate_tokens, n_ctx=o.ctx, n_chunks=o.chunks, n_decode_chunks=o.decode_chunks,
        n_ubatch=o.ubatch, n_threads=o.threads, again=o.again,
    )  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(each for each in text.split(",") if each)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, _words(text)))
    except ValueError as error:
        raise UsageError(f"'{text}' is no list of numbers") from error


def _parser() -> argparse.ArgumentParser:
    d = Options(Path(), Path(), Path(), Path())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, default: Sequence[Any], what: str) -> None:
        text = ",".join(each if isinstance(each, str) else f"{each:g}" for each in default)
        p.add_argument(name, default=text, help=f"{what} (default {text})")

    p.add_argument("source", type=Path, help="a stock GGUF, or a checkpoint (then run as BF16)")
    p.add_argument("--calibrate", type=Path, required=True, help="text to calibrate on")
    p.add_argument("--text", type=Path, required=True, help="held-out text to measure on")
    p.add_argument("--out", type=Path, required=True, help="folder for models, rows, tables")
    add("--parts", d.parts, "what to run")
    add("--bits", d.bits, "static: bits a weight")
    add("--types", d.types, "that bits are made of")
    add("--plain", d.plain, "static: one type for all experts")
    add("--pairs", ["+".join(pair) for pair in d.pairs], "dynamic, ablation: high+low; high may be bits")
    add("--exact", d.exact, "dynamic: the curve to beat, types or bits")
    p.add_argument("--share", type=float, default=d.share, help="of the high level's bytes in memory (default 1/3)")
    add("--retention", d.retentions, "dynamic: dymoe's")
    add("--hobbit", d.thresholds, "dynamic: fit, or T1:T2")
    add("--price", d.prices, "dynamic, ablation: of policy damage, nats a MiB; empty leaves it out")
    add("--strength", d.strengths, "dynamic: of policy reroute, by the mean and by the token's own score range")
    add("--prior", d.prior, "dynamic: of the rival cache-prior")
    add("--cold", d.cold, "dynamic: shares of the least used experts to drop")
    add("--below", d.below, "dynamic: shares of a token's gate weight below which an expert is dropped")
    add("--ablation-retention", d.ablation_retentions, "ablation: dymoe's")
    p.add_argument("--calibrate-tokens", type=int, default=d.calibrate_tokens)
    p.add_argument("--ctx", type=int, default=d.n_ctx, help="tokens of a chunk (default 512)")
    p.add_argument("--chunks", type=int, default=d.n_chunks, help="of a prefill row (default 16)")
    p.add_argument("--decode-chunks", type=int, default=d.n_decode_chunks, help="of a decode row (default 8)")
    p.add_argument("--ubatch", type=int, default=0, help="of prefill rows (default: as moe-edge eval)")
    p.add_argument("--threads", type=int, default=0, help="default: one for each core")
    p.add_argument("--again", action="store_true", help="measure rows that are in DIR already")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        o = parse_options(arguments)
        o.out.mkdir(parents=True, exist_ok=True)
        print(json.dumps(run(o), default=str))
        return 0
    except MoeEdgeError as error:
        print(f"pareto.py: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
