"""A run of a model's layers: the model as the board sees it that computes them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.models.formats.gguf import GGUFFile, TensorEntry, read_gguf
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.store.experts import Piece
from moe_edge.models.store.skeleton import SOURCE_DIGEST
from moe_edge.models.store.store import ExpertModel

SAMPLED_PIECES = 256
SAMPLE_BYTES = 4096
_BLOCK = re.compile(r"blk\.(\d+)\.")


def content_id(model: ExpertModel) -> str:
    """32 hex digits that are the same for copies of a model, wherever they lie.

    The id of a converted model is over the checksums of its tensors. That of a stock GGUF has path and time of the file
    in it, so here it is over the forms of all experts, the digest of the dense weights (sample.py), and a page of each
    of up to 256 experts. Raises what SourceFiles.read does.
    """
    if not model.in_place:
        return model.store_id
    digest = hashlib.sha256(str(read_gguf(model.skeleton).kv.get(SOURCE_DIGEST)).encode())
    for piece in model.pieces:
        digest.update(f"\0{piece.name}\0{piece.type}\0{piece.cols}\0{piece.rows}".encode(errors="surrogateescape"))
    step = max(1, len(model.pieces) // SAMPLED_PIECES)
    with SourceFiles(model.stamps) as files:
        for piece in model.pieces[::step]:
            path = model.files[piece.file]
            entry = TensorEntry(piece.name, (piece.cols, piece.rows), piece.type, path, piece.offset, piece.nbytes)
            digest.update(files.read(entry, 0, min(SAMPLE_BYTES, piece.nbytes)))
    return digest.hexdigest()[:32]


def n_blocks(architecture: str, metadata: Mapping[str, Any]) -> int:
    """Layers of the model, with and without experts."""
    value = metadata.get(f"{architecture}.block_count")
    return int(value) if isinstance(value, int) and value > 0 else 0


def part_of(model: ExpertModel, begin: int, end: int) -> ExpertModel:
    """The model with the experts of the blocks begin <= number < end. Raises UsageError when there are none."""
    pieces: list[Piece] = []
    at = 0
    for layer in model.layers:
        n = layer.n_expert * len(model.levels) * len(layer.projections)
        if begin <= layer.layer < end:
            pieces += model.pieces[at : at + n]
        at += n
    layers = tuple(layer for layer in model.layers if begin <= layer.layer < end)
    if not layers:
        raise UsageError(f"none of the layers {begin} to {end - 1} has experts; name fewer boards in --workers")
    biases = {key: piece for key, piece in model.biases.items() if begin <= key[0] < end}
    return replace(model, layers=layers, pieces=tuple(pieces), biases=biases)


def dense_bytes_by_block(skeleton: GGUFFile, blocks: int) -> tuple[list[int], int]:
    """(bytes of the skeleton's tensors of each block, bytes of all others)."""
    of_block, others = [0] * blocks, 0
    for name, tensor in skeleton.tensors.items():
        found = _BLOCK.match(name)
        if found and int(found[1]) < blocks:
            of_block[int(found[1])] += tensor.nbytes
        else:
            others += tensor.nbytes
    return of_block, others


def expert_bytes_by_block(model: ExpertModel, blocks: int) -> list[int]:
    """Bytes of the experts of each block, at all levels."""
    out, at = [0] * blocks, 0
    for layer in model.layers:
        n = layer.n_expert * len(model.levels) * len(layer.projections)
        out[layer.layer] = sum(piece.nbytes for piece in model.pieces[at : at + n])
        at += n
    return out
