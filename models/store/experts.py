"""Expert tensors: their names, their layers, and where each expert's bytes are.

Works on tensor lists only. Widths and counts come from the tensors, never from metadata keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moe_edge.models.errors import BadFile, NotMoE
from moe_edge.models.formats.ggml_types import F32, check_product, type_name
from moe_edge.models.formats.gguf import TensorEntry

_STACKED = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.(weight|bias)")
_SCALE = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.scale")
_OLD_SPLIT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")

SHAPES_OF_PROJECTIONS = (("gate_up", "down"), ("up", "gate", "down"), ("up", "down"))


RAW = 0  # a codec
MatrixKey = tuple[int, int, str]  # layer number, expert, projection


class Piece(NamedTuple):
    """One projection of one expert at one level: a range of bytes in one of the model's files.

    file: index into the model's files. nbytes: of the matrix in memory. cols: row length (ne0). rows: ne1. name: the
    tensor, with `[e]` behind it when the expert is a slice of a stacked tensor.
    codec: how it is stored (native/codec.h), RAW: as it is in memory. packed_bytes: what it takes in the file, where
    that is another number; 0: nbytes.
    """

    file: int
    offset: int
    nbytes: int
    type: int
    cols: int
    rows: int
    name: str
    codec: int = RAW
    packed_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """What it takes in the file, from `offset`."""
        return self.packed_bytes or self.nbytes


@dataclass(frozen=True)
class MoELayer:
    """A layer with experts. `projections` is ("up", "gate", "down"), ("gate_up", "down") or ("up", "down")."""

    layer: int
    n_expert: int
    n_embd: int
    n_ff: int
    fused: bool
    gated: bool
    projections: tuple[str, ...]

    def shape(self, projection: str) -> tuple[int, int]:
        """(cols, rows) of one expert's projection: (n_embd, n_ff) for up, (n_ff, n_embd) for down."""
        if projection == "down":
            return self.n_ff, self.n_embd
        return self.n_embd, self.n_ff * 2 if projection == "gate_up" else self.n_ff


@dataclass(frozen=True)
class StackedExperts:
    """The expert tensors of a stock GGUF: weights by (layer, projection), biases by (layer, "up" | "gate")."""

    layers: tuple[MoELayer, ...]
    weights: Mapping[tuple[int, str], TensorEntry]
    biases: Mapping[tuple[int, str], TensorEntry]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in (*self.weights.values(), *self.biases.values()))

    def piece(self, layer: int, expert: int, projection: str, file: int) -> Piece:
        """One expert's slice of a stacked tensor: contiguous, at expert * nb[2]."""
        entry = self.weights[layer, projection]
        cols, rows, n_expert = entry.shape
        nbytes = entry.nbytes // n_expert
        return Piece(file, entry.offset + expert * nbytes, nbytes, entry.type, cols, rows, f"{entry.name}[{expert}]")


def find_stacked(tensors: Mapping[str, TensorEntry], where: str) -> StackedExperts:
    """The stacked expert tensors among `tensors`; `where` names the file in errors.

    Raises NotMoE when there are none, BadFile when a layer's tensors do not fit together or one of any kind has a type
    that llama.cpp cannot compute with.
    """
    weights: dict[tuple[int, str], TensorEntry] = {}
    biases: dict[tuple[int, str], TensorEntry] = {}
    for name, entry in tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            continue
        layer, projection, kind = int(match[1]), match[2], match[3]
        if kind == "weight":
            weights[layer, projection] = entry
        elif projection == "gate_up":
            raise BadFile(f"{where}: tensor '{name}': a bias of fused gate and up experts is not supported")
        elif projection != "down":  # the bias of down does not have the expert width: it stays dense
            biases[layer, projection] = entry
    if not weights:
        raise _no_experts(tensors, where)
    for entry in tensors.values():
        check_product(entry.name, entry.type, where)
    layers = tuple(_stacked_layer(number, weights, where) for number in sorted({layer for layer, _ in weights}))
    _check_biases(layers, biases, where)
    _check_scales(layers, tensors, where)
    return StackedExperts(layers, weights, biases)


def make_layer(number: int, n_expert: int, shapes: Mapping[str, tuple[int, int]], where: str) -> MoELayer:
    """A layer from the (cols, rows) of its projections. Raises BadFile when they do not fit together."""
    projections = next((each for each in SHAPES_OF_PROJECTIONS if set(each) == set(shapes)), None)
    if projections is None:
        raise BadFile(f"{where}: layer {number} has expert tensors {sorted(shapes)}, expected up, gate and down")
    first = projections[0]
    n_embd, rows = shapes[first]
    fused = first == "gate_up"
    if fused and rows % 2:
        raise BadFile(f"{where}: layer {number}: fused gate and up experts have {rows} rows, an odd number")
    n_ff = rows // 2 if fused else rows
    made = MoELayer(number, n_expert, n_embd, n_ff, fused, fused or "gate" in shapes, projections)
    for projection in projections:
        if shapes[projection] != made.shape(projection):
            raise BadFile(
                f"{where}: layer {number}: ffn_{projection}_exps is {list(shapes[projection])}, "
                f"expected {list(made.shape(projection))} beside ffn_{first}_exps"
            )
    return made


def _stacked_layer(number: int, weights: Mapping[tuple[int, str], TensorEntry], where: str) -> MoELayer:
    mine = {projection: entry for (layer, projection), entry in weights.items() if layer == number}
    for entry in mine.values():
        if len(entry.shape) != 3:
            raise BadFile(f"{where}: tensor '{entry.name}' has shape {list(entry.shape)}, expected 3 dimensions")
    counts = {entry.shape[2] for entry in mine.values()}
    if len(counts) != 1:
        raise BadFile(f"{where}: layer {number}: its expert tensors hold {sorted(counts)} experts, expected one number")
    shapes = {projection: (entry.shape[0], entry.shape[1]) for projection, entry in mine.items()}
    return make_layer(number, counts.pop(), shapes, where)


def _check_biases(layers: tuple[MoELayer, ...], biases: Mapping[tuple[int, str], TensorEntry], where: str) -> None:
    by_number = {layer.layer: layer for layer in layers}
    for (number, projection), entry in biases.items():
        layer = by_number.get(number)
        needed = (layer.n_ff, layer.n_expert) if layer and projection in layer.projections else None
        if entry.shape != needed or entry.type != 0:
            raise BadFile(
                f"{where}: tensor '{entry.name}' is {list(entry.shape)} of type id {entry.type}, "
                f"expected F32 of shape {list(needed) if needed else 'of a layer with experts'}"
            )


def _check_scales(layers: tuple[MoELayer, ...], tensors: Mapping[str, TensorEntry], where: str) -> None:
    """A scale for each expert stays dense, but the engine reads it too: F32, one number for each expert."""
    by_number = {layer.layer: layer for layer in layers}
    for name, entry in tensors.items():
        match = _SCALE.fullmatch(name)
        layer = by_number.get(int(match[1])) if match else None
        if layer is not None and (entry.shape != (layer.n_expert,) or entry.type != F32):
            raise BadFile(
                f"{where}: tensor '{name}' is {list(entry.shape)} of type {type_name(entry.type)}, "
                f"expected F32 of shape [{layer.n_expert}]: one scale for each expert"
            )


def _no_experts(tensors: Mapping[str, TensorEntry], where: str) -> NotMoE:
    old = next((name for name in tensors if _OLD_SPLIT.fullmatch(name)), None)
    if old is not None:
        return NotMoE(
            f"{where}: tensor '{old}': one tensor for each expert is a format llama.cpp no longer loads; "
            "convert the checkpoint again"
        )
    return NotMoE(f"{where}: has no expert tensors (blk.N.ffn_up_exps.weight); llama.cpp runs it as it is")
