"""An importance matrix as llama.cpp's llama-imatrix writes it: what goes into each column of each matrix.

For every matrix the mean of the squared inputs of its columns; for experts also how many tokens each one had.
Source: llama.cpp, tools/imatrix/imatrix.cpp (save_imatrix) and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import BadFile, BadMagic
from moe_edge.models.formats.files import shown
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.ggml_types import F32, type_name
from moe_edge.models.formats.gguf import GGUFFile, TensorEntry, read_gguf
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.store.experts import MatrixKey, MoELayer

IntArray = npt.NDArray[np.int64]

SQUARES, COUNTS = ".in_sum2", ".counts"
MAX_BYTES = 1 << 26  # of one tensor; 512 experts of 16,384 columns have half of it
MAX_COUNT = 2.0**53
# gate and up have the same inputs: whichever the matrix was collected for serves the other
_SAME_INPUTS = {"gate_up": ("gate_up", "up", "gate"), "up": ("up", "gate_up"), "gate": ("gate", "gate_up")}


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    squares: tensor name -> (n_mat, n_cols), means of squared inputs; n_mat is the number of experts, or 1. Zeros where
    the text used a matrix never. counts: tensor name -> (n_mat,), tokens each matrix was used for.
    datasets, chunk_count, chunk_size: the text, in chunks of chunk_size tokens; empty or 0 when the file does not say.
    """

    path: Path
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    squares: Mapping[str, FloatArray]
    counts: Mapping[str, IntArray]

    def expert_importance(self, layers: Iterable[MoELayer]) -> dict[MatrixKey, FloatArray]:
        """(layer number, expert, projection) -> (n_cols,), of every expert the text used.

        Raises BadFile when the matrix was collected for other shapes than those of `layers`.
        """
        found = {}
        for layer in layers:
            for projection in layer.projections:
                name = self._expert_tensor(layer, projection)
                if name is None:
                    continue
                self._check_shape(name, (layer.n_expert, layer.shape(projection)[0]))
                for expert in np.flatnonzero(self.counts[name]):
                    found[layer.layer, int(expert), projection] = self.squares[name][expert]
        return found

    def dense_importance(self) -> dict[str, FloatArray]:
        """Tensor name -> (n_cols,), of every matrix that is not stacked and was used."""
        return {name: rows[0] for name, rows in self.squares.items() if len(rows) == 1 and self.counts[name][0] > 0}

    def routing_counts(self, layers: Iterable[MoELayer]) -> IntArray:
        """(n_layers, most experts of a layer), tokens routed to each expert; narrower layers padded with zeros.

        Raises BadFile for a layer without counts.
        """
        layers = tuple(layers)
        table = np.zeros((len(layers), max(layer.n_expert for layer in layers)), np.int64)
        for row, layer in zip(table, layers, strict=True):
            names = [self._expert_tensor(layer, projection) for projection in layer.projections]
            name = next((each for each in names if each is not None), None)
            if name is None:
                raise BadFile(f"{self.path}: has no counts of experts in layer {layer.layer}; it is of another model")
            if len(self.counts[name]) != layer.n_expert:
                raise self._wrong(name, f"{len(self.counts[name])} counts", f"{layer.n_expert}, one for each expert")
            row[: layer.n_expert] = self.counts[name]
        return table

    def _expert_tensor(self, layer: MoELayer, projection: str) -> str | None:
        names = [f"blk.{layer.layer}.ffn_{each}_exps.weight" for each in _SAME_INPUTS.get(projection, (projection,))]
        return next((name for name in names if name in self.squares), None)

    def _check_shape(self, name: str, needed: tuple[int, int]) -> None:
        if self.squares[name].shape != needed:
            n_mat, n_cols = self.squares[name].shape
            raise self._wrong(
                name, f"{n_mat} rows of {n_cols} columns", f"{needed[0]} of {needed[1]}: it is of another model"
            )

    def _wrong(self, name: str, found: str, needed: str) -> BadFile:
        return BadFile(f"{self.path}: tensor '{name}' has {found}, expected {needed}")


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix in GGUF form, as llama-imatrix writes it.

    Raises MissingFile, BadMagic for the old .dat form, CutFile, BadFile for what is not an importance matrix.
    """
    try:
        file = read_gguf(path)
    except BadMagic as error:
        raise BadMagic(
            f"{error}; an importance matrix in the old form must be made again: llama-imatrix --output-format gguf"
        ) from error
    kind = file.kv.get("general.type")
    if kind != "imatrix":
        raise BadFile(f"{file.path}: general.type is {shown(kind)}, expected 'imatrix': give what llama-imatrix wrote")
    squares, counts = {}, {}
    with SourceFiles({file.path: file.stamp}) as files:
        for name, (sums, uses) in _pairs(file).items():
            counts[name] = _whole_numbers(_values(files, uses), uses)
            squares[name] = _mean_squares(_values(files, sums), counts[name], sums)
    return Imatrix(
        path=file.path,
        datasets=_datasets(file),
        chunk_count=_number(file, "imatrix.chunk_count"),
        chunk_size=_number(file, "imatrix.chunk_size"),
        squares=squares,
        counts=counts,
    )


def fill_unused(importance: Mapping[MatrixKey, FloatArray], layers: Iterable[MoELayer]) -> dict[MatrixKey, FloatArray]:
    """`importance` with the experts the text never used (none, or all zeros) given the mean of their layer's others.

    A layer of which no expert was used stays without.
    """
    filled = {key: values for key, values in importance.items() if values.any()}
    for layer in layers:
        for projection in layer.projections:
            keys = [(layer.layer, expert, projection) for expert in range(layer.n_expert)]
            used = [filled[key] for key in keys if key in filled]
            if 0 < len(used) < layer.n_expert:
                mean: FloatArray = np.asarray(np.mean(used, axis=0, dtype=np.float64), np.float32)
                filled |= {key: mean for key in keys if key not in filled}
    return filled


def _pairs(file: GGUFFile) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    names: dict[str, None] = {}  # in the order of the file
    for name in file.tensors:
        stem = name.removesuffix(SQUARES).removesuffix(COUNTS)
        if stem == name:
            raise BadFile(f"{file.path}: tensor '{name}' is not one of an importance matrix ({SQUARES}, {COUNTS})")
        names[stem] = None
    if not names:
        raise BadFile(f"{file.path}: is an importance matrix without tensors")
    pairs = {}
    for name in names:
        for suffix in (SQUARES, COUNTS):
            if name + suffix not in file.tensors:
                raise BadFile(f"{file.path}: tensor '{name}{suffix}' is missing")
        pairs[name] = file.tensors[name + SQUARES], file.tensors[name + COUNTS]
    return pairs


def _values(files: SourceFiles, entry: TensorEntry) -> FloatArray:
    if entry.type != F32:
        raise BadFile(f"{entry.path}: tensor '{entry.name}' is {type_name(entry.type)}, expected F32")
    if entry.nbytes > MAX_BYTES:
        raise BadFile(
            f"{entry.path}: tensor '{entry.name}' has {entry.nbytes} bytes, "
            f"one of an importance matrix at most {MAX_BYTES}"
        )
    values = np.frombuffer(files.read(entry, 0, entry.nbytes), "<f4").astype(np.float32, copy=False)
    if not np.isfinite(values).all() or (values < 0).any():
        raise BadFile(f"{entry.path}: tensor '{entry.name}' holds numbers that are not finite or negative")
    return values


def _whole_numbers(values: FloatArray, entry: TensorEntry) -> IntArray:
    if (values != np.rint(values)).any() or (values > MAX_COUNT).any():
        raise BadFile(f"{entry.path}: tensor '{entry.name}' holds counts that are not whole numbers")
    return values.astype(np.int64)


def _mean_squares(sums: FloatArray, counts: IntArray, entry: TensorEntry) -> FloatArray:
    n_cols = entry.shape[0]
    if len(sums) != n_cols * len(counts):
        raise BadFile(
            f"{entry.path}: tensor '{entry.name}' has shape {list(entry.shape)}, "
            f"expected {n_cols} columns for each of {len(counts)} counts"
        )
    divisors = np.maximum(counts, 1).astype(np.float32)
    means: FloatArray = np.divide(sums.reshape(-1, n_cols), divisors[:, None], dtype=np.float32)
    means[counts == 0] = 0.0
    return means


def _datasets(file: GGUFFile) -> tuple[str, ...]:
    value = file.kv.get("imatrix.datasets", [])
    if not isinstance(value, list):
        raise BadFile(f"{file.path}: imatrix.datasets is {shown(value)}, expected an array of names")
    return tuple(map(str, value))


def _number(file: GGUFFile, key: str) -> int:
    value = file.kv.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise BadFile(f"{file.path}: {key} is {shown(value)}, expected a number")
    return value
