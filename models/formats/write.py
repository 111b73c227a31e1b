"""The only code that writes GGUF: under a name nobody else has until it is complete.

`GGUFOutput` writes header and tensors in one pass and keeps a CRC-32 of each tensor. Whatever goes wrong before
`commit`, the file is removed. `replace_kvs` changes key-values of a complete file, in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from moe_edge.models.errors import BadChecksum, DiskFull, MissingFile, WorkError
from moe_edge.models.formats import work
from moe_edge.models.formats.files import read_range
from moe_edge.models.formats.gguf import DEFAULT_ALIGNMENT, GGUFFile
from moe_edge.models.formats.keyvalues import ARRAY, SCALARS, STRING

U32, F32, BOOL = 4, 6, 7
SYNC_BYTES = 256 << 20  # give written pages back this often: dirty pages count as our memory in a cgroup
READ_BYTES = 8 << 20


class TensorSpec(NamedTuple):
    """A tensor to be written: shape in ggml order."""

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int


Value = int | float | bool | str | Sequence[str] | Sequence[int] | Sequence[float]


def encode_kv(key: str, value: Value, value_type: int, element_type: int | None = None) -> bytes:
    """A key-value as GGUF stores it. `value_type` is the GGUF id; `element_type` that of an array's elements."""
    record = _string(key) + struct.pack("<I", value_type)
    if value_type == STRING:
        return record + _string(str(value))
    if value_type != ARRAY:
        return record + struct.pack("<" + SCALARS[value_type][0], value)
    assert element_type is not None and isinstance(value, Sequence)
    record += struct.pack("<IQ", element_type, len(value))
    if element_type == STRING:
        return record + b"".join(_string(str(each)) for each in value)
    return record + struct.pack(f"<{len(value)}{SCALARS[element_type][0]}", *value)


def kv_string(key: str, value: str) -> bytes:
    """A string key-value."""
    return encode_kv(key, value, STRING)


def kv_strings(key: str, value: Sequence[str]) -> bytes:
    """An array of strings as key-value."""
    return encode_kv(key, value, ARRAY, STRING)


def kv_u32(key: str, value: int) -> bytes:
    """An unsigned 32-bit key-value."""
    return encode_kv(key, value, U32)


def kv_u32s(key: str, value: Sequence[int]) -> bytes:
    """An array of u32 as key-value."""
    return encode_kv(key, value, ARRAY, U32)


def kv_f32s(key: str, value: Sequence[float]) -> bytes:
    """An array of f32 as key-value."""
    return encode_kv(key, value, ARRAY, F32)


def kv_bool(key: str, value: bool) -> bytes:
    """A boolean key-value."""
    return encode_kv(key, value, BOOL)


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFull when `folder` has less than `needed_bytes` free, before anything is written."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise MissingFile(f"{folder}: cannot write there: {error.strerror}") from error
    if free < needed_bytes:
        raise DiskFull(f"{what}: needs {needed_bytes} bytes but {folder} has {free} free")


def free_bytes(folder: Path) -> int | None:
    """Bytes free in `folder`; None when the file system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


class GGUFOutput:
    """One GGUF file being written.

    Use as a context manager: `write` the tensors' bytes in the order of `tensors`, in pieces of any size, then
    `finish`, check, and `commit`. Leaving without `commit` removes what was written, `part`.
    path: what the file will be called, also in messages. part: where to write it, in a work folder, from where the
    caller moves it after `close`; by default beside `path`, which `commit` renames it to.
    whole: checksums of the first tensors when `part` is there and has them, from a writing that was stopped; None for a
    file that is new and goes when it is not committed. With a list, even an empty one, `part` stays.
    Raises DiskFull, MissingFile when the folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        kvs: Mapping[str, bytes],
        tensors: Iterable[TensorSpec],
        alignment: int = DEFAULT_ALIGNMENT,
        part: Path | None = None,
        whole: Sequence[int] | None = None,
    ) -> None:
        self.path = path
        self.part = part or work.part_path(path.parent)
        self.tensors = list(tensors)
        self.alignment = alignment
        self.checksums: list[int] = list(whole or ())
        self._stays = whole is not None
        self._kvs = kvs
        self._kv_offsets: dict[str, int] = {}
        self._left = 0  # bytes the current tensor still needs
        self._crc = 0
        self._unsynced = 0
        self._fd = -1
        self._next = len(self.checksums)
        self._is_kept = self._is_shorter = False
        self.offsets = _offsets(self.tensors, alignment)
        self.header = self._encode_header()
        self.total_bytes = self._total()

    def __enter__(self) -> GGUFOutput:
        if not self._stays:
            work.remember(self.part)
        try:
            if self._stays and not self.checksums:
                self.part.unlink(missing_ok=True)
            self._fd = os.open(self.part, os.O_RDWR) if self.checksums else work.create(self.part)
        except OSError as error:
            work.forget(self.part)
            raise self._failed(error) from error
        try:
            if self.checksums:
                self._go_on()
            else:
                self._write_all(self.header)
            self._begin_tensor()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _go_on(self) -> None:
        """Behind the tensors that are whole, with the header anew: what was patched is patched again."""
        end = self.offsets[self._next] if self._next < len(self.tensors) else self._total() - len(self.header)
        try:
            _pwrite(self._fd, self.header, 0)
            os.ftruncate(self._fd, len(self.header) + end)
            os.lseek(self._fd, len(self.header) + end, os.SEEK_SET)
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """See what was written to the disk."""
        self._sync()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes of the current tensor; a piece may not run into the next one."""
        assert self._left and len(data) <= self._left, f"{self.part}: {len(data)} bytes, {self._left} expected"
        self._write_all(data)
        self._crc = zlib.crc32(data, self._crc)
        self._left -= len(data)
        if not self._left:
            self._end_tensor()

    def write_shorter(self, data: bytes) -> None:
        """Write the current tensor whole, in fewer bytes than were planned: a list of bytes, of one dimension."""
        spec = self.tensors[self._next]
        assert len(spec.shape) == 1 and len(data) <= self._left == spec.nbytes, spec.name
        self.tensors[self._next] = spec._replace(shape=(len(data),), nbytes=len(data))
        self._left = len(data)
        self._is_shorter = True
        self.write(data)

    def patch(self, key: str, record: bytes) -> None:
        """Replace the key-value `key` by one of the same size, for what is known only after the data."""
        assert len(record) == len(self._kvs[key]), key
        try:
            _pwrite(self._fd, record, self._kv_offsets[key])
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Sync the complete file to the disk and drop it from the page cache, so that it is read back from there."""
        assert self._next == len(self.tensors) and not self._left, f"{self.part}: tensors are missing"
        if self._is_shorter:
            self._list_tensors_again()
            self.total_bytes = self._total()
        self._sync()

    def verify(self) -> None:
        """Read the tensors back from the disk. Raises BadChecksum naming the first that is not what was written, and
        MissingFile when the disk fails."""
        start = len(self.header)
        try:
            for spec, offset, checksum in zip(self.tensors, self.offsets, self.checksums, strict=True):
                if crc_of_range(self._fd, start + offset, spec.nbytes) != checksum:
                    raise BadChecksum(
                        f"{self.path}: tensor '{spec.name}' reads back differently than it was written; "
                        "the disk or the memory of this machine is faulty"
                    )
        except OSError as error:
            raise MissingFile(f"{self.path}: cannot be read back: {error.strerror or error}") from error
        drop_cache(self._fd)

    def commit(self) -> None:
        """Give the file its name; only after `finish`."""
        try:
            self._close()
            os.replace(self.part, self.path)
        except OSError as error:
            raise self._failed(error) from error
        self._is_kept = True
        work.sync_folder(self.path.parent)

    def close(self) -> None:
        """Keep the file as `part`; only after `finish`."""
        try:
            self._close()
        except OSError as error:
            raise self._failed(error) from error
        self._is_kept = True

    def _encode_header(self) -> bytes:
        header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self._kvs)))
        for key, record in self._kvs.items():
            self._kv_offsets[key] = len(header)
            header += record
        for spec, offset in zip(self.tensors, self.offsets, strict=True):
            header += _string(spec.name)
            header += struct.pack(f"<I{len(spec.shape)}QIQ", len(spec.shape), *spec.shape, spec.type, offset)
        header += bytes(-len(header) % self.alignment)
        return bytes(header)

    def _list_tensors_again(self) -> None:
        """The part of the header behind the key-values, with the sizes that the tensors turned out to have."""
        start = 24 + sum(map(len, self._kvs.values()))
        header = self._encode_header()
        assert len(header) == len(self.header)
        try:
            _pwrite(self._fd, header[start:], start)
        except OSError as error:
            raise self._failed(error) from error

    def _total(self) -> int:
        return len(self.header) + (self.offsets[-1] + self.tensors[-1].nbytes if self.tensors else 0)

    def _begin_tensor(self) -> None:
        if self._next < len(self.tensors):
            self._left = self.tensors[self._next].nbytes
            assert self._left > 0, self.tensors[self._next].name
            self._crc = 0

    def _end_tensor(self) -> None:
        self.checksums.append(self._crc)
        spec, offset = self.tensors[self._next], self.offsets[self._next]
        self._next += 1
        if self._next < len(self.tensors):
            padding = -spec.nbytes % self.alignment
            self.offsets[self._next] = offset + spec.nbytes + padding
            self._write_all(bytes(padding))
            self._begin_tensor()

    def _write_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        try:
            while len(view):
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise self._failed(error) from error
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error
        drop_cache(self._fd)
        self._unsynced = 0

    def _failed(self, error: OSError) -> WorkError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(self.part.parent)
            left = "" if free is None else f", {free} are free"
            return DiskFull(
                f"{self.path}: no room left while writing: the file needs {self.total_bytes} bytes{left}"
            )
        return MissingFile(f"{self.path}: cannot be written: {error.strerror or error}")

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        if self._is_kept or self._stays:
            work.forget(self.part)
        else:
            work.remove(self.part)


def replace_kvs(file: GGUFFile, records: Mapping[str, bytes]) -> None:
    """Put `records` in the place of the key-values of the same names and sizes, in that order, and sync after each.

    Raises MissingFile when the file cannot be written.
    """
    offsets, at = {}, 4 + 4 + 8 + 8  # magic, version, number of tensors, number of key-values
    for key in file.kv:
        offsets[key] = at
        at += len(file.kv.record(key))
    for key, record in records.items():
        assert len(record) == len(file.kv.record(key)), key
    try:
        fd = os.open(file.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            for key, record in records.items():
                _pwrite(fd, record, offsets[key])
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise MissingFile(f"{file.path}: cannot be written: {error.strerror or error}") from error


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def crc_of_range(fd: int, offset: int, nbytes: int) -> int:
    """CRC-32 of bytes of a file; stops where the file ends. Raises OSError."""
    crc, end = 0, offset + nbytes
    while offset < end:
        data = read_range(fd, min(READ_BYTES, end - offset), offset)
        if not data:
            break
        crc = zlib.crc32(data, crc)
        offset += len(data)
    return crc


def drop_cache(fd: int) -> None:
    """Tell the kernel that the (synced) pages of a file will not be read again; does nothing where it cannot."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _offsets(tensors: Sequence[TensorSpec], alignment: int) -> list[int]:
    offsets, at = [], 0
    for spec in tensors:
        offsets.append(at)
        at += spec.nbytes + -spec.nbytes % alignment
    return offsets


def _string(text: str) -> bytes:
    data = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data
