"""What a model is made of: metadata, dense tensors and experts, whatever its files' format.

A tensor of any source is one range of bytes of one file (`TensorEntry`), so that copying, quantizing and writing
need not know where it came from. Here: the source that a GGUF makes; convert/hf.py makes one of a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_edge.models.architectures import find_architecture, stub_overrides
from moe_edge.models.errors import BadFile, UsageError
from moe_edge.models.families.family import Architecture
from moe_edge.models.formats.files import FileStamp, shown
from moe_edge.models.formats.gguf import MAX_STORE_TENSORS, OWN_KIND, GGUFModel, TensorEntry
from moe_edge.models.formats.keyvalues import ARRAY, KeyValues
from moe_edge.models.formats.write import U32, encode_kv
from moe_edge.models.store.experts import MoELayer, StackedExperts, find_stacked

KIND = OWN_KIND
FORMAT_VERSION = "moe_edge.format_version"
STORE_ID = "moe_edge.store_id"
MAX_EXPERTS = 1 << 13  # of a layer; llama.cpp takes 512


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    experts: (layer, expert, projection) -> its bytes, `shape` being (cols, rows).
    biases: (layer, "up" | "gate") -> F32 [n_ff, n_expert].
    is_checkpoint: True for a Hugging Face folder, whose dense types are ours to choose.
    header_sha256: of everything that describes the tensors, but not of their bytes.
    stamps: of the files whose headers were read, where the reader of the format took them.
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
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)

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


def gguf_source(model: GGUFModel) -> Source:
    """The source a stock GGUF makes.

    Raises BadFile and its kind, NotMoE, UnknownName for an architecture we do not know, UsageError for a file that
    moe-edge wrote itself.
    """
    if KIND in model.kv:
        raise UsageError(
            f"{model.path}: is already a moe-edge {str(model.kv[KIND])[:40]} file; give the checkpoint it was made from"
        )
    where = str(model.path)
    stacked = find_stacked(model.tensors, where)
    check_counts(stacked.layers, where)
    architecture = find_architecture(model.architecture, where)
    n_expert_used(model.kv, where)
    hidden = stacked.names
    return Source(
        name=model.path.name,
        architecture=architecture,
        files=tuple(part.path for part in model.parts),
        header_sha256=sha256_of(part.header for part in model.parts),
        kv=model.kv,
        alignment=model.parts[0].alignment,
        dense=tuple(entry for entry in model.tensors.values() if entry.name not in hidden),
        layers=stacked.layers,
        experts=_SlicedExperts(stacked),
        biases=stacked.biases,
        stamps={part.path: part.stamp for part in model.parts},
    )


class _SlicedExperts(Mapping[tuple[int, int, str], TensorEntry]):
    """The experts of stacked tensors, each made when asked for: there may be some ten thousand."""

    def __init__(self, stacked: StackedExperts) -> None:
        self._stacked = stacked
        self._layers = {layer.layer: layer for layer in stacked.layers}

    def __getitem__(self, key: tuple[int, int, str]) -> TensorEntry:
        number, expert, projection = key
        layer = self._layers[number]
        if projection not in layer.projections or not 0 <= expert < layer.n_expert:
            raise KeyError(key)
        piece = self._stacked.piece(number, expert, projection, 0)
        path = self._stacked.weights[number, projection].path
        return TensorEntry(piece.name, (piece.cols, piece.rows), piece.type, path, piece.offset, piece.nbytes)

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        for layer in self._layers.values():
            for expert in range(layer.n_expert):
                for projection in layer.projections:
                    yield layer.layer, expert, projection

    def __len__(self) -> int:
        return sum(layer.n_expert * len(layer.projections) for layer in self._layers.values())


def check_counts(layers: Iterable[MoELayer], where: str) -> None:
    """Raise BadFile for more experts than any model has, before something is made for each of them."""
    total = 0
    for layer in layers:
        total += layer.n_expert * len(layer.projections)
        if layer.n_expert > MAX_EXPERTS or total > MAX_STORE_TENSORS:
            raise BadFile(
                f"{where}: layer {layer.layer} has {layer.n_expert} experts, {total} matrices so far; at most "
                f"{MAX_EXPERTS} experts a layer and {MAX_STORE_TENSORS} matrices in all are read"
            )


def computed_layers(kv: KeyValues, layers: Sequence[MoELayer]) -> tuple[MoELayer, ...]:
    """The layers that a decode computes: all but those for predicting several tokens, which are the last ones.

    llama.cpp keeps these (`nextn`, multi-token prediction) for drafts and computes them for nothing else, so they need
    no memory. Their stubs stay in the skeleton, and their experts in the files.
    """
    prefix = kv.get("general.architecture")
    n_layers, n_drafts = kv.get(f"{prefix}.block_count"), kv.get(f"{prefix}.nextn_predict_layers")
    if not isinstance(n_layers, int) or not isinstance(n_drafts, int) or not 0 < n_drafts < n_layers:
        return tuple(layers)
    return tuple(layer for layer in layers if layer.layer < n_layers - n_drafts)


def n_expert_used(kv: KeyValues, where: str) -> int:
    """Experts that each token uses, the most of any layer. Raises BadFile when the metadata does not say."""
    key = f"{kv.get('general.architecture')}.expert_used_count"
    value = kv.get(key)
    if isinstance(value, list):
        value = max((each for each in value if isinstance(each, int)), default=0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadFile(f"{where}: {key} is {shown(value)}, expected the number of experts each token uses")
    return value


def sha256_of(chunks: Iterable[bytes]) -> str:
    """Hex SHA-256 over all chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
