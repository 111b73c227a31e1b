"""Open, list and check GGUF files; no arithmetic on weights, no writing.

Only the header is read. Every length in it is distrusted: nothing is allocated or followed before it was compared
with the size of the file, and counts have limits, so that no file costs more than two seconds and 256 MiB.
`read_gguf` is for one file, `open_gguf` also for a split model; `read_header` and
`open_headers` are the same for files that may end after their headers, as while they are fetched.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BadFile, BadMagic, CutFile, MissingFile
from moe_edge.models.formats.files import FileStamp, is_present, open_file, read_range, shown
from moe_edge.models.formats.files import unreadable as unreadable
from moe_edge.models.formats.ggml_types import TYPES
from moe_edge.models.formats.keyvalues import (
    ARRAY,
    STRING,
    TensorInfo,
    parse_array_head,
    parse_key_value,
    parse_tensor_info,
    parse_u32,
    parse_u64,
)
from moe_edge.models.formats.keyvalues import KeyValues as KeyValues

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MOST_NAMED = 8  # files in a message
FIRST_READ = 1 << 20  # header bytes to read at first, and then four times as many
MAX_HEADER = 1 << 26  # a longer header is not one: the largest known vocabularies need about 2^24
MAX_KEYS = 1 << 16
MAX_STRINGS = 1 << 22  # of all arrays; the largest known vocabularies have 2^18 tokens and twice as many merges
# A stock model has some ten tensors a layer, an expert store one for each (layer, expert, projection, level).
MAX_TENSORS, MAX_STORE_TENSORS = 1 << 16, 1 << 18
MAX_ALIGNMENT = 1 << 16
OWN_KIND = "moe_edge.kind"

MAX_ARCHITECTURE = 64  # characters; llama.cpp's longest has 16

_SPLIT_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: shape in ggml order (row length first), `offset` from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of one GGUF file. `tensors` keeps the order of the file; `data_offset` and `file_bytes` in bytes.

    stamp: of the file that the header was read from.
    """

    path: Path
    version: int
    alignment: int
    kv: KeyValues
    tensors: Mapping[str, TensorEntry]
    data_offset: int
    file_bytes: int
    header: bytes  # everything before the tensor data
    stamp: FileStamp


@dataclass(frozen=True)
class GGUFModel:
    """A model of one GGUF file or of several parts: the first part's metadata, the tensors of all."""

    parts: tuple[GGUFFile, ...]
    kv: KeyValues
    tensors: Mapping[str, TensorEntry]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def architecture(self) -> str:
        value = self.kv.get("general.architecture")
        if not isinstance(value, str):
            raise BadFile(f"{self.path}: has no 'general.architecture'; it is not a model")
        if len(value) > MAX_ARCHITECTURE:
            raise BadFile(f"{self.path}: general.architecture is {shown(value)}, which is no name of an architecture")
        return value


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and check the header of one GGUF file, v2 or v3, little-endian.

    Raises MissingFile, BadMagic, CutFile when the header or a tensor does not fit the file, BadFile when the
    header contradicts itself.
    """
    return _read(Path(path), with_data=True)


def read_header(path: str | os.PathLike[str]) -> GGUFFile:
    """read_gguf() of a file that may end anywhere after its header: whether a tensor's bytes are there is not asked.

    `file_bytes` is the size as it is. For planning only: entries may name bytes that cannot be read.
    Raises what read_gguf raises, CutFile only when the header is cut.
    """
    return _read(Path(path), with_data=False)


def open_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Open a GGUF model; of a split one any part may be given.

    Raises MissingFile naming the parts that are not there, BadFile when parts do not belong together, and what
    read_gguf raises.
    """
    return _open(path, read_gguf)


def open_headers(path: str | os.PathLike[str]) -> GGUFModel:
    """open_gguf() of files read as read_header() does: of a split model the header of every part is needed.

    Raises what open_gguf raises, CutFile only when a header is cut.
    """
    return _open(path, read_header)


def open_parts(paths: Sequence[Path]) -> GGUFModel:
    """open_gguf() of a model whose parts are named one by one, whatever their names, as in the cache of the hub."""
    parts = tuple(read_gguf(path) for path in paths)
    return _join_parts(parts) if len(parts) > 1 else GGUFModel(parts, parts[0].kv, parts[0].tensors)


def _read(path: Path, *, with_data: bool) -> GGUFFile:
    fd = open_file(path)
    try:
        return _HeaderReader(path, fd, with_data=with_data).read()
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(fd)


def _open(path: str | os.PathLike[str], read: Callable[[str | os.PathLike[str]], GGUFFile]) -> GGUFModel:
    first = read(path)
    match = _SPLIT_NAME.fullmatch(first.path.name)
    count = first.kv.get("split.count", 0)
    if type(count) is not int or count < 0:
        raise BadFile(f"{first.path}: split.count is {shown(count)}, expected the number of parts")
    if count <= 1:
        return GGUFModel((first,), first.kv, first.tensors)
    if match is None or int(match[3]) != count:
        raise BadFile(
            f"{first.path}: is one of {count} parts but is not named like one; "
            f"name the parts NAME-00001-of-{count:05d}.gguf"
        )
    suffix = first.path.name[-len(".gguf") :]
    names = [f"{match[1]}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]
    paths = [first.path.with_name(name) for name in names]
    missing = [each.name for each in paths if not is_present(each)]
    if missing:
        named = ", ".join(missing[:MOST_NAMED]) + (", ..." if len(missing) > MOST_NAMED else "")
        raise MissingFile(f"{first.path}: {len(missing)} of {count} parts missing beside it: {named}")
    return _join_parts(tuple(first if each == first.path else read(each) for each in paths))


def _join_parts(parts: tuple[GGUFFile, ...]) -> GGUFModel:
    tensors: dict[str, TensorEntry] = {}
    for number, part in enumerate(parts):
        found = (part.kv.get("split.no"), part.kv.get("split.count"))
        if found != (number, len(parts)):
            raise BadFile(
                f"{part.path}: says it is part {shown(found[0])} of {shown(found[1])}, "
                f"expected {number} of {len(parts)}"
            )
        for name, entry in part.tensors.items():
            if name in tensors:
                raise BadFile(f"{part.path}: tensor '{name}' is also in {tensors[name].path.name}")
            tensors[name] = entry
    needed = parts[0].kv.get("split.tensors.count", len(tensors))
    if needed != len(tensors):
        raise BadFile(
            f"{parts[0].path}: promises {shown(needed)} tensors but its {len(parts)} parts hold {len(tensors)}"
        )
    return GGUFModel(parts, parts[0].kv, tensors)


class _HeaderReader:
    """Reads a header from the front, growing its buffer only when an item needs more bytes.

    with_data: whether the file must hold the bytes of every tensor too.
    """

    def __init__(self, path: Path, fd: int, *, with_data: bool) -> None:
        self.path = path
        self.fd = fd
        self.with_data = with_data
        self.stamp = FileStamp.of(os.fstat(fd))
        self.file_bytes = self.stamp.nbytes
        self.buffer = read_range(fd, min(FIRST_READ, self.file_bytes), 0)
        self.at = 0

    def read(self) -> GGUFFile:
        version = self._version()
        n_tensors, n_kv = (self._item(parse_u64, "the counts") for _ in range(2))
        self._check_count(n_tensors, 24, MAX_STORE_TENSORS, "tensors")
        self._check_count(n_kv, 13, MAX_KEYS, "key-values")
        spans = self._key_values(n_kv)
        if OWN_KIND not in spans:
            self._check_count(n_tensors, 24, MAX_TENSORS, "tensors")
        alignment = self._alignment(KeyValues(self.buffer, spans))
        infos = [self._item(parse_tensor_info, f"tensor header {number} of {n_tensors}") for number in range(n_tensors)]
        header, self.buffer = self.buffer[: self.at], b""  # one copy of it at a time
        data_offset = (self.at + alignment - 1) // alignment * alignment
        tensors = self._tensors(infos, alignment, data_offset)
        kv = KeyValues(header, spans)
        return GGUFFile(self.path, version, alignment, kv, tensors, data_offset, self.file_bytes, header, self.stamp)

    def _key_values(self, count: int) -> dict[str, tuple[int, int, int]]:
        """Key -> where its record, its value type and what follows begin."""
        spans: dict[str, tuple[int, int, int]] = {}
        n_strings = 0
        for number in range(count):
            what = f"key-value {number} of {count}"
            key, start, at, end = self._item(parse_key_value, what)
            if key in spans:
                raise BadFile(f"{self.path}: key {shown(key)} appears twice")
            spans[key] = (start, at, end)
            value_type, element_type, n_elements = parse_array_head(self.buffer, at)
            if value_type == ARRAY and element_type == STRING:
                n_strings += n_elements
            if n_strings > MAX_STRINGS:
                raise BadFile(f"{self.path}: {what} is damaged: more than {MAX_STRINGS} strings in arrays")
        return spans

    def _version(self) -> int:
        if self.buffer[:4] != MAGIC:
            found = "is empty" if not self.buffer else f"starts with {self.buffer[:4]!r}"
            raise BadMagic(f"{self.path}: not a GGUF file: it {found}, not {MAGIC!r}")
        self.at = 4
        version: int = self._item(parse_u32, "the version")
        if version & 0xFFFF == 0 and version:
            raise BadFile(f"{self.path}: is a big-endian GGUF; moe-edge reads little-endian ones")
        if version not in (2, 3):
            raise BadFile(f"{self.path}: is GGUF version {version}; moe-edge reads versions 2 and 3")
        return version

    def _item(self, parse: Any, what: str) -> Any:
        """Parse one item at self.at; read more of the file and try again while it runs over the buffer."""
        while True:
            try:
                value, end = parse(self.buffer, self.at)
                if end <= len(self.buffer):
                    self.at = end
                    return value
            except (struct.error, OverflowError):
                end = len(self.buffer) + 1
            except ValueError as error:
                raise BadFile(f"{self.path}: {what} is damaged: {error}") from error
            self._grow(end, what)

    def _grow(self, end: int, what: str) -> None:
        if end > self.file_bytes:
            raise CutFile(
                f"{self.path}: {what} needs bytes up to {end} but the file ends at {self.file_bytes}; "
                "it is cut short or damaged"
            )
        if end > MAX_HEADER:
            raise BadFile(f"{self.path}: {what} ends at byte {end}; a header longer than {MAX_HEADER} is damaged")
        size = min(max(end, 4 * len(self.buffer)), self.file_bytes, MAX_HEADER)
        grown = read_range(self.fd, size, 0)
        if len(grown) < end:
            raise CutFile(f"{self.path}: {what} needs bytes up to {end} but only {len(grown)} could be read")
        self.buffer = grown

    def _check_count(self, count: int, smallest: int, most: int, what: str) -> None:
        if count * smallest > self.file_bytes:
            raise CutFile(
                f"{self.path}: {count} {what} need at least {count * smallest} bytes "
                f"but the file ends at {self.file_bytes}"
            )
        if count > most:
            raise BadFile(f"{self.path}: has {count} {what}, a model has at most {most}; it is damaged")

    def _alignment(self, kv: KeyValues) -> int:
        if "general.alignment" not in kv:
            return DEFAULT_ALIGNMENT
        value = kv["general.alignment"]
        if kv.types("general.alignment")[0] != 4 or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise BadFile(
                f"{self.path}: general.alignment is {shown(value)}, "
                f"expected a power of two up to {MAX_ALIGNMENT} as u32"
            )
        return int(value)

    def _tensors(self, infos: list[TensorInfo], alignment: int, data_offset: int) -> dict[str, TensorEntry]:
        tensors: dict[str, TensorEntry] = {}
        for name, shape, type_id, offset in infos:
            nbytes = self._nbytes(name, shape, type_id)
            if offset % alignment:
                raise BadFile(f"{self.path}: tensor '{name}' is at offset {offset}, not a multiple of {alignment}")
            start = data_offset + offset
            if self.with_data and start + nbytes > self.file_bytes:
                raise cut_tensor(self.path, name, start, nbytes, self.file_bytes)
            if name in tensors:
                raise BadFile(f"{self.path}: tensor '{name}' appears twice")
            tensors[name] = TensorEntry(name, shape, type_id, self.path, start, nbytes)
        return tensors

    def _nbytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int:
        known = TYPES.get(type_id)
        if known is None:
            raise BadFile(f"{self.path}: tensor '{name}' has unknown type id {type_id}")
        elements = 1
        for size in shape:
            elements *= size
        if not shape or elements == 0 or elements >= 1 << 63:
            raise BadFile(f"{self.path}: tensor '{name}' has impossible shape {list(shape)}")
        if shape[0] % known.block:
            raise BadFile(
                f"{self.path}: tensor '{name}' has rows of {shape[0]} elements, "
                f"not a multiple of {known.name}'s block of {known.block}"
            )
        return elements // known.block * known.block_bytes


def cut_tensor(path: Path, name: str, start: int, nbytes: int, file_bytes: int) -> CutFile:
    """The error for a tensor whose bytes are not all in its file."""
    return CutFile(
        f"{path}: tensor '{name}' needs bytes {start}-{start + nbytes} but the file ends at {file_bytes}; "
        "it looks cut short"
    )
