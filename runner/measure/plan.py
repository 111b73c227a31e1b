"""`moe-edge plan`: will this model run here, in how much memory, and how fast. Only headers are read.

A stock GGUF's header, and the header of a store that is not complete yet, are copied into sparse files of the full
size, so that llama.cpp itself says what it would allocate; nothing is written to the cache, no weight is read.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BudgetTooSmall, MissingFile, UsageError, printable
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.ggml_types import F32, main_type
from moe_edge.models.formats.gguf import GGUFFile, GGUFModel, open_headers, read_gguf, read_header
from moe_edge.models.formats.write import GGUFOutput, TensorSpec
from moe_edge.models.store.folder import find_model
from moe_edge.models.store.planes import CODEC_NAMES, TYPICAL_SHARE, can_pack, main_codec, usual_codec
from moe_edge.models.store.skeleton import IN_PLACE, file_identities, in_place_id, own_kvs, skeleton_kvs, stub_specs
from moe_edge.models.store.source import KIND, gguf_source
from moe_edge.models.store.store import STORE_KIND, store_path
from moe_edge.runner.measure.doctor import Facts, Tell, doctor, machine_speeds, n_cores, probed_file, with_overrides
from moe_edge.runner.measure.packed_split import find_split
from moe_edge.runner.measure.probe import Unmeasured, unpack_bytes_per_second
from moe_edge.runner.memory import auto_budget, usable_bytes
from moe_edge.runner.touched_file import TouchedFile
from moe_edge.schedulers.budget import MemoryPlan, format_arg, format_bytes, plan_memory
from moe_edge.schedulers.estimate import (
    Band,
    Estimate,
    MachineSpeeds,
    ModelWork,
    enough_arena_bytes,
    estimate,
    first_token_seconds,
)
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import PackedSizes
from moe_edge.schedulers.replay.simulate import simulate_policy
from moe_edge.schedulers.replay.trace import Trace
from moe_edge.schedulers.split import Split, can_have_packed, rank_chances
from moe_edge.schedulers.touched import touched_in

N_PROMPT = 512
WORTH_PACKING = 1.03  # times the speed
WORTH_MORE_ROWS = 1.1
WORDS = ((20.0, "FAST"), (8.0, "GOOD"), (3.0, "USABLE"), (0.0, "SLOW"))  # tok/s; reading speed is about 5


@dataclass(frozen=True)
class PlanResult:
    """What `plan` says. All sizes in bytes.

    will_run: whether this budget works on this machine. verdict: one word, or "WILL NOT RUN". sentence: why, with the
    number that would work. needed_bytes: the least --ram that works. memory: the split, None below the floor.
    estimate: None without a split or without speeds; speeds_why_not: the reason for the latter. enough_bytes: the --ram
    beyond which memory hardly matters. packed: the packed cache that is best here; None where there can be none.
    present_bytes: of files_bytes, what is on disk already.
    """

    model: str
    architecture: str
    will_run: bool
    verdict: str
    sentence: str
    budget_bytes: int
    budget_reason: str
    needed_bytes: int
    resident_bytes: int
    memory: MemoryPlan | None
    estimate: Estimate | None
    enough_bytes: int | None
    packed: Split | None
    speeds: MachineSpeeds | None
    speeds_why_not: str | None
    n_prompt: int
    n_ctx: int
    n_ubatch: int
    files_bytes: int
    present_bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> Facts:
        return asdict(self)

    def text(self) -> str:
        return plan_text(self)


def plan(
    path: str | os.PathLike[str],
    ram_bytes: int | None = None,
    *,
    n_ctx: int = 0,
    n_ubatch: int = 0,
    n_threads: int = 0,
    n_prompt: int = N_PROMPT,
    speeds: MachineSpeeds | None = None,
    disk_bytes_per_second: float | None = None,
    hit_rate: float | None = None,
    trace: Trace | None = None,
    policy: PolicyOptions | None = None,
    fresh: bool = False,
    tell: Tell = lambda _: None,
) -> PlanResult:
    """Plan a model at a budget.

    ram_bytes None: auto. speeds: instead of this machine's, which doctor() measures once and keeps.
    disk_bytes_per_second: instead of the measured one. hit_rate: known from elsewhere; or trace: simulate it, under
    `policy`. fresh: measure this machine again.
    Raises what opening the model raises, but not BudgetTooSmall: that is an answer. UsageError for a trace of another
    model.
    """
    facts = _read_model(Path(path), n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads)
    if hit_rate is not None and not 0 <= hit_rate <= 1:
        raise UsageError(f"hit rate {hit_rate}: is not between 0 and 1")
    if ram_bytes is None:
        auto = auto_budget()
        budget, reason = auto.bytes, auto.reason
    else:
        budget, reason = ram_bytes, f"{format_bytes(ram_bytes)}, as asked for"
    why_not = None
    if speeds is None:
        found = _speeds(facts, n_threads, disk_bytes_per_second, fresh, tell)
        speeds, why_not = (None, found.why) if isinstance(found, Unmeasured) else (found, None)
        if speeds is not None and can_pack(facts.expert_type):
            unpack = unpack_bytes_per_second(facts.expert_type, facts.codec, n_threads or n_cores())
            speeds = with_overrides(speeds, unpack=unpack)
    elif disk_bytes_per_second is not None:
        speeds = with_overrides(speeds, disk=disk_bytes_per_second)
    hits: float | Callable[[int], float] | None = hit_rate
    if trace is not None:
        hits = _simulated(trace, policy or PolicyOptions(), facts)
        facts = replace(facts, work=replace(facts.work, touched=touched_in(trace)))
    chances = None if trace is None else rank_chances(trace)
    return _decide(facts, budget, reason, ram_bytes is None, speeds, why_not, hits, n_prompt, chances)


@dataclass(frozen=True)
class _ModelFacts:
    """What the headers say. unlimited: the split when memory does not count."""

    name: str
    architecture: str
    work: ModelWork
    calibration: Any
    unlimited: MemoryPlan
    packed: PackedSizes
    expert_type: int
    codec: int  # of what is packed; else what would pack it
    dense_type: int
    piece_bytes: int
    n_ctx: int
    n_ubatch: int
    n_embd: int
    probe_target: Path
    files_bytes: int
    present_bytes: int


def _decide(
    m: _ModelFacts, budget: int, reason: str, is_auto: bool, speeds: MachineSpeeds | None, why_not: str | None,
    hits: float | Callable[[int], float] | None, n_prompt: int, chances: Float64Array | None,
) -> PlanResult:  # fmt: skip
    split, found, enough, packed = None, None, None, None
    floor, resident = m.unlimited.floor_bytes, m.unlimited.resident_bytes
    fixed = m.unlimited.fixed
    limit = usable_bytes()
    try:
        split = plan_memory(budget, fixed, m.work.layout, m.work.top_k)
        sentence, will_run = f"{m.name} runs with --ram {'auto' if is_auto else format_arg(budget)}", True
    except BudgetTooSmall as e:
        sentence, will_run = str(e), False
    if split is not None and min(budget, resident) > limit:
        sentence = (
            f"--ram {format_arg(budget)} is more than the {format_bytes(limit)} this machine can give; "
            f"try --ram {format_arg(max(floor, auto_budget().bytes))}"
        )
        will_run = False
    if floor > limit:
        sentence = f"{m.name} needs at least --ram {format_arg(floor)}; this machine has {format_bytes(limit)}"
        will_run = False
    if split is not None and speeds is not None:
        found = estimate(m.work, split.arena_bytes, speeds, hit_rate=hits, n_prompt=n_prompt, n_ubatch=m.n_ubatch)
        enough = fixed.total_bytes + enough_arena_bytes(m.work, speeds, floor - fixed.total_bytes, hits)
    notes = _packed_facts(m, speeds)
    if split is not None and speeds is not None and can_have_packed(m.work.layout, m.packed, split.arena_bytes):
        share = m.work.stored_share
        packed = find_split(m.work.layout, m.packed, split.arena_bytes, m.work.top_k, share, speeds, chances)
        notes.append(_packed_note(packed, split.arena_bytes))
    if will_run and not is_auto and split is not None and min(budget, resident) > auto_budget().bytes:
        notes.append(f"this is more than is free now; {auto_budget().reason}")
    if found is not None and speeds is not None and split is not None:
        notes += _gain_of_packing(m, found, split.arena_bytes, speeds, hits)
        notes += _gain_of_micro_batch(m, found, split.arena_bytes, speeds, n_prompt)
    if m.present_bytes < m.files_bytes:
        notes.append(f"{format_bytes(m.present_bytes)} of {format_bytes(m.files_bytes)} are on this disk; get the rest")
    verdict = "WILL NOT RUN" if not will_run else _word(found) if found else "RUNS"
    return PlanResult(
        m.name, m.architecture, will_run, verdict, sentence, budget, reason, floor, resident, split, found, enough,
        packed, speeds, why_not, n_prompt, m.n_ctx, m.n_ubatch, m.files_bytes, m.present_bytes, tuple(notes),
    )  # fmt: skip


def _packed_facts(m: _ModelFacts, speeds: MachineSpeeds | None) -> list[str]:
    """What packing saves of this model, and how fast it is undone here; nothing where it is not packed."""
    if m.work.stored_share >= 1:
        return []
    unpacked = "" if speeds is None else f"; this machine unpacks {speeds.unpack / 1e9:.1f} GB of experts a second"
    return [f"packed ({CODEC_NAMES[m.codec]}): {100 * m.work.stored_share:.1f} % of the experts' bytes{unpacked}"]


def _packed_note(packed: Split, arena_bytes: int) -> str:
    """The planner's word on keeping packed experts in memory."""
    if packed.packed_bytes == 0:
        return "--packed-cache would gain nothing here: whole experts are as fast"
    share = 100 * packed.packed_bytes // arena_bytes
    return (
        f"--packed-cache {share}%, {format_bytes(packed.packed_bytes)} of the experts' memory for packed ones, is "
        f"planned to decode {packed.gain:.2f} times as fast, without loss"
    )


def _gain_of_packing(
    m: _ModelFacts,
    found: Estimate,
    arena_bytes: int,
    speeds: MachineSpeeds,
    hits: float | Callable[[int], float] | None,
) -> list[str]:
    """What packed experts would gain on this disk, in words; nothing below WORTH_PACKING, or where they are packed."""
    if m.work.stored_share < 1 or not can_pack(m.expert_type):
        return []
    work = replace(m.work, stored_share=TYPICAL_SHARE[usual_codec(m.expert_type), m.expert_type])
    packed = estimate(work, arena_bytes, speeds, hit_rate=hits)
    gain = packed.tokens_per_second.expected / found.tokens_per_second.expected
    if gain < WORTH_PACKING:
        return []
    return [f"convert --pack planes would decode {gain:.2f} times as fast on this disk, without loss"]


def _gain_of_micro_batch(
    m: _ModelFacts, found: Estimate, arena_bytes: int, speeds: MachineSpeeds, n_prompt: int
) -> list[str]:  # fmt: skip
    """What twice the micro-batch would gain for this prompt, in words; nothing below WORTH_MORE_ROWS."""
    from moe_edge.runner.engine_options import buffer_bytes

    larger = 2 * m.n_ubatch
    if n_prompt <= m.n_ubatch or larger > m.n_ctx:
        return []
    taken = m.n_ubatch * buffer_bytes(m.n_embd, m.work.top_k)
    if taken >= arena_bytes:
        return []
    now = found.ttft_seconds.expected
    then = first_token_seconds(m.work, arena_bytes - taken, speeds, n_prompt, larger).expected
    if now / then < WORTH_MORE_ROWS:
        return []
    return [f"-ub {larger} would take {format_bytes(taken)} more and bring the first token after {then:.0f} s"]


def _word(found: Estimate) -> str:
    return next(word for least, word in WORDS if found.tokens_per_second.expected >= least)


def _speeds(
    m: _ModelFacts, n_threads: int, disk: float | None, fresh: bool, tell: Tell
) -> MachineSpeeds | Unmeasured:
    measured = doctor(m.probe_target, n_threads=n_threads or n_cores(), fresh=fresh, tell=tell)
    return machine_speeds(
        measured, m.expert_type, m.piece_bytes, disk_bytes_per_second=disk, dense_type=m.dense_type
    )


def _simulated(trace: Trace, policy: PolicyOptions, m: _ModelFacts) -> Callable[[int], float]:
    layout = trace.layout()
    if (layout.n_experts, layout.unit_bytes) != (m.work.layout.n_experts, m.work.layout.unit_bytes):
        raise UsageError(f"the trace is of {trace.model}, whose experts are others than those of {m.name}")

    def hit_rate(arena_bytes: int) -> float:
        return simulate_policy(trace, policy, arena_bytes, calibration=m.calibration).hit_rate

    return hit_rate


# ---- headers -----------------------------------------------------------------------------------------------


def _read_model(path: Path, *, n_ctx: int, n_ubatch: int, n_threads: int) -> _ModelFacts:
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.runner.prove import LOADS
    from moe_edge.runner.sizes import head_bytes, sizes_of

    path = find_model(path)
    options = EngineOptions(n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, proof=LOADS)
    with headers_only(path) as (stand_in, files):
        sizes = sizes_of(stand_in, options, named=path)
        model, unlimited = sizes.model, sizes.plan
        calibration = getattr(model, "calibration", None)
        skeleton = read_gguf(model.skeleton)
        expert_type = main_type((piece.type, piece.nbytes) for piece in model.pieces)
        per_token = unlimited.fixed.kv_bytes // max(1, sizes.n_ctx)
        work = ModelWork(
            layout=sizes.layout,
            top_k=model.n_expert_used,
            dense_bytes=dense_bytes_used(skeleton),
            kv_bytes=per_token * min(N_PROMPT, sizes.n_ctx),
            counts=None if calibration is None else calibration.counts,
            stored_share=model.stored_expert_bytes / model.expert_bytes,
            head_bytes=head_bytes(skeleton),
            touched=TouchedFile(files).touched,
            kv_positions=max(1, min(N_PROMPT, sizes.n_ctx)),
            query_share=query_share(skeleton),
        )
        whole = sum(f.stat().st_size for f in model.files)
        return _ModelFacts(
            name=str(path),
            architecture=model.architecture,
            work=work,
            calibration=calibration,
            unlimited=unlimited,
            packed=sizes.packed,
            expert_type=expert_type,
            codec=main_codec(model.pieces, expert_type),
            dense_type=dense_type(skeleton),
            piece_bytes=sum(piece.nbytes for piece in model.pieces) // len(model.pieces),
            n_ctx=sizes.n_ctx,
            n_ubatch=sizes.n_ubatch,
            n_embd=model.layers[0].n_embd,
            probe_target=probed_file(files),
            files_bytes=whole,
            present_bytes=min(whole, sum(f.stat().st_size for f in files)),
        )


def dense_bytes_used(skeleton: GGUFFile) -> int:
    """Bytes of the skeleton that every token reads: not the stubs, nor an embedding table that is only looked up."""
    tied = "output.weight" not in skeleton.tensors
    return sum(
        t.nbytes
        for name, t in skeleton.tensors.items()
        if "_exps." not in name and (tied or name != "token_embd.weight")
    )


def query_share(skeleton: GGUFFile) -> float:
    """Query heads for each KV head, the mean over layers that have any; 1 where the file does not say."""
    architecture = skeleton.kv.get("general.architecture")
    counts = []
    for key in ("head_count", "head_count_kv"):
        found = skeleton.kv.get(f"{architecture}.attention.{key}", 1)
        values = [each for each in (found if isinstance(found, (list, tuple)) else [found]) if each]
        counts.append(sum(values) / len(values) if values else 1.0)
    return max(1.0, counts[0] / counts[1])


def dense_type(skeleton: GGUFFile) -> int:
    """The type that most bytes of the dense products are in."""
    dense = [
        (t.type, t.nbytes) for name, t in skeleton.tensors.items()
        if "_exps." not in name and name not in ("token_embd.weight", "output.weight") and len(t.shape) > 1
    ]  # fmt: skip
    return main_type(dense) if dense else F32


@contextlib.contextmanager
def headers_only(path: Path) -> Iterator[tuple[Path, list[Path]]]:
    """(a model the engine can plan with, the files experts are in), for a model of which only headers need exist.

    A converted model that is complete stands for itself. Otherwise the stand-in lives as long as the `with`.
    Raises what open_model raises, but for weights that are missing.
    """
    model = open_headers(path)
    kind = model.kv.get(KIND)
    if kind == STORE_KIND:
        raise UsageError(f"{path}: is an expert store; give its skeleton")
    if kind is not None and model.kv.get(IN_PLACE):
        yield path, [path]
        return
    with tempfile.TemporaryDirectory(prefix="moe-edge-plan-") as name:
        if kind is None:
            sparse = _stand_in_of(model, Path(name))
            yield sparse, [part.path for part in model.parts]
            return
        store = store_path(path)
        if not store.exists():
            raise MissingFile(f"{store}: the expert store of {path.name} is missing; plan needs its header at least")
        target = Path(name) / path.name
        _write_sparse(target, model.parts[0].header, _end_of(model.parts[0]))
        header = read_header(store)
        _write_sparse(store_path(target), header.header, _end_of(header))
        yield target, [store]


def _stand_in_of(model: GGUFModel, folder: Path) -> Path:
    """A sparse skeleton of a stock GGUF that reads its experts from sparse copies of the parts."""
    copies = []
    for part in model.parts:
        copies.append(folder / part.path.name)
        _write_sparse(copies[-1], part.header, _end_of(part))
    source = gguf_source(model)
    identity = file_identities(copies)
    own = own_kvs(in_place_id(model.parts, identity), str(copies[0]), identity)
    dense = [TensorSpec(each.name, each.shape, each.type, each.nbytes) for each in source.dense]
    specs = (*dense, *stub_specs(source.layers, source.biases))
    target = folder / "moe-edge-skeleton.gguf"
    with GGUFOutput(target, skeleton_kvs(source, own, {}), specs, source.alignment) as output:
        _write_sparse(target, output.part.read_bytes(), output.total_bytes)
    return target


def _write_sparse(path: Path, header: bytes, nbytes: int) -> None:
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(nbytes)


def _end_of(part: GGUFFile) -> int:
    return max((t.offset + t.nbytes for t in part.tensors.values()), default=part.data_offset)


# ---- text --------------------------------------------------------------------------------------------------


def plan_text(r: PlanResult) -> str:
    """The answer for people: verdict first."""
    lines = [f"{r.verdict}: {printable(r.sentence)}"]
    rows = [("budget", r.budget_reason)]
    if r.memory is not None:
        first, *warnings = r.memory.lines()
        rows.append(("split", first.split(": ", 1)[1]))
        rows += [("", warning) for warning in warnings]
    if r.estimate is not None and r.speeds is not None:
        rows += _estimate_rows(r, r.estimate, r.speeds)
    if r.speeds_why_not is not None:
        rows.append(("speed", f"no estimate: {r.speeds_why_not}"))
    rows += [("note", note) for note in r.notes]
    if r.will_run:
        ram = format_arg(min(r.budget_bytes, r.resident_bytes))
        rows.append(("command", f"moe-edge chat {printable(shlex.quote(r.model))} --ram {ram}"))
    return "\n".join(lines + [f"  {name:<9}{text}" for name, text in rows])


def _estimate_rows(r: PlanResult, e: Estimate, s: MachineSpeeds) -> list[tuple[str, str]]:
    rate, ttft = e.tokens_per_second, e.ttft_seconds
    rows = [
        ("decode", f"{_band(rate)} tok/s; {e.binds} binds: a token computes {1e3 * e.compute_seconds:.1f} ms"
                   f" and reads {1e3 * e.read_seconds:.1f} ms"),
        ("hits", f"{_band(e.hit_rate, 100, '.0f')} % of expert uses, by {_SOURCES[e.hit_source]}"),
        ("traffic", f"{format_bytes(int(e.read_bytes.expected))} read for a token, which uses "
                    f"{format_bytes(int(e.used_bytes))}"),
        ("prompt", f"first token of a {r.n_prompt}-token prompt after {_band(ttft)} s, cold, without loading"),
    ]  # fmt: skip
    if r.enough_bytes is not None:
        enough = "all experts in memory" if r.enough_bytes >= r.resident_bytes * 0.99 else "the disk hardly waited for"
        rows.append(("enough", f"more than --ram {format_arg(r.enough_bytes)} changes little: {enough}"))
    rows.append(("speeds", f"disk {s.disk / 1e6:.0f} MB/s, memory {s.memory / 1e9:.1f} GB/s, products "
                           f"{s.compute / 1e9:.1f} GB/s, {1e6 * s.layer_seconds:.0f} us a layer"))  # fmt: skip
    return rows


_SOURCES = {
    "resident": "all being in memory",
    "trace": "simulating the trace",
    "calibration": "the model's calibration",
    "typical models": "what other models show; a calibration narrows it",
}


def _band(b: Band, scale: float = 1.0, form: str = ".2g") -> str:
    def show(x: float) -> str:
        return format(x * scale, form if form != ".2g" or x * scale < 100 else ".0f")

    return f"{show(b.expected)} ({show(b.low)}-{show(b.high)})" if b.low < b.high else show(b.expected)
