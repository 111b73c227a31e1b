"""Files that are read: opened only when they are plain files, and told apart from others of the same name.

Every failure of the file system becomes MissingFile with the path and the reason; a pipe, a device or a folder is
refused before anything is read from it, since reading one may never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from moe_edge.models.errors import BadFile, MissingFile

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class FileStamp(NamedTuple):
    """What tells a file from another one of the same name, and from itself before it was written to."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @staticmethod
    def of(found: os.stat_result) -> FileStamp:
        return FileStamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def unreadable(path: str | os.PathLike[str], error: OSError | ValueError) -> MissingFile:
    """The error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return MissingFile(f"{path}: no such file")
    if isinstance(error, OSError):
        return MissingFile(f"{path}: cannot be read: {error.strerror or error}")
    return MissingFile(f"{shown(str(path), 200)}: cannot be the name of a file")  # a zero byte, a lone surrogate


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a plain file from; the caller closes it. Raises MissingFile."""
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for is_kind, name in KINDS if is_kind(mode)), "not a plain file")
            raise MissingFile(f"{path}: cannot be read: it is {kind}, a plain file is needed")
    except OSError as error:
        os.close(fd)
        raise unreadable(path, error) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_range(fd: int, nbytes: int, offset: int) -> bytes:
    """`nbytes` from `offset`, fewer only where the file ends; a read that gives less is taken up again."""
    data = os.pread(fd, nbytes, offset)
    if len(data) in (0, nbytes):
        return data
    pieces = [data]
    at = offset + len(data)
    while at < offset + nbytes:
        data = os.pread(fd, offset + nbytes - at, at)
        if not data:
            break
        pieces.append(data)
        at += len(data)
    return b"".join(pieces)


def read_file(path: str | os.PathLike[str], limit_bytes: int) -> bytes:
    """All bytes of a plain file. Raises MissingFile, and BadFile when it has more than `limit_bytes`."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > limit_bytes:
                raise BadFile(f"{path}: has {nbytes} bytes; a file of this name has at most {limit_bytes}")
            return file.read(limit_bytes)
    except OSError as error:
        raise unreadable(path, error) from error


def is_present(path: Path) -> bool:
    """Whether there is something of this name. Raises MissingFile when the file system does not say."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return True


def stamp_of(path: str | os.PathLike[str]) -> FileStamp:
    """The stamp of the file that has this name now. Raises MissingFile."""
    try:
        return FileStamp.of(os.stat(path))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def shown(value: object, limit: int = 80) -> str:
    """`repr` of a value out of a file, for messages, cut to about `limit` characters: a file may hold anything."""
    if isinstance(value, (list, tuple)) and len(value) > 8:
        inner = ", ".join(shown(each, 20) for each in value[:4])
        return f"[{inner}, ... {len(value)} in all]"
    if isinstance(value, str) and len(value) > limit:
        return f"{value[: limit // 2]!r}... of {len(value)} characters"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)) and value:
        return "[" + ", ".join(shown(each, limit) for each in value) + "]"
    if isinstance(value, dict) and len(value) > 8:
        return f"an object of {len(value)} names"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
