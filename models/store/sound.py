"""Whether a cached skeleton is still what was written: in milliseconds when nothing touched it, else byte by byte.

A marker beside it holds what the file system said of the skeleton when all its dense weights were last compared with
the source: any write since then changes that. What changes without a write, on a disk that fails, is found by the
samples (sample.py) of every use, and by comparing all again after a month.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from moe_edge.models.errors import MoeEdgeError
from moe_edge.models.formats.files import open_file, read_file, read_range
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.work import new_file
from moe_edge.models.formats.write import GGUFOutput, drop_cache
from moe_edge.models.store.sample import dense_digest

COMPARE_AGAIN_SECONDS = 30 * 24 * 3600.0
MARKER_BYTES = 200


def is_sound(path: Path, wanted: GGUFOutput, dense: Sequence[TensorEntry], digest: str, files: SourceFiles) -> bool:
    """Whether the file at `path` has the header of `wanted`, all its bytes, and the dense weights of the source.

    dense: the source's tensors, the first of `wanted`. digest: theirs, by dense_digest(). files: to read them.
    Raises what reading the source raises; a skeleton that cannot be read is not sound.
    """
    try:
        fd = open_file(path)
    except MoeEdgeError:
        return False
    try:
        if os.fstat(fd).st_size != wanted.total_bytes:
            return False
        if read_range(fd, len(wanted.header), 0) != wanted.header:
            return False
    except OSError:
        return False
    finally:
        os.close(fd)
    mine = written_entries(wanted, len(dense), path)
    try:
        with SourceFiles() as skeleton:
            if dense_digest(mine, skeleton) != digest:
                return False
    except MoeEdgeError:
        return False
    if _is_marked(path):
        return True
    if not _is_equal(mine, dense, files):
        return False
    mark_sound(path)
    return True


def written_entries(output: GGUFOutput, count: int, path: Path) -> list[TensorEntry]:
    """The first `count` tensors of an output, as they are in the file at `path`."""
    start = len(output.header)
    return [
        TensorEntry(spec.name, spec.shape, spec.type, path, start + offset, spec.nbytes)
        for spec, offset in zip(output.tensors[:count], output.offsets, strict=False)
    ]


def mark_sound(path: Path) -> None:
    """Note that the dense weights of `path` are the source's; a cache that cannot be written costs comparing again."""
    with contextlib.suppress(OSError), new_file(_marker(path)) as file:
        file.write(_state(path))


def forget(path: Path) -> None:
    """Remove a skeleton that turned out to be bad, and what was noted of it."""
    for each in (path, _marker(path)):
        with contextlib.suppress(OSError):
            each.unlink()


def _is_marked(path: Path) -> bool:
    marker = _marker(path)
    try:
        age = time.time() - os.stat(marker).st_mtime
        return abs(age) < COMPARE_AGAIN_SECONDS and read_file(marker, MARKER_BYTES) == _state(path)
    except (OSError, MoeEdgeError):
        return False


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".checked")


def _state(path: Path) -> bytes:
    """What changes whenever a file is written to, and cannot be set back (ctime)."""
    found = os.stat(path)
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode()


def _is_equal(mine: Sequence[TensorEntry], source: Sequence[TensorEntry], files: SourceFiles) -> bool:
    try:
        with SourceFiles() as skeleton:
            for a, b in zip(mine, source, strict=True):
                if any(x != y for x, y in zip(skeleton.chunks(a), files.chunks(b), strict=True)):
                    return False
            for path in {entry.path for entry in mine}:
                drop_cache(skeleton.open(path))
    except MoeEdgeError:
        return False
    return True
