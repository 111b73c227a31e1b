"""What a conversion reads: metadata, dense tensors and experts, whatever the checkpoint's format.

A tensor of any source is one range of bytes of one file (`TensorEntry`), so that copying, quantizing and writing
need not know where it came from. Here: the source a GGUF makes; `hf.py` makes one of a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_edge.convert.experts import MoELayer, find_stacked
from moe_edge.convert.gguf import GGUFModel, TensorEntry, open_gguf
from moe_edge.convert.keyvalues import ARRAY, KeyValues
from moe_edge.convert.write import U32, encode_kv
from moe_edge.models.architectures import Architecture, find_architecture, stub_overrides
from moe_edge.models.errors import BadFile, MissingFile, UsageError

KIND = "moe_edge.kind"
FORMAT_VERSION = "moe_edge.format_version"
STORE_ID = "moe_edge.store_id"
STORE_SUFFIX = ".experts.gguf"


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    experts: (layer, expert, projection) -> its bytes, `shape` being (cols, rows).
    biases: (layer, "up" | "gate") -> F32 [n_ff, n_expert].
    is_checkpoint: True for a Hugging Face folder, whose dense types are ours to choose.
    header_sha256: of everything that describes the tensors, but not of their bytes.
    """

    name: str
    architecture: Architecture
    files: tuple[Path, ...]
    header_sha256: str
    kv: KeyValues
    alignment: int
    dense: tuple[TensorEntry, ...]
    layers: tuple[MoELayer, ...]
    experts: Mapping[tuple[int, int, str], TensorEntry]
    biases: Mapping[tuple[int, str], TensorEntry]
    is_checkpoint: bool = False
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def stub_overrides(self) -> dict[str, bytes]:
        """The key-values that differ in the skeleton, encoded with the value types of the source."""
        values = stub_overrides(self.architecture, self.kv, self._widths(), self._shared_width())
        records = {}
        for key, value in values.items():
            value_type, element_type = self.kv.types(key) if key in self.kv else (U32, None)
            if isinstance(value, list) != (value_type == ARRAY):
                raise BadFile(f"{self.name}: {key} has value type {value_type}, expected a number or an array")
            records[key] = encode_kv(key, value, value_type, element_type)
        return records

    def _widths(self) -> dict[int, int]:
        return {layer.layer: layer.n_ff for layer in self.layers}

    def _shared_width(self) -> int | None:
        widths = {entry.shape[1] for entry in self.dense if entry.name.endswith(".ffn_up_shexp.weight")}
        if len(widths) > 1 and self.architecture.state_shared_width:
            raise BadFile(f"{self.name}: its shared experts have different widths {sorted(widths)}")
        return next(iter(widths), None)


def open_source(path: str | os.PathLike[str]) -> Source:
    """The source at `path`: a GGUF file (any part of a split one), or a Hugging Face folder.

    Raises MissingFile, BadFile and its kind, NotMoE, UnknownName for an architecture we do not know, UsageError
    for a file moe-edge wrote itself.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").exists():
        from moe_edge.convert.hf import hf_source  # imports gguf's name tables, which nothing else needs

        return hf_source(path)
    return gguf_source(open_gguf(find_model(path)))


def find_model(path: Path) -> Path:
    """`path`, or the one model in it when it is a folder. Raises MissingFile naming what was found instead."""
    if not path.is_dir():
        return path
    found = [each for each in sorted(path.glob("*.gguf")) if not each.name.endswith(STORE_SUFFIX)]
    models = [each for each in found if "-of-" not in each.name or "-00001-of-" in each.name]
    if len(models) == 1:
        return models[0]
    if (path / "config.json").exists() and not models:
        raise MissingFile(f"{path}: is a Hugging Face checkpoint; convert it: moe-edge convert {path} -o NAME.gguf")
    names = ", ".join(each.name for each in models) or "none"
    raise MissingFile(f"{path}: this folder needs exactly one GGUF model, found {len(models)}: {names}")


def gguf_source(model: GGUFModel) -> Source:
    """The source a stock GGUF makes. Raises as open_source does."""
    if KIND in model.kv:
        raise UsageError(
            f"{model.path}: is already a moe-edge {model.kv[KIND]} file; give the checkpoint it was made from"
        )
    where = str(model.path)
    stacked = find_stacked(model.tensors, where)
    architecture = find_architecture(model.architecture, where)
    n_expert_used(model.kv, where)
    hidden = stacked.names
    experts = {}
    for layer in stacked.layers:
        for expert in range(layer.n_expert):
            for projection in layer.projections:
                piece = stacked.piece(layer.layer, expert, projection, 0)
                path = stacked.weights[layer.layer, projection].path
                experts[layer.layer, expert, projection] = TensorEntry(
                    piece.name, (piece.cols, piece.rows), piece.type, path, piece.offset, piece.nbytes
                )
    return Source(
        name=model.path.name,
        architecture=architecture,
        files=tuple(part.path for part in model.parts),
        header_sha256=sha256_of(part.header for part in model.parts),
        kv=model.kv,
        alignment=model.parts[0].alignment,
        dense=tuple(entry for entry in model.tensors.values() if entry.name not in hidden),
        layers=stacked.layers,
        experts=experts,
        biases=stacked.biases,
    )


def n_expert_used(kv: KeyValues, where: str) -> int:
    """Experts that each token uses, the most of any layer. Raises BadFile when the metadata does not say."""
    key = f"{kv.get('general.architecture')}.expert_used_count"
    value = kv.get(key)
    if isinstance(value, list):
        value = max(value, default=0)
    if not isinstance(value, int) or value < 1:
        raise BadFile(f"{where}: {key} is {value!r}, expected the number of experts each token uses")
    return value


def sha256_of(chunks: Iterable[bytes]) -> str:
    """Hex SHA-256 over all chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
