"""Tensors' bytes from their files, as they are or converted, a bounded piece at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from moe_edge.convert.files import FileStamp, open_file, stamp_of, unreadable
from moe_edge.convert.ggml_types import row_bytes
from moe_edge.convert.gguf import TensorEntry, cut_tensor
from moe_edge.models.errors import BadFile, CutFile

if TYPE_CHECKING:
    from moe_edge.convert.plan import PlannedTensor
    from moe_edge.convert.quantize import FloatArray

CHUNK_BYTES = 8 << 20
CHUNK_ELEMENTS = 2 << 20  # to convert at a time: 8 MiB as float32


class SourceFiles:
    """Open files to read ranges from; use as a context manager. Reads may come from several threads.

    stamps: of files whose headers were read before; others are taken as they are when they are opened.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp] | None = None) -> None:
        self._fds: dict[Path, int] = {}
        self._stamps: dict[Path, FileStamp] = dict(stamps or {})

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def open(self, path: Path) -> int:
        """The file descriptor of `path`. Raises MissingFile, BadFile for one that is not the file of its stamp."""
        if path not in self._fds:
            self._fds[path] = open_file(path)
            self._check(path)
        return self._fds[path]

    def check_unchanged(self) -> None:
        """Raise BadFile when an open file was written to since it was opened: what was read then is of two files."""
        for path in self._fds:
            self._check(path)

    def _check(self, path: Path) -> None:
        try:
            found = FileStamp.of(os.fstat(self._fds[path]))
        except OSError as error:
            raise unreadable(path, error) from error
        if self._stamps.setdefault(path, found) != found:
            raise BadFile(f"{path}: was changed while it was read; try again when nothing writes to it")

    def read(self, entry: TensorEntry, start: int, nbytes: int) -> bytes:
        """`nbytes` of a tensor from its byte `start`. Raises CutFile, MissingFile when the disk fails."""
        fd = self.open(entry.path)
        at, end, pieces = entry.offset + start, entry.offset + start + nbytes, []
        while at < end:
            try:
                data = os.pread(fd, end - at, at)
            except OSError as error:
                raise unreadable(entry.path, error) from error
            if not data:
                raise self._cut(entry)
            pieces.append(data)
            at += len(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def chunks(self, entry: TensorEntry) -> Iterator[bytes]:
        """All bytes of a tensor, in pieces of at most 8 MiB."""
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            yield self.read(entry, start, min(CHUNK_BYTES, entry.nbytes - start))

    def _cut(self, entry: TensorEntry) -> CutFile:
        return cut_tensor(entry.path, entry.name, entry.offset, entry.nbytes, stamp_of(entry.path).nbytes)


def converted(
    tensors: Iterable[PlannedTensor],
    files: SourceFiles,
    threads: int,
    importance: Mapping[str, FloatArray] | None = None,
) -> Generator[bytes, None, None]:
    """The bytes of all tensors in order, each converted to its planned type, in pieces that never span two tensors.

    importance: planned name -> (n_cols,), for the quantizer; tensors without one are quantized without.
    Works on a few pieces at a time in `threads` threads, so memory is bounded whatever the size of the tensors:
    about 30 MiB for each thread. Close the generator before `files`.
    Raises CutFile, MissingFile, BadFile for values a type cannot store.
    """
    from moe_edge.convert.quantize import prepare  # numpy: not for the runtime, which only copies

    tensors = tuple(tensors)
    weights = importance or {}
    prepare({each for tensor in tensors for each in (tensor.type, tensor.source.type) if tensor.is_converted})
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[bytes]] = deque()
        for tensor, start, nbytes in _row_ranges(tensors):
            files.open(tensor.source.path)
            task = pool.submit(_convert_rows, tensor, files, start, nbytes, weights.get(tensor.name))
            waiting.append(task)
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _row_ranges(tensors: Iterable[PlannedTensor]) -> Iterator[tuple[PlannedTensor, int, int]]:
    """(tensor, first byte, bytes) of pieces of whole rows, in the source's type."""
    for tensor in tensors:
        bytes_per_row = row_bytes(tensor.source.type, tensor.source.shape[0])
        step = max(1, CHUNK_ELEMENTS // tensor.source.shape[0]) * bytes_per_row
        for start in range(0, tensor.source.nbytes, step):
            yield tensor, start, min(step, tensor.source.nbytes - start)


def _convert_rows(
    tensor: PlannedTensor, files: SourceFiles, start: int, nbytes: int, importance: FloatArray | None
) -> bytes:
    from moe_edge.convert.quantize import requantize

    source = tensor.source
    data = files.read(source, start, nbytes)
    where = f"{source.path}: tensor '{source.name}'"
    return requantize(data, source.type, tensor.type, source.shape[0], where, importance)
