"""A big model that computes the same function as a small trained one: real routing, real text, real bytes.

    python bench/inflate.py ../shared/models/tiny-moe /tmp/bench/big.gguf --embd 2048 --ff 1536     # 1.4 GB

The width d grows to D with zeros. A norm over D numbers of which D - d are zero has a mean square d/D times as
large, so its weights get sqrt(d/D) and epsilon gets d/D; in OLMoE that holds for the q and k norms too, which span
all heads. New heads have q = k = v = 0, and nothing reads them. Experts get rows and columns of zeros, and
silu(0) * 0 = 0. Kernels do not look at the numbers, so the work is that of the big shape.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.quantize import dequantize, fitting_type, quantize, target_type
from moe_edge.models.errors import BadFile, MoeEdgeError, UnknownName, UsageError
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.ggml_types import F32, TYPES, row_bytes, tensor_bytes
from moe_edge.models.formats.gguf import KeyValues, TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, check_space, encode_kv, kv_string, kv_u32
from moe_edge.models.store.source import Source

ARCHITECTURE = "olmoe"
CHUNK_BYTES = 8 << 20
GGUF_F32 = 6
QUANTIZATION_VERSION = 2

NORMS = frozenset("attn_norm ffn_norm attn_q_norm attn_k_norm output_norm".split())
WIDER_COLS = frozenset("token_embd output ffn_gate_inp attn_q attn_k attn_v attn_output".split())
WIDER_ROWS = frozenset("attn_q attn_k attn_v attn_output".split())


@dataclass(frozen=True)
class InflatedTensor:
    """One tensor of the big model: every part is `real` numbers in a corner of zeros.

    parts: tensors of the source, one for each expert of a stack. shape: in ggml order, of the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    parts: tuple[TensorEntry, ...]
    scale: float = 1.0

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.shape, self.type, tensor_bytes(self.type, self.shape))

    @property
    def rows_of_part(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Widths:
    """The small model's shape, and what it grows to. Heads keep their width."""

    n_embd: int
    head_dim: int
    new_embd: int
    new_ff: int

    @property
    def norm_scale(self) -> float:
        return math.sqrt(self.n_embd / self.new_embd)


def inflate(
    source: Path, out: Path, n_embd: int, n_ff: int, expert_type: str = "Q4_K", dense_type: str = "Q8_0"
) -> int:
    """Write the inflated model and return its bytes; it is written beside and renamed when complete.

    source: an OLMoE checkpoint folder or a GGUF of one. Norms and routers are F32.
    Raises UnknownName for another architecture, UsageError for widths that do not fit, and what open_source and
    GGUFOutput raise.
    """
    model = open_source(source)
    if model.architecture.name != ARCHITECTURE:
        raise UnknownName(f"{source}: is {model.architecture.name}; inflating is worked out for {ARCHITECTURE} only")
    widths = _widths(model, n_embd, n_ff)
    tensors = _plan(model, widths, target_type(expert_type).id, target_type(dense_type).id)
    output = GGUFOutput(out, _metadata(model, widths), [tensor.spec for tensor in tensors])
    check_space(out.absolute().parent, output.total_bytes, out.name)
    with output, SourceFiles() as files:
        for tensor in tensors:
            for chunk in _encode(tensor, files):
                output.write(chunk)
        output.finish()
        output.commit()
    return output.total_bytes


def _widths(model: Source, new_embd: int, new_ff: int) -> Widths:
    n_embd = _number(model.kv, "embedding_length")
    n_head = _number(model.kv, "attention.head_count")
    if _number(model.kv, "attention.head_count_kv", n_head) != n_head:
        raise UsageError(f"{model.name}: has fewer KV heads than heads; the q and k norms of new heads would differ")
    head_dim = n_embd // n_head
    n_ff = max(layer.n_ff for layer in model.layers)
    if new_embd < n_embd or new_embd % head_dim:
        raise UsageError(f"--embd {new_embd}: must be at least {n_embd} and a multiple of {head_dim}, a head's width")
    if new_ff < n_ff:
        raise UsageError(f"--ff {new_ff}: experts have a width of {n_ff} already")
    return Widths(n_embd, head_dim, new_embd, new_ff)


def _number(kv: KeyValues, key: str, default: int | None = None) -> int:
    value = kv.get(f"{ARCHITECTURE}.{key}", default)
    if not isinstance(value, int) or value < 1:
        raise BadFile(f"{ARCHITECTURE}.{key} is {value!r}, expected one number above 0")
    return value


def _metadata(model: Source, w: Widths) -> dict[str, bytes]:
    """The source's key-values with the new widths; the tokenizer is copied byte for byte."""
    prefix = f"{ARCHITECTURE}."
    eps_key = prefix + "attention.layer_norm_rms_epsilon"
    numbers = {
        "embedding_length": w.new_embd,
        "feed_forward_length": w.new_ff,
        "attention.head_count": w.new_embd // w.head_dim,
        "attention.head_count_kv": w.new_embd // w.head_dim,
        "attention.key_length": w.head_dim,
        "attention.value_length": w.head_dim,
        "rope.dimension_count": w.head_dim,
    }
    if prefix + "expert_feed_forward_length" in model.kv:
        numbers["expert_feed_forward_length"] = w.new_ff
    dropped = "general.file_type", "general.alignment", "general.parameter_count", "general.size_label"
    records = {key: model.kv.record(key) for key in model.kv if key not in dropped and not key.startswith("split.")}
    records |= {prefix + key: kv_u32(prefix + key, value) for key, value in numbers.items()}
    records[eps_key] = encode_kv(eps_key, model.kv[eps_key] * w.n_embd / w.new_embd, GGUF_F32)
    records["general.name"] = kv_string("general.name", f"{model.name} inflated to {w.new_embd}/{w.new_ff}")
    records["general.quantization_version"] = kv_u32("general.quantization_version", QUANTIZATION_VERSION)
    return records


def _plan(model: Source, w: Widths, expert_type: int, dense_type: int) -> list[InflatedTensor]:
    """Every tensor of the big model, layer by layer as llama.cpp's own converter orders them."""
    tensors = [_dense(model.name, entry, w, dense_type) for entry in model.dense]
    for layer in model.layers:
        for projection in layer.projections:
            cols, rows = (w.new_ff, w.new_embd) if projection == "down" else (w.new_embd, w.new_ff)
            parts = tuple(model.experts[layer.layer, e, projection] for e in range(layer.n_expert))
            name = f"blk.{layer.layer}.ffn_{projection}_exps.weight"
            shape = (cols, rows, layer.n_expert)
            tensors.append(InflatedTensor(name, shape, fitting_type(expert_type, cols), parts))
    return sorted(tensors, key=lambda tensor: _place(tensor.name))


def _place(name: str) -> tuple[int, int]:
    """Sorts the embedding first, then the blocks, then the rest."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1])
    return (0, 0) if name.startswith("token_embd") else (2, 0)


def _dense(where: str, entry: TensorEntry, w: Widths, dense_type: int) -> InflatedTensor:
    kind = entry.name.removesuffix(".weight").split(".")[-1]
    if kind in NORMS:
        return InflatedTensor(entry.name, (w.new_embd,), F32, (entry,), w.norm_scale)
    if kind not in WIDER_COLS:
        raise UnknownName(f"{where}: tensor '{entry.name}': do not know how it grows with the width")
    rows = w.new_embd if kind in WIDER_ROWS else entry.shape[1]
    type_id = F32 if kind == "ffn_gate_inp" else fitting_type(dense_type, w.new_embd)
    return InflatedTensor(entry.name, (w.new_embd, rows), type_id, (entry,))


def _encode(tensor: InflatedTensor, files: SourceFiles) -> Iterator[bytes]:
    """The bytes of a tensor, at most about CHUNK_BYTES at a time."""
    n_cols = tensor.shape[0]
    step = max(1, CHUNK_BYTES // (4 * n_cols))
    for part in tensor.parts:
        real_rows = part.shape[1] if len(part.shape) > 1 else 1
        for first in range(0, real_rows, step):
            rows = _read_rows(files, part, first, min(step, real_rows - first))
            yield encode_padded(rows * np.float32(tensor.scale), tensor.type, n_cols)
        for first in range(real_rows, tensor.rows_of_part, step):
            yield _zero_row(tensor.type, n_cols) * min(step, tensor.rows_of_part - first)


def _read_rows(files: SourceFiles, part: TensorEntry, first: int, n_rows: int) -> FloatArray:
    size = row_bytes(part.type, part.shape[0])
    return dequantize(files.read(part, first * size, n_rows * size), part.type, part.shape[0])


def encode_padded(rows: FloatArray, type_id: int, n_cols: int) -> bytes:
    """Rows with zeros appended up to n_cols, in a ggml type.

    Blocks are encoded one by one, so only those that hold numbers are: the others are the bytes of a zero block.
    """
    block = TYPES[type_id].block
    used_cols = -(-rows.shape[1] // block) * block
    assert used_cols <= n_cols, f"{used_cols} columns do not fit {n_cols}"
    filled = np.zeros((len(rows), used_cols), np.float32)
    filled[:, : rows.shape[1]] = rows
    encoded = np.frombuffer(quantize(filled, type_id), np.uint8).reshape(len(rows), -1)
    zeros = np.frombuffer(_zero_row(type_id, n_cols - used_cols), np.uint8)
    return np.hstack([encoded, np.broadcast_to(zeros, (len(rows), len(zeros)))]).tobytes()


@functools.cache
def _zero_row(type_id: int, n_cols: int) -> bytes:
    if n_cols == 0:
        return b""
    block = TYPES[type_id].block
    data = quantize(np.zeros((1, block), np.float32), type_id)
    if dequantize(data, type_id, block).any():
        raise UnknownName(f"type {TYPES[type_id].name} cannot hold a block of zeros")
    return data * (n_cols // block)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="OLMoE checkpoint folder, or a GGUF of one")
    parser.add_argument("out", type=Path)
    parser.add_argument("--embd", type=int, default=2048, help="new width; heads keep theirs (default 2048)")
    parser.add_argument("--ff", type=int, default=1536, help="new expert width: more bytes for each (default 1536)")
    parser.add_argument("--type", default="Q4_K", help="ggml type of the experts (default Q4_K)")
    parser.add_argument("--dense-type", default="Q8_0", help="ggml type of the other matrices (default Q8_0)")
    o = parser.parse_args(arguments)
    try:
        n_bytes = inflate(o.source, o.out, o.embd, o.ff, o.type, o.dense_type)
    except MoeEdgeError as error:
        print(f"inflate.py: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{o.out}: {n_bytes / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
