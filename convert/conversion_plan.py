"""The plan of a conversion: which tensor becomes which type, how large the files get. Pure, and printable.

Lossy only when asked: without a type every tensor keeps its own, but for those llama.cpp wants in F32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_edge.convert.quantize import NEED_IMATRIX, TARGETS, fitting_type, target_type
from moe_edge.models.errors import UnknownName, UsageError, printable
from moe_edge.models.formats.ggml_types import BF16, F16, F32, FLOAT_TYPES, I8, tensor_bytes, type_name
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.write import TensorSpec
from moe_edge.models.store.experts import RAW, MatrixKey, MoELayer
from moe_edge.models.store.planes import CODEC_NAMES, CODES, FIELDS, PLANES, most_bytes, usual_codec
from moe_edge.models.store.skeleton import stub_specs
from moe_edge.models.store.source import Source
from moe_edge.models.store.store import ALIGNMENT, HIGH_NAME, LOW_NAME, expert_name, level_of

# What --pack can be: which types of experts are packed, and by which codec. auto: those that get a ninth shorter, or
# more; planes: every type that gets shorter; zstd: the same, by zstd throughout, which is shortest and slow to unpack.
PACKINGS: Mapping[str, Mapping[int, int]] = {
    "none": {}, "auto": dict.fromkeys((F16, BF16), CODES), "planes": {each: usual_codec(each) for each in FIELDS},
    "zstd": dict.fromkeys(FIELDS, PLANES),
}  # fmt: skip
DEFAULT_DENSE = "Q8_0"  # of a checkpoint whose experts are quantized
READABLE = frozenset({*TARGETS, *NEED_IMATRIX, "Q1_0", "NVFP4"})

# Tensors llama.cpp computes in F32, or that are too small to be worth it (llama-quant.cpp, tensor_allows_quantization).
_NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj", "position_embd",
    "token_types", "ssm_conv1d", "shortconv.conv", "indexer.", "hc_", "time_mix_", "attn_rel_b", "attn_sinks",
)  # fmt: skip




@dataclass(frozen=True)
class ExpertTypes:
    """The types of the experts, by level and projection.

    high: the high level's type by name; None keeps the source's. low: the low level's; None: there is no low level.
    by_projection: (level, projection) -> type name, before `high` and `low`. In layers with fused gate_up an entry of
        gate or up is gate_up's too, when they do not contradict each other.
    homes: (layer number, expert, projection) -> type id at the high level, before everything else; low_homes: at the
        low level, which they make when there is no `low`.
    """

    high: str | None = None
    low: str | None = None
    by_projection: Mapping[tuple[str, str], str] = field(default_factory=dict)
    homes: Mapping[MatrixKey, int] = field(default_factory=dict)
    low_homes: Mapping[MatrixKey, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of an output file: where it comes from, and the type and bytes it will have. Shape in ggml order.

    codec: RAW, or what it is packed with: `nbytes` is then what it takes in memory, not in the file.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorEntry
    type: int
    nbytes: int
    codec: int = RAW

    @property
    def packed(self) -> bool:
        return self.codec != RAW

    @property
    def spec(self) -> TensorSpec:
        """As the file lists it. A packed one is so many bytes, and may turn out shorter when it is written."""
        if self.packed:
            return TensorSpec(self.name, (self.stored_bytes,), I8, self.stored_bytes)
        return TensorSpec(self.name, self.shape, self.type, self.nbytes)

    @property
    def stored_bytes(self) -> int:
        """What it takes in the file, at most."""
        return most_bytes(self.type, self.nbytes) if self.packed else self.nbytes

    @property
    def is_converted(self) -> bool:
        return self.type != self.source.type


@dataclass(frozen=True)
class ConvertPlan:
    """What a conversion writes.

    dense and stubs make the skeleton; experts, in the order layer, expert, level, projection, and biases the store.
    fallbacks: `Q4_K -> Q5_0` -> number of tensors whose rows do not fit the type asked for.
    skipped: tensors of the checkpoint that no file needs.
    """

    source: str
    architecture: str
    levels: tuple[str, ...]
    dense: tuple[PlannedTensor, ...]
    stubs: tuple[TensorSpec, ...]
    experts: tuple[PlannedTensor, ...]
    biases: tuple[PlannedTensor, ...]
    fallbacks: Mapping[str, int]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def skeleton_bytes(self) -> int:
        """Bytes of the skeleton's tensors."""
        return sum(each.nbytes for each in self.dense) + sum(each.nbytes for each in self.stubs)

    @property
    def store_bytes(self) -> int:
        """Bytes of the store's tensors, at most, each rounded up to the store's alignment."""
        return sum(each.stored_bytes + -each.stored_bytes % ALIGNMENT for each in self.store_tensors)

    @property
    def store_tensors(self) -> tuple[PlannedTensor, ...]:
        """All tensors of the store, in order."""
        return self.experts + self.biases

    @property
    def dense_type(self) -> int:
        """The type most dense bytes have."""
        sizes: Counter[int] = Counter()
        for each in self.dense:
            sizes[each.type] += each.nbytes
        return max(sizes, key=lambda type_id: sizes[type_id], default=F32)

    def text(self) -> str:
        """The plan for people: one line for each dense tensor, one for all experts of a projection, and totals."""
        lines = [f"{printable(str(self.source))} ({printable(self.architecture)})", "skeleton:"]
        lines += [f"  {printable(each.name):44} {change(each):18} {_mib(each.nbytes)}" for each in self.dense]
        lines.append(f"  {len(self.stubs)} stubs{_mib(sum(each.nbytes for each in self.stubs)):>63}")
        lines.append("experts:")
        lines += [f"  {line}" for line in self._expert_lines()]
        lines += self.level_lines()
        lines += self.remarks()
        lines.append(f"total: skeleton {_mib(self.skeleton_bytes).strip()}, experts {_mib(self.store_bytes).strip()}")
        return "\n".join(lines)

    def bits_per_weight(self, level: str) -> float:
        """Bits of the experts at `level` for each of their weights, on average; alignment is not counted."""
        mine = [each for each in self.experts if level_of(each.name) == level]
        return 8 * sum(each.nbytes for each in mine) / sum(each.shape[0] * each.shape[1] for each in mine)

    def level_lines(self) -> list[str]:
        """`high: 4.50 bits per weight on average: 24 x Q4_K` for each level."""
        counts: dict[str, Counter[str]] = {level: Counter() for level in self.levels}
        for each in self.experts:
            counts[level_of(each.name)][type_name(each.type)] += 1
        return [
            f"{level}: {self.bits_per_weight(level):.2f} bits per weight on average: "
            + ", ".join(f"{count} x {name}" for name, count in counts[level].items())
            for level in self.levels
        ]

    def remarks(self) -> list[str]:
        """What a reader should know: fallbacks, skipped tensors, notes about the tokenizer."""
        lines = [f"fallback: {count} x {what}: rows do not fill its blocks" for what, count in self.fallbacks.items()]
        lines += [f"skipped: {printable(name)}" for name in self.skipped]
        return lines + [f"note: {note}" for note in self.notes]

    def to_json(self) -> dict[str, Any]:
        """The whole plan, tensor by tensor."""
        return {
            "source": self.source,
            "architecture": self.architecture,
            "levels": list(self.levels),
            "bits_per_weight": {level: self.bits_per_weight(level) for level in self.levels},
            "skeleton_bytes": self.skeleton_bytes,
            "store_bytes": self.store_bytes,
            "dense": [_as_json(each) for each in self.dense],
            "stubs": [{"name": each.name, "shape": list(each.shape), "bytes": each.nbytes} for each in self.stubs],
            "experts": [_as_json(each) for each in self.store_tensors],
            "fallbacks": dict(self.fallbacks),
            "skipped": list(self.skipped),
            "notes": list(self.notes),
        }

    def _expert_lines(self) -> Iterator[str]:
        groups: dict[tuple[str, str], list[int]] = {}
        for each in self.store_tensors:
            projection = each.name.split(".")[2] + (".low" if level_of(each.name) == LOW_NAME else "")
            group = groups.setdefault((projection, change(each)), [0, 0])
            group[0] += 1
            group[1] += each.nbytes
        for (projection, what), (count, nbytes) in groups.items():
            yield f"{projection:24} x {count:<17} {what:18} {_mib(nbytes)}"


def make_plan(
    source: Source,
    expert_type: str | None = None,
    dense_type: str | None = None,
    low_type: str | None = None,
    *,
    types: ExpertTypes | None = None,
    importance: Collection[MatrixKey] = (),
    dense_importance: Collection[str] = (),
    pack: str = "none",
) -> ConvertPlan:
    """The plan to convert `source`, with types by name.

    expert_type: of the experts' high level; None keeps the source's. low_type: adds a low level of that type.
    types: in place of both, when projections or experts differ.
    dense_type: of the dense matrices; None keeps a GGUF's, and a checkpoint's unless its experts are quantized: Q8_0.
    importance, dense_importance: the experts and dense tensors there is an importance for. pack: of PACKINGS.
    Raises UnknownName for a type we do not know, UsageError for one whose tensors lack an importance they need and for
    a level, projection or expert the model does not have, and what the architecture raises.
    """
    if pack not in PACKINGS:
        raise UnknownName(f"unknown packing '{pack}'; known: {', '.join(PACKINGS)}")
    assert types is None or (expert_type is None and low_type is None), "types replaces expert_type and low_type"
    if types is None:
        types = ExpertTypes(expert_type, low_type)
    wanted = _wanted_types(source, types, bool(importance))
    if dense_type is None and source.is_checkpoint and _quantizes(wanted, types):
        dense_type = DEFAULT_DENSE
    dense_id = target_type(dense_type, bool(dense_importance)).id if dense_type else None
    fallbacks: Counter[str] = Counter()
    source.stub_overrides()  # raises here what the skeleton would raise later
    dense = tuple(_plan_dense(entry, dense_id, source.is_checkpoint, fallbacks) for entry in source.dense)
    for each in dense:
        _check_importance(each, each.name in dense_importance)
    homes = {HIGH_NAME: types.homes, LOW_NAME: types.low_homes}
    planned = _plan_experts(source, wanted, homes, frozenset(importance), fallbacks)
    experts = tuple(replace(each, codec=PACKINGS[pack].get(each.type, RAW)) for each in planned)
    biases = tuple(PlannedTensor(e.name, e.shape, e, e.type, e.nbytes) for e in source.biases.values())
    stubs = stub_specs(source.layers, source.biases)
    return ConvertPlan(
        source=source.name,
        architecture=source.architecture.name,
        levels=(HIGH_NAME, LOW_NAME) if types.low or types.low_homes else (HIGH_NAME,),
        dense=dense,
        stubs=stubs,
        experts=experts,
        biases=biases,
        fallbacks=dict(fallbacks),
        skipped=source.skipped,
        notes=source.notes,
    )


def may_quantize(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a dense tensor is a matrix that llama.cpp takes in any type; norms, routers and biases are not."""
    return len(shape) >= 2 and name.endswith(".weight") and not any(part in name for part in _NEVER_QUANTIZED)


def _plan_dense(entry: TensorEntry, wanted: int | None, is_checkpoint: bool, fallbacks: Counter[str]) -> PlannedTensor:
    if not may_quantize(entry.name, entry.shape):
        keep = F32 if is_checkpoint else entry.type
        return _planned(entry.name, entry, keep, fallbacks)
    if wanted is None or type_name(entry.type) not in READABLE:
        wanted = entry.type
    return _planned(entry.name, entry, wanted, fallbacks)


def _wanted_types(source: Source, types: ExpertTypes, with_imatrix: bool) -> dict[tuple[str, str], int | None]:
    """(level, projection) -> type id, None to keep the source's; levels in the order of the store."""
    named = {HIGH_NAME: types.high} | ({LOW_NAME: types.low} if types.low or types.low_homes else {})
    by_projection = {key: target_type(name, with_imatrix).id for key, name in types.by_projection.items()}
    known = list(dict.fromkeys(each for layer in source.layers for each in layer.projections))
    fused = "gate_up" in known
    for level, projection in by_projection:
        if level not in (HIGH_NAME, LOW_NAME):
            raise UsageError(f"unknown level '{level}'; known: {HIGH_NAME}, {LOW_NAME}")
        if level not in named:
            raise UsageError(f"a type for {projection} at the level {level} needs a low level; give it a type too")
        if projection not in known and not (fused and projection in ("gate", "up")):
            raise UsageError(f"{source.name} has no expert projection '{projection}'; known: {', '.join(known)}")
    for key in (*types.homes, *types.low_homes):
        if key not in source.experts:
            raise UsageError(f"{source.name} has no {key[2]} of expert {key[1]} in layer {key[0]}, which has a type")
    for type_id in {*types.homes.values(), *types.low_homes.values()}:
        target_type(type_name(type_id), with_imatrix)
    wanted = {}
    for level, name in named.items():
        default = target_type(name, with_imatrix).id if name else None
        for projection in known:
            wanted[level, projection] = _overridden(by_projection, level, projection, default)
    return wanted


def _overridden(
    by_projection: Mapping[tuple[str, str], int], level: str, projection: str, default: int | None
) -> int | None:
    names = ("gate_up", "gate", "up") if projection == "gate_up" else (projection,)
    given = {by_projection[level, name] for name in names if (level, name) in by_projection}
    if len(given) > 1:
        found = " and ".join(sorted(map(type_name, given)))
        raise UsageError(f"gate and up are one tensor in this model and cannot be {found} at the level {level}")
    return given.pop() if given else default


def _quantizes(wanted: Mapping[tuple[str, str], int | None], types: ExpertTypes) -> bool:
    """Whether any expert's high level gets a type that is not a float type."""
    given = {type_id for (level, _), type_id in wanted.items() if level == HIGH_NAME} | set(types.homes.values())
    return bool(given - FLOAT_TYPES - {None})


def _plan_experts(
    source: Source,
    wanted: Mapping[tuple[str, str], int | None],
    homes: Mapping[str, Mapping[MatrixKey, int]],
    importance: Collection[MatrixKey],
    fallbacks: Counter[str],
) -> Iterable[PlannedTensor]:
    levels = list(dict.fromkeys(level for level, _ in wanted))
    for layer, expert, level, projection in _tensor_keys(source.layers, levels):
        key = (layer, expert, projection)
        entry = source.experts[key]
        type_id = homes[level].get(key)
        if type_id is None:
            type_id = wanted[level, projection]
        name = expert_name(layer, projection, expert, level)
        planned = _planned(name, entry, entry.type if type_id is None else type_id, fallbacks)
        _check_importance(planned, key in importance)
        yield planned


def _tensor_keys(layers: Iterable[MoELayer], levels: Iterable[str]) -> Iterator[tuple[int, int, str, str]]:
    """(layer number, expert, level, projection) in the order of the store."""
    levels = tuple(levels)
    for layer in layers:
        for expert in range(layer.n_expert):
            for level in levels:
                for projection in layer.projections:
                    yield layer.layer, expert, level, projection


def _check_importance(planned: PlannedTensor, has_importance: bool) -> None:
    if planned.is_converted and not has_importance and type_name(planned.type) in NEED_IMATRIX:
        raise UsageError(
            f"tensor '{planned.name}' has no importance, which {type_name(planned.type)} needs; "
            "try Q2_K, Q3_K or IQ4_XS for it"
        )


def _planned(name: str, entry: TensorEntry, wanted: int, fallbacks: Counter[str]) -> PlannedTensor:
    if wanted != entry.type and type_name(entry.type) not in READABLE:
        raise UnknownName(f"{entry.path}: tensor '{entry.name}' is {type_name(entry.type)}, which cannot be converted")
    fitting = fitting_type(wanted, entry.shape[0])
    if fitting != wanted:
        fallbacks[f"{type_name(wanted)} -> {type_name(fitting)}"] += 1
    return PlannedTensor(name, entry.shape, entry, fitting, tensor_bytes(fitting, entry.shape))


def change(tensor: PlannedTensor) -> str:
    """`BF16 -> Q4_K`, or `BF16` for a tensor that is copied."""
    found = type_name(tensor.source.type)
    changed = f"{found} -> {type_name(tensor.type)}" if tensor.is_converted else found
    return f"{changed}, packed ({CODEC_NAMES[tensor.codec]})" if tensor.packed else changed


def _as_json(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "source_type": type_name(tensor.source.type),
        "type": type_name(tensor.type),
        "bytes": tensor.nbytes,
        **({"packed": True, "codec": CODEC_NAMES[tensor.codec]} if tensor.packed else {}),
    }


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:10.2f} MiB"
