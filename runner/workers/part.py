"""A run of a model's layers: the model as the board sees it that computes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.models.formats.gguf import GGUFFile
from moe_edge.models.store.experts import Piece
from moe_edge.models.store.store import ExpertModel

_BLOCK = re.compile(r"blk\.(\d+)\.")


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
