"""A checked reader of safetensors files, single or with an index. No arithmetic but the widening to float32.

Clauses of the format that are checked: 8-byte header length, a JSON object, known dtypes, shapes whose bytes match
the offsets, offsets that cover the file without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from moe_edge.models.errors import BadFile, BadMagic, CutFile, MissingFile, UnknownName
from moe_edge.models.formats.files import is_present, open_file, read_file, shown, unreadable
from moe_edge.models.formats.gguf import MOST_NAMED, TensorEntry, cut_tensor
from moe_edge.models.formats.source_files import SourceFiles

if TYPE_CHECKING:  # numpy is not for the runtime, which opens models and converts none
    from moe_edge.models.formats.floats import FloatArray

MAX_HEADER = 1 << 25  # the format allows 100 MB; 130,000 tensors need half of this
MAX_JSON = 1 << 26  # the largest tokenizer.json known has 33 MB
MAX_JSON_VALUES = 2_500_000  # each takes up to 80 bytes once it is read; that tokenizer.json has 2.3 million
MAX_HEADER_VALUES = 1_200_000  # a tensor has 12
MAX_DIMENSIONS = 8
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape of a surrogate
MAX_SHARDS = 4096
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# dtype -> bytes of an element
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
GGML_OF_DTYPE = {"F32": 0, "F16": 1, "BF16": 30}
I8 = 24


@dataclass(frozen=True)
class SafeTensor:
    """A tensor: shape as in the checkpoint (row length last), `offset` from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def raw(self) -> TensorEntry:
        """This tensor as it is, for a DerivedEntry: what is no float of ggml's is bytes."""
        kind = GGML_OF_DTYPE.get(self.dtype, I8)
        shape = self.shape[::-1] if DTYPES[self.dtype] == 1 or kind != I8 else (self.nbytes,)
        return TensorEntry(self.name, shape, kind, self.path, self.offset, self.nbytes)

    def entry(self, name: str, start: int = 0, shape: tuple[int, ...] | None = None) -> TensorEntry:
        """This tensor, or a part of it from byte `start`, under a GGUF name and with a ggml-order shape.

        Raises UnknownName for a dtype that is not F32, F16 or BF16.
        """
        if self.dtype not in GGML_OF_DTYPE:
            raise UnknownName(f"{self.path}: tensor '{self.name}' is {self.dtype}; known: F32, F16, BF16")
        shape = self.shape[::-1] if shape is None else shape
        nbytes = math.prod(shape) * DTYPES[self.dtype]
        assert start + nbytes <= self.nbytes, self.name
        return TensorEntry(name, shape, GGML_OF_DTYPE[self.dtype], self.path, self.offset + start, nbytes)


@dataclass(frozen=True)
class SafeTensors:
    """All tensors of a checkpoint by name; `headers` are the raw headers of its files, in order."""

    tensors: Mapping[str, SafeTensor]
    files: tuple[Path, ...]
    headers: tuple[bytes, ...]

    def read(self, name: str) -> FloatArray:
        """One tensor as float32, in the checkpoint's shape. Raises UnknownName for a dtype that is not a float."""
        import numpy as np
        from moe_edge.models.formats.floats import bf16_to_f32

        tensor = self.tensors[name]
        data = self.read_raw(name)
        if tensor.dtype == "BF16":
            return bf16_to_f32(np.frombuffer(data, "<u2")).reshape(tensor.shape)
        if tensor.dtype not in GGML_OF_DTYPE:
            raise UnknownName(f"{tensor.path}: tensor '{name}' is {tensor.dtype}; known: F32, F16, BF16")
        code = "<f4" if tensor.dtype == "F32" else "<f2"
        return np.frombuffer(data, code).astype(np.float32).reshape(tensor.shape)

    def read_raw(self, name: str) -> bytes:
        """The bytes of one tensor, read by themselves."""
        tensor = self.tensors[name]
        entry = TensorEntry(name, tensor.shape, 0, tensor.path, tensor.offset, tensor.nbytes)
        with SourceFiles() as files:
            return files.read(entry, 0, tensor.nbytes)


def open_safetensors(folder: str | os.PathLike[str]) -> SafeTensors:
    """The tensors of a checkpoint folder: `model.safetensors.index.json` and its files, or `model.safetensors`.

    Raises MissingFile, BadMagic, CutFile, BadFile; also when index and files disagree.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if is_present(index):
        return _open_index(index)
    single = folder / SINGLE_NAME
    if not is_present(single):
        raise MissingFile(f"{folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}")
    tensors, header = read_safetensors(single)
    return SafeTensors(tensors, (single,), (header,))


def read_safetensors(path: Path) -> tuple[dict[str, SafeTensor], bytes]:
    """Read and check the header of one safetensors file; returns its tensors and the raw header."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), file_bytes)
            header = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    data_start = 8 + length
    tensors = {}
    for name, info in read_json(header, path, MAX_HEADER_VALUES).items():
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, info, data_start, file_bytes)
    _check_cover(path, tensors, data_start, file_bytes)
    return tensors, header


def read_json(data: bytes, path: Path, most_values: int = MAX_JSON_VALUES) -> dict[str, Any]:
    """A JSON object. Raises BadFile when `data` is not one, names a key twice, or would fill the memory."""
    n_values = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if n_values > most_values:
        raise BadFile(f"{path}: has about {n_values} values, at most {most_values} are read; it is damaged")
    try:
        value = json.loads(data, object_pairs_hook=_unique)
        if _HALF_CHARACTER.search(data):  # or the first half of a whole one, as some writers escape them
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadFile(f"{path}: is a JSON {type(value).__name__}, expected an object")
    return value


def as_object(value: Any, path: Path, what: str) -> Mapping[str, Any]:
    """`value`, which JSON calls an object; an empty one for null. Raises BadFile for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadFile(f"{path}: {what} is {shown(value)}, expected an object")
    return value


def as_objects(value: Any, path: Path, what: str) -> Sequence[Mapping[str, Any]]:
    """`value`, a list of objects; an empty one for null. Raises BadFile for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise BadFile(f"{path}: {what} is {shown(value)}, expected a list of objects")
    return value


def read_json_file(path: Path) -> dict[str, Any]:
    """As read_json, from a file. Raises MissingFile."""
    return read_json(read_file(path, MAX_JSON), path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} appears twice")
    return made


def _header_length(path: Path, data: bytes, file_bytes: int) -> int:
    if len(data) < 8:
        raise BadMagic(f"{path}: not a safetensors file: it has {file_bytes} bytes, expected at least 8")
    length: int = struct.unpack("<Q", data)[0]
    if length > MAX_HEADER:
        raise BadMagic(f"{path}: not a safetensors file: its header would be {length} bytes, at most {MAX_HEADER}")
    if 8 + length > file_bytes:
        raise CutFile(f"{path}: its header needs bytes 8-{8 + length} but the file ends at {file_bytes}")
    return length


def _tensor(path: Path, name: str, info: Any, data_start: int, file_bytes: int) -> SafeTensor:
    if not isinstance(info, dict):
        _bad(path, name, f"is described by {shown(info)}, expected an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _bad(path, name, f"has unknown dtype {shown(dtype)}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _bad(path, name, f"has shape {shown(shape)} and data_offsets {shown(offsets)}")
    nbytes = math.prod(shape) * DTYPES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        _bad(path, name, f"of shape {shape} and dtype {dtype} needs {nbytes} bytes, found {offsets[1] - offsets[0]}")
    if data_start + offsets[1] > file_bytes:
        raise cut_tensor(path, name, data_start + offsets[0], nbytes, file_bytes)
    return SafeTensor(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    """A few numbers below 2^63: a product of many large ones would take for ever."""
    is_short = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    return is_short and all(type(each) is int and 0 <= each < 1 << 63 for each in value)


def _bad(path: Path, name: str, what: str) -> NoReturn:
    raise BadFile(f"{path}: tensor {shown(name, 200)} {what}")


def _check_cover(path: Path, tensors: Mapping[str, SafeTensor], data_start: int, file_bytes: int) -> None:
    at = data_start
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.nbytes)):
        if tensor.offset != at:
            kind = "overlaps the one before it" if tensor.offset < at else "leaves a hole before it"
            _bad(path, tensor.name, f"starts at byte {tensor.offset}, expected {at}: it {kind}")
        at += tensor.nbytes
    if at != file_bytes:
        raise BadFile(f"{path}: its tensors end at byte {at} but the file at {file_bytes}")


def _open_index(index: Path) -> SafeTensors:
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{index}: has no 'weight_map'")
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise BadFile(
                f"{index}: names files outside its folder: tensor {shown(tensor_name)} is in {shown(file_name)}"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise BadFile(f"{index}: names {len(names)} files, at most {MAX_SHARDS} are read")
    paths = [index.with_name(name) for name in names]
    missing = [path.name for path in paths if not is_present(path)]
    if missing:
        named = ", ".join(shown(name)[1:-1] for name in missing[:MOST_NAMED])
        more = ", ..." if len(missing) > MOST_NAMED else ""
        raise MissingFile(f"{index}: {len(missing)} of {len(paths)} files missing beside it: {named}{more}")
    tensors: dict[str, SafeTensor] = {}
    headers = []
    for path in paths:
        found, header = read_safetensors(path)
        headers.append(header)
        for name, tensor in found.items():
            if weight_map.get(name) != path.name:
                _bad(path, name, f"should be in {shown(weight_map.get(name))} by {index.name}")
            tensors[name] = tensor
    lost = next((name for name in weight_map if name not in tensors), None)
    if lost is not None:
        raise BadFile(f"{index}: tensor {shown(lost)} is not in {weight_map[lost]}")
    return SafeTensors(tensors, tuple(paths), tuple(headers))
