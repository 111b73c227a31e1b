"""The expert store: opening a model for the runtime. convert/write_store.py writes one.

`open_model` is the one entry point of the runtime: a skeleton with its store, or a stock GGUF whose experts are read
in place. It lists where every expert's bytes are and checks that they can be there; it reads no weights.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_edge.models.errors import BadChecksum, BadFile, MissingFile, UsageError, WrongStore
from moe_edge.models.formats.files import FileStamp, is_present, shown, unreadable
from moe_edge.models.formats.ggml_types import TYPES, check_product, tensor_bytes, type_name
from moe_edge.models.formats.gguf import GGUFFile, GGUFModel, TensorEntry, open_gguf, open_parts, read_gguf
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.work import whole
from moe_edge.models.formats.write import (
    TensorSpec,
    crc_of_range,
    drop_cache,
)
from moe_edge.models.store.experts import RAW, MoELayer, Piece, find_stacked, make_layer
from moe_edge.models.store.folder import STORE_SUFFIX, find_model
from moe_edge.models.store.sample import dense_digest
from moe_edge.models.store.skeleton import (
    IN_PLACE,
    SKELETON_KIND,
    SOURCE,
    SOURCE_DIGEST,
    SOURCE_FILES,
    SOURCE_IDENTITY,
    check_version,
    part_identities,
    skeleton_of,
    stub_specs,
)
from moe_edge.models.store.source import (
    KIND,
    STORE_ID,
    check_counts,
    computed_layers,
    gguf_source,
    n_expert_used,
)

if TYPE_CHECKING:
    from moe_edge.models.calibration import Calibration

STORE_KIND = "experts"
ALIGNMENT = 4096
LEVELS = "moe_edge.levels"
CHECKSUMS = "moe_edge.checksums"
PACKED_VERSION = 2  # of a store with packed tensors
CODECS, PACKED_TYPES, PACKED_COLS, PACKED_ROWS = (
    f"moe_edge.packed.{name}" for name in ("codec", "type", "cols", "rows")
)  # array of u32 each, an entry a tensor; in stores of version 2
SOURCE_SHA256 = "moe_edge.source_sha256"
CALIBRATION = "moe_edge.calibration.version"
HIGH_NAME, LOW_NAME = "high", "low"

_EXPERT = re.compile(r"blk\.([0-9]+)\.ffn_(gate_up|gate|up|down)_exps\.([0-9]+)(\.low)?\.weight")
_BIAS = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up)_exps\.bias")

PieceKey = tuple[int, int, str, str]  # layer, expert, level, projection


@dataclass(frozen=True)
class ExpertModel:
    """A model as the runtime needs it.

    skeleton: the file for llama.cpp. files: where the experts are; `Piece.file` is an index into it.
    layers: those with experts, ascending. pieces: in the order layer, expert, level, projection.
    biases: (layer number, "up" | "gate") -> F32 [n_ff, n_expert].
    checksums: CRC-32 of each piece; None for a stock GGUF. dense_bytes: tensors of the skeleton, stubs included.
    calibration: what was measured when the model was converted; None when nothing was.
    stamps: of the skeleton and of `files`, when their headers were read.
    """

    skeleton: Path
    files: tuple[Path, ...]
    architecture: str
    n_expert_used: int
    layers: tuple[MoELayer, ...]
    levels: tuple[str, ...]
    pieces: tuple[Piece, ...]
    biases: Mapping[tuple[int, str], Piece]
    checksums: tuple[int, ...] | None
    store_id: str
    dense_bytes: int
    calibration: Calibration | None = field(default=None, compare=False)
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict, compare=False)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all pieces, at all levels."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def stored_expert_bytes(self) -> int:
        """What they take in the files."""
        return sum(piece.stored_bytes for piece in self.pieces)

    @property
    def in_place(self) -> bool:
        """Whether the experts are read from a stock GGUF."""
        return self.checksums is None


def open_model(
    path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None, verify: bool = False
) -> ExpertModel:
    """Open a converted model, a stock GGUF (its skeleton is found or written, see skeleton_for), or a folder of one.

    verify: read all experts and compare their checksums.
    Raises MissingFile, WrongStore when skeleton and experts do not belong together, CutFile, BadFile, BadChecksum,
    NotMoE, UnknownName for an architecture we do not know, UsageError for a store given in place of its skeleton.
    """
    path = find_model(Path(path))
    model = open_gguf(path)
    kind = model.kv.get(KIND)
    if kind == STORE_KIND:
        is_named = path.name.lower().endswith(STORE_SUFFIX)
        skeleton = path.name[: -len(STORE_SUFFIX)] + ".gguf" if is_named else "NAME.gguf"
        raise UsageError(f"{path}: is an expert store; give its skeleton, {path.with_name(skeleton)}")
    if kind is None:
        opened = _open_in_place(model, read_gguf(skeleton_of(model, cache_dir)))
    else:
        opened = _open_pair(path, model)
    if verify and opened.in_place:
        raise UsageError(f"{opened.files[0]}: a stock GGUF carries no checksums; convert it to have them")
    if verify:
        verify_store(opened.files[0])
    return opened


def store_path(skeleton: Path) -> Path:
    """`olmo.experts.gguf` for `olmo.gguf`."""
    name = skeleton.name
    return skeleton.with_name((name[: -len(".gguf")] if name.lower().endswith(".gguf") else name) + STORE_SUFFIX)


def verify_store(path: Path) -> None:
    """Read every tensor of a store and compare its CRC-32. Raises BadChecksum naming the first that differs."""
    store = read_gguf(path)
    checksums = _checksums(store)
    with SourceFiles({path: store.stamp}) as files:
        fd = files.open(path)
        for entry in store.tensors.values():
            try:
                found, needed = crc_of_range(fd, entry.offset, entry.nbytes), checksums[entry.name]
            except OSError as error:
                raise unreadable(path, error) from error
            if found != needed:
                files.check_unchanged()
                raise BadChecksum(
                    f"{path}: tensor '{entry.name}' has CRC-32 {found:08x}, its checksum is {needed:08x}; "
                    "the file was altered: convert or download it again"
                )
        drop_cache(fd)


def store_id(specs: Iterable[TensorSpec | TensorEntry], checksums: Iterable[int]) -> str:
    """32 hex digits over the names, types, shapes and checksums of a store's tensors (docs/FORMAT.md)."""
    lines = [
        f"{spec.name} {spec.type} {','.join(map(str, spec.shape))} {checksum:08x}\n"
        for spec, checksum in zip(specs, checksums, strict=True)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def expert_name(layer: int, projection: str, expert: int, level: str) -> str:
    """`blk.3.ffn_up_exps.7.weight`, `blk.3.ffn_up_exps.7.low.weight`."""
    return f"blk.{layer}.ffn_{projection}_exps.{expert}.{'' if level == HIGH_NAME else level + '.'}weight"


def level_of(name: str) -> str:
    """The level of an expert tensor by its name in the store."""
    return LOW_NAME if name.endswith(".low.weight") else HIGH_NAME


def _open_pair(path: Path, model: GGUFModel) -> ExpertModel:
    """A skeleton and its store. Halves that do not belong together are read again while nobody replaces them."""
    try:
        return _open_skeleton(model.parts[0])
    except (WrongStore, MissingFile):
        opened: list[ExpertModel] = []
        whole(path.parent, lambda: opened.append(_open_skeleton(read_gguf(path))))
        return opened[0]


def _open_skeleton(skeleton: GGUFFile) -> ExpertModel:
    check_version(skeleton, SKELETON_KIND)
    if not skeleton.kv.get(IN_PLACE):
        return _open_store(skeleton)
    sources = [Path(each) for each in _strings(skeleton, SOURCE_FILES)]
    if not sources:
        raise BadFile(f"{skeleton.path}: reads its experts in place but has no '{SOURCE_FILES}'")
    model = open_parts(sources)
    found, needed = list(part_identities(model.parts).values()), _strings(skeleton, SOURCE_IDENTITY)
    if found != needed:
        raise WrongStore(
            f"{skeleton.path}: was made for {sources[0]} when it had size:mtime {shown(needed)}, now it has "
            f"{shown(found)}; give {sources[0]} itself"
        )
    if SOURCE_DIGEST in skeleton.kv:
        with SourceFiles({part.path: part.stamp for part in model.parts}) as files:
            digest = dense_digest(gguf_source(model).dense, files)
        if digest != skeleton.kv[SOURCE_DIGEST]:
            raise WrongStore(
                f"{skeleton.path}: was made for {sources[0]} when it had other weights; give {sources[0]} itself"
            )
    return _open_in_place(model, skeleton)


def _strings(file: GGUFFile, key: str) -> list[str]:
    """An array of strings, empty when there is no such key. Raises BadFile for another type."""
    value = file.kv.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise BadFile(f"{file.path}: {key} is {shown(value)}, expected an array of names")
    return value


def _open_in_place(model: GGUFModel, skeleton: GGUFFile) -> ExpertModel:
    stacked = find_stacked(model.tensors, str(model.path))
    check_counts(stacked.layers, str(model.path))
    files = tuple(part.path for part in model.parts)
    index = {path: number for number, path in enumerate(files)}
    pieces = []
    for layer in stacked.layers:
        homes = [(each, index[stacked.weights[layer.layer, each].path]) for each in layer.projections]
        for expert in range(layer.n_expert):
            pieces += [stacked.piece(layer.layer, expert, projection, file) for projection, file in homes]
    biases = {key: _piece(entry, index[entry.path]) for key, entry in stacked.biases.items()}
    stamps = {part.path: part.stamp for part in model.parts}
    return _make_model(skeleton, files, stacked.layers, (HIGH_NAME,), pieces, biases, None, stamps)


def _open_store(skeleton: GGUFFile) -> ExpertModel:
    path = store_path(skeleton.path)
    if not is_present(path):
        source = str(skeleton.kv.get(SOURCE, "SOURCE"))
        raise MissingFile(
            f"{path}: the expert store of {skeleton.path.name} is missing; put it beside the skeleton or convert "
            f"again: moe-edge convert {source if len(source) < 200 else 'SOURCE'} -o {skeleton.path}"
        )
    store = read_gguf(path)
    check_version(store, STORE_KIND, PACKED_VERSION)
    needed, found = skeleton.kv.get(STORE_ID), store.kv.get(STORE_ID)
    if needed != found:
        raise WrongStore(
            f"{path}: has store id {str(found)[:40]} but {skeleton.path.name} needs {str(needed)[:40]}; "
            "they are of different conversions: put the right one beside it"
        )
    levels = tuple(_strings(store, LEVELS))
    if levels not in ((HIGH_NAME,), (HIGH_NAME, LOW_NAME)):
        raise BadFile(f"{path}: has levels {shown(list(levels))}, expected high, or high and low")
    experts, biases = _sort_tensors(store)
    layers = _store_layers(experts, path)
    checksums = _checksums(store)
    pieces, piece_checksums = [], []
    for key in _piece_keys(layers, levels):
        piece = experts.pop(key, None)
        layer, expert, level, projection = key
        if piece is None:
            raise BadFile(f"{path}: tensor '{expert_name(layer, projection, expert, level)}' is missing")
        pieces.append(piece)
        piece_checksums.append(checksums[piece.name])
    if experts:
        raise BadFile(f"{path}: tensor '{next(iter(experts.values())).name}' belongs to no expert")
    _check_shapes(layers, levels, pieces, path)
    if store_id(store.tensors.values(), checksums.values()) != found:
        raise BadChecksum(f"{path}: its list of tensors was altered: it does not give the store id {found}")
    calibration = _calibration(store, computed_layers(skeleton.kv, layers), levels)
    checks, stamps = tuple(piece_checksums), {path: store.stamp}
    return _make_model(skeleton, (path,), layers, levels, pieces, biases, checks, stamps, calibration)


def _calibration(store: GGUFFile, layers: tuple[MoELayer, ...], levels: tuple[str, ...]) -> Calibration | None:
    if CALIBRATION not in store.kv:
        return None
    from moe_edge.models.store.calibration_keys import read_calibration  # numpy: not for models without a calibration

    found = read_calibration(store.kv, str(store.path))
    if found is None:
        return None
    needed = (len(layers), max(layer.n_expert for layer in layers))
    if found.counts.shape != needed or found.levels != levels:
        raise BadFile(
            f"{store.path}: its calibration is of {list(found.counts.shape)} layers and experts at the levels "
            f"{list(found.levels)}, expected {list(needed)} at {list(levels)}"
        )
    return found


def _make_model(
    skeleton: GGUFFile,
    files: tuple[Path, ...],
    layers: tuple[MoELayer, ...],
    levels: tuple[str, ...],
    pieces: Sequence[Piece],
    biases: Mapping[tuple[int, str], Piece],
    checksums: tuple[int, ...] | None,
    stamps: Mapping[Path, FileStamp],
    calibration: Calibration | None = None,
) -> ExpertModel:
    for entry in skeleton.tensors.values():
        check_product(entry.name, entry.type, str(skeleton.path))
    for stub in stub_specs(layers, biases):
        found = skeleton.tensors.get(stub.name)
        if found is None or (found.shape, found.type) != (stub.shape, stub.type):
            raise WrongStore(
                f"{skeleton.path}: stub '{stub.name}' is {list(found.shape) if found else 'missing'}, "
                f"the experts in {files[0]} need {list(stub.shape)}; convert again"
            )
    computed = computed_layers(skeleton.kv, layers)
    if not computed:
        raise BadFile(f"{skeleton.path}: its only experts are in layers that a decode does not compute")
    n_pieces = sum(layer.n_expert * len(layer.projections) for layer in computed) * len(levels)
    last = computed[-1].layer
    return ExpertModel(
        skeleton=skeleton.path,
        files=files,
        architecture=str(skeleton.kv.get("general.architecture")),
        n_expert_used=n_expert_used(skeleton.kv, str(skeleton.path)),
        layers=computed,
        levels=levels,
        pieces=tuple(pieces[:n_pieces]),
        biases={key: piece for key, piece in biases.items() if key[0] <= last},
        checksums=None if checksums is None else checksums[:n_pieces],
        store_id=str(skeleton.kv.get(STORE_ID)),
        dense_bytes=sum(entry.nbytes for entry in skeleton.tensors.values()),
        calibration=calibration,
        stamps={skeleton.path: skeleton.stamp, **stamps},
    )


def _sort_tensors(store: GGUFFile) -> tuple[dict[PieceKey, Piece], dict[tuple[int, str], Piece]]:
    experts: dict[PieceKey, Piece] = {}
    biases = {}
    for number, (name, entry) in enumerate(store.tensors.items()):
        if match := _EXPERT.fullmatch(name):
            piece = _stored_piece(store, number, entry)
            experts[int(match[1]), int(match[3]), LOW_NAME if match[4] else HIGH_NAME, match[2]] = piece
        elif match := _BIAS.fullmatch(name):
            piece = biases[int(match[1]), match[2]] = _stored_piece(store, number, entry)
        else:
            raise BadFile(f"{store.path}: tensor '{name}' is not one of an expert store")
        check_product(name, piece.type, str(store.path))
    return experts, biases


def _stored_piece(store: GGUFFile, number: int, entry: TensorEntry) -> Piece:
    """Where a tensor's matrix is and what it is: as the GGUF says, or as the keys for packed ones say."""
    codec = _packed(store, CODECS)[number] if CODECS in store.kv else RAW
    if codec == RAW:
        if len(entry.shape) != 2:
            raise BadFile(f"{store.path}: tensor '{entry.name}' has shape {list(entry.shape)}, expected 2 dimensions")
        return _piece(entry)
    type_id, cols, rows = (_packed(store, key)[number] for key in (PACKED_TYPES, PACKED_COLS, PACKED_ROWS))
    if type_id not in TYPES or not cols or not rows or cols % TYPES[type_id].block:
        raise BadFile(
            f"{store.path}: tensor '{entry.name}' is packed and said to be {[cols, rows]} of {type_name(type_id)}, "
            "which cannot be; convert or download it again"
        )
    nbytes = tensor_bytes(type_id, (cols, rows))
    return Piece(0, entry.offset, nbytes, type_id, cols, rows, entry.name, codec, entry.nbytes)


def _packed(store: GGUFFile, key: str) -> list[int]:
    """A key of packed tensors: a number for each. Raises BadFile for anything else."""
    values = store.kv.get(key, [])
    if not isinstance(values, list) or len(values) != len(store.tensors) or not all(type(v) is int for v in values):
        raise BadFile(f"{store.path}: {key} is {shown(values)}, expected {len(store.tensors)} numbers; convert again")
    return values


def _store_layers(experts: Mapping[PieceKey, Piece], path: Path) -> tuple[MoELayer, ...]:
    """The layers, after the shapes of each one's expert 0 and the highest expert number."""
    n_expert: dict[int, int] = {}
    shapes: dict[int, dict[str, tuple[int, int]]] = {}
    for (layer, expert, level, projection), piece in experts.items():
        n_expert[layer] = max(n_expert.get(layer, 0), expert + 1)
        if expert == 0 and level == HIGH_NAME:
            shapes.setdefault(layer, {})[projection] = (piece.cols, piece.rows)
    return tuple(make_layer(layer, n_expert[layer], shapes.get(layer, {}), str(path)) for layer in sorted(n_expert))


def _piece_keys(layers: Iterable[MoELayer], levels: Iterable[str]) -> Iterator[PieceKey]:
    for layer in layers:
        for expert in range(layer.n_expert):
            for level in levels:
                for projection in layer.projections:
                    yield layer.layer, expert, level, projection


def _check_shapes(layers: Iterable[MoELayer], levels: Iterable[str], pieces: Iterable[Piece], path: Path) -> None:
    expected = {(layer.layer, each): layer.shape(each) for layer in layers for each in layer.projections}
    for (layer, _, _, projection), piece in zip(_piece_keys(layers, levels), pieces, strict=True):
        if (piece.cols, piece.rows) != expected[layer, projection]:
            raise BadFile(
                f"{path}: tensor '{piece.name}' is {[piece.cols, piece.rows]}, "
                f"expected {list(expected[layer, projection])}"
            )


def _checksums(store: GGUFFile) -> dict[str, int]:
    values = store.kv.get(CHECKSUMS, [])
    if not isinstance(values, list) or not all(type(each) is int for each in values):
        raise BadFile(f"{store.path}: {CHECKSUMS} is {shown(values)}, expected an array of numbers")
    if len(values) != len(store.tensors):
        raise BadFile(f"{store.path}: has {len(values)} checksums for {len(store.tensors)} tensors")
    return dict(zip(store.tensors, values, strict=True))


def _piece(entry: TensorEntry, file: int = 0) -> Piece:
    return Piece(file, entry.offset, entry.nbytes, entry.type, entry.shape[0], entry.shape[1], entry.name)
