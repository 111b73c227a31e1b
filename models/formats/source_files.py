"""Ranges of bytes of tensors from their files, which are the files that were opened, or an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from moe_edge.models.errors import BadFile, CutFile
from moe_edge.models.formats.derived import DerivedEntry
from moe_edge.models.formats.files import FileStamp, open_file, stamp_of, unreadable
from moe_edge.models.formats.gguf import TensorEntry, cut_tensor

CHUNK_BYTES = 8 << 20


class SourceFiles:
    """Open files to read ranges from; use as a context manager. Reads may come from several threads.

    stamps: of files whose headers were read before; others are taken as they are when they are opened.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp] | None = None) -> None:
        self._fds: dict[Path, int] = {}
        self._stamps: dict[Path, FileStamp] = dict(stamps or {})
        self._made: tuple[DerivedEntry, bytes] | None = None  # the tensor that was made last, read piece by piece
        self._making = threading.RLock()  # again by the same thread: a tensor may be made of one that is made

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
        if isinstance(entry, DerivedEntry):
            return self._derived(entry)[start : start + nbytes]
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

    def _derived(self, entry: DerivedEntry) -> bytes:
        with self._making:
            if self._made is None or self._made[0] != entry:
                self._made = None
                self._made = entry, entry.build([self.read(part, 0, part.nbytes) for part in entry.parts])
            return self._made[1]

    def chunks(self, entry: TensorEntry) -> Iterator[bytes]:
        """All bytes of a tensor, in pieces of at most 8 MiB."""
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            yield self.read(entry, start, min(CHUNK_BYTES, entry.nbytes - start))

    def _cut(self, entry: TensorEntry) -> CutFile:
        return cut_tensor(entry.path, entry.name, entry.offset, entry.nbytes, stamp_of(entry.path).nbytes)
