"""The plan of a conversion: which tensor becomes which type, how large the files get. Pure, and printable.

Lossy only when asked: without a type every tensor keeps its own, but for those llama.cpp wants in F32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_edge.convert.ggml_types import F32, FLOAT_TYPES, tensor_bytes, type_name
from moe_edge.convert.gguf import TensorEntry
from moe_edge.convert.quantize import NEED_IMATRIX, TARGETS, fitting_type, target_type
from moe_edge.convert.skeleton import stub_specs
from moe_edge.convert.source import Source
from moe_edge.convert.store import ALIGNMENT, HIGH, LOW, expert_name
from moe_edge.convert.write import TensorSpec
from moe_edge.models.errors import UnknownName

DEFAULT_DENSE = "Q8_0"  # of a checkpoint whose experts are quantized
READABLE = frozenset({*TARGETS, *NEED_IMATRIX, "Q1_0", "NVFP4"})

# Tensors llama.cpp computes in F32, or that are too small to be worth it (llama-quant.cpp, tensor_allows_quantization).
_NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj", "position_embd",
    "token_types", "ssm_conv1d", "shortconv.conv", "indexer.", "hc_", "time_mix_", "attn_rel_b", "attn_sinks",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of an output file: where it comes from, and the type and bytes it will have. Shape in ggml order."""

    name: str
    shape: tuple[int, ...]
    source: TensorEntry
    type: int
    nbytes: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape, self.type, self.nbytes)

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
        """Bytes of the store's tensors, each rounded up to the store's alignment."""
        return sum(each.nbytes + -each.nbytes % ALIGNMENT for each in self.store_tensors)

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
        lines = [f"{self.source} ({self.architecture})", "skeleton:"]
        lines += [f"  {each.name:44} {change(each):18} {_mib(each.nbytes)}" for each in self.dense]
        lines.append(f"  {len(self.stubs)} stubs{_mib(sum(each.nbytes for each in self.stubs)):>63}")
        lines.append("experts:")
        lines += [f"  {line}" for line in self._expert_lines()]
        lines += self.remarks()
        lines.append(f"total: skeleton {_mib(self.skeleton_bytes).strip()}, experts {_mib(self.store_bytes).strip()}")
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """What a reader should know: fallbacks, skipped tensors, notes about the tokenizer."""
        lines = [f"fallback: {count} x {what}: rows do not fill its blocks" for what, count in self.fallbacks.items()]
        lines += [f"skipped: {name}" for name in self.skipped]
        return lines + [f"note: {note}" for note in self.notes]

    def to_json(self) -> dict[str, Any]:
        """The whole plan, tensor by tensor."""
        return {
            "source": self.source,
            "architecture": self.architecture,
            "levels": list(self.levels),
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
            projection = each.name.split(".")[2] + (".low" if ".low." in each.name else "")
            group = groups.setdefault((projection, change(each)), [0, 0])
            group[0] += 1
            group[1] += each.nbytes
        for (projection, what), (count, nbytes) in groups.items():
            yield f"{projection:24} x {count:<17} {what:18} {_mib(nbytes)}"


def make_plan(
    source: Source, expert_type: str | None = None, dense_type: str | None = None, low_type: str | None = None
) -> ConvertPlan:
    """The plan to convert `source`, with types by name.

    expert_type: of the experts' high level; None keeps the source's. low_type: adds a low level of that type.
    dense_type: of the dense matrices; None keeps a GGUF's, and a checkpoint's unless its experts are quantized: Q8_0.
    Raises UnknownName for a type we do not know or that needs an importance matrix, and what the architecture raises.
    """
    wanted = {HIGH: target_type(expert_type).id if expert_type else None}
    if low_type:
        wanted[LOW] = target_type(low_type).id
    high = wanted[HIGH]
    if dense_type is None and source.is_checkpoint and high is not None and high not in FLOAT_TYPES:
        dense_type = DEFAULT_DENSE
    dense_id = target_type(dense_type).id if dense_type else None
    fallbacks: Counter[str] = Counter()
    source.stub_overrides()  # raises here what the skeleton would raise later
    dense = tuple(_plan_dense(entry, dense_id, source.is_checkpoint, fallbacks) for entry in source.dense)
    experts = tuple(_plan_experts(source, wanted, fallbacks))
    biases = tuple(PlannedTensor(e.name, e.shape, e, e.type, e.nbytes) for e in source.biases.values())
    stubs = stub_specs(source.layers, source.biases)
    return ConvertPlan(
        source=source.name,
        architecture=source.architecture.name,
        levels=tuple(wanted),
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


def _plan_experts(source: Source, wanted: Mapping[str, int | None], fallbacks: Counter[str]) -> Iterable[PlannedTensor]:
    for layer in source.layers:
        for expert in range(layer.n_expert):
            for level, type_id in wanted.items():
                for projection in layer.projections:
                    entry = source.experts[layer.layer, expert, projection]
                    name = expert_name(layer.layer, projection, expert, level)
                    yield _planned(name, entry, entry.type if type_id is None else type_id, fallbacks)


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
    return f"{found} -> {type_name(tensor.type)}" if tensor.is_converted else found


def _as_json(tensor: PlannedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "source_type": type_name(tensor.source.type),
        "type": type_name(tensor.type),
        "bytes": tensor.nbytes,
    }


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:10.2f} MiB"
