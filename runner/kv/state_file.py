"""A conversation's state in a file: llama.cpp's own bytes first, as it streams them, then what they are and checksums.

    llama.cpp's sequence file   its magic, its version, the number of tokens, the tokens, the cells
    checkpoints                 the bytes of each, see runner/kv/rollback.py
    header                      JSON: who made it, of what, where the checkpoints lie
    footer, 40 bytes            MAGIC, version, bytes of the header, bytes before it, and two CRC-32

The footer stands at the end because llama.cpp must begin at byte 0 and streams; so one file holds everything, and one
rename makes it appear. Whoever is killed before that leaves a part file without the name, which the next writer
removes.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from moe_edge.models.errors import BadChecksum, BadFile, BadMagic, CannotWrite, CutFile
from moe_edge.models.formats.work import create, part_path, remember, remove
from moe_edge.runner.kv.rollback import Checkpoint, Checkpoints
from moe_edge.runner.llama import (
    COPY_FRONT,
    clear_memory,
    first_position,
    load_sequence,
    partial_bytes,
    save_sequence,
    sequence_head,
    sliding_window,
    state_from_bytes,
    window_is_kept,
)

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

MAGIC, VERSION = b"MoEeDgKv", 1
FOOTER = struct.Struct("<8sIIQQII")
BEFORE_TOKENS = 12  # bytes of llama.cpp's file: magic, version, number of tokens
CELL_BYTES = 32  # of a cell in a list, at the most: its position, its sequences, positions of pictures
BEFORE_CELLS = 4096  # more than stands before a list
BLOCK = 4 << 20
MOST_HEADER = 64 << 20  # bytes; it holds a session's messages
LABEL = "state"


@dataclass(frozen=True)
class StateFile:
    """What a state file says of itself. tokens: int32, in order. first: the first position whose cells it has.

    identity: see identity_of(). checkpoints: (n_tokens, offset, bytes) of each. extra: the writer's own, such as the
    messages of a session. payload_bytes: of everything that payload_crc is the checksum of. lists: (offset, bytes,
    CRC-32) of the places with lists of cells, damage in which ends the process; None where they are not known.
    """

    path: Path
    identity: Mapping[str, Any]
    tokens: np.ndarray[Any, np.dtype[np.int32]]
    first: int
    checkpoints: tuple[tuple[int, int, int], ...]
    extra: Mapping[str, Any]
    payload_bytes: int
    payload_crc: int
    lists: tuple[tuple[int, int, int], ...] | None = None


def write_state(
    path: Path, llama: Any, checkpoints: Checkpoints, identity: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> int:  # fmt: skip
    """Write the conversation in `llama` to `path`, in place of what is there; returns its bytes.

    The name appears when everything is on the disk, and the bytes leave the page cache. Of a conversation that is not
    whole there is only `extra`. Raises CannotWrite.
    """
    n = llama.n_tokens if is_whole(llama) else 0

    def payload(file: IO[bytes], part: Path) -> None:
        if n and not save_sequence(llama, part):
            raise CannotWrite(f"{path}: llama.cpp could not write the conversation; is there room on the disk?")
        if n and not is_whole(llama):
            raise CannotWrite(f"{path}: a board was lost while the conversation was read from it, so it is not kept")

    kept = [] if n == 0 else checkpoints.kept
    partial = partial_bytes(llama) if n else None
    return _write(path, payload, kept, identity, extra, n_tokens=n, first=_first_in_file(llama) if n else 0,
                  partial=partial)  # fmt: skip


def is_whole(llama: Any) -> bool:
    """Whether llama.cpp has the conversation: a board that was lost took the cells of its layers with it."""
    engine = getattr(llama, "_moe_edge", None)
    return engine is None or bool(engine.is_whole)


def write_copy(
    path: Path, tokens: np.ndarray[Any, np.dtype[np.int32]], copy: memoryview, kept: Sequence[Checkpoint],
    identity: Mapping[str, Any], extra: Mapping[str, Any], first: int, partial: int | None,
) -> int:  # fmt: skip
    """As write_state(), of a conversation that was copied; the file is the one that it would have been then."""

    def payload(file: IO[bytes], part: Path) -> None:
        file.write(sequence_head(tokens))
        file.write(copy[COPY_FRONT:])

    return _write(path, payload, kept, identity, extra, n_tokens=len(tokens), first=first, partial=partial)


def _write(
    path: Path, payload: Callable[[IO[bytes], Path], None], kept: Sequence[Checkpoint], identity: Mapping[str, Any],
    extra: Mapping[str, Any] | None, *, n_tokens: int, first: int, partial: int | None,
) -> int:  # fmt: skip
    """payload: writes llama.cpp's part. partial: see partial_bytes()."""
    part = part_path(path.parent, LABEL)
    remember(part)
    try:
        with open(create(part), "r+b") as file:
            hold(file)  # a part file that nobody holds was left behind
            payload(file, part)
            at = file.seek(0, os.SEEK_END)
            end, places = at, []
            for each in kept:
                places.append((each.n_tokens, at, len(each.copy)))
                at += file.write(memoryview(each.copy))
            file.flush()
            os.fsync(file.fileno())
            crc = _checksum(file, at)
            lists = _lists(file, n_tokens, end, partial)
            told = {
                "identity": dict(identity), "n_tokens": n_tokens, "checkpoints": places,
                "extra": dict(extra or {}), "first": first, "lists": lists,
            }  # fmt: skip
            header = json.dumps(told).encode()
            file.seek(at)
            file.write(header)
            front = FOOTER.pack(MAGIC, VERSION, len(header), at, 0, crc, 0)
            file.write(FOOTER.pack(MAGIC, VERSION, len(header), at, 0, crc, zlib.crc32(front, zlib.crc32(header))))
            file.flush()
            os.fsync(file.fileno())
            _drop_pages(file)
            size = file.tell()
        os.replace(part, path)
    except OSError as e:
        raise CannotWrite(f"{path}: the conversation cannot be kept: {e.strerror or e}") from e
    finally:
        remove(part)
    return size


def _lists(file: IO[bytes], n_tokens: int, end: int, partial: int | None) -> list[tuple[int, int, int]] | None:
    """Where llama.cpp's lists of cells can be: at the beginning, and in all that is not of the whole attention."""
    if partial is None or n_tokens == 0:
        return None
    head = min(end, BEFORE_TOKENS + 4 * n_tokens + CELL_BYTES * n_tokens + BEFORE_CELLS)
    tail = max(head, end - partial)
    spans = ((0, head), (tail, min(end - tail, BEFORE_CELLS + CELL_BYTES * n_tokens)))
    return [(at, n, _checksum(file, n, at)) for at, n in spans]


def _first_in_file(llama: Any) -> int:
    """The first position of which the file has the cells of every layer: of some models not those that a sliding window
    has left, though memory has them still."""
    if llama.n_tokens == 0:
        return 0
    window = 0 if window_is_kept(llama) else sliding_window(llama)
    return max(first_position(llama), llama.n_tokens - window if window else 0)


def read_header(path: Path) -> StateFile:
    """What the file says of itself, its header checked, its payload not. Raises BadFile, and OSError."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < FOOTER.size:
            raise CutFile(f"{path}: has {size} bytes, too few for a conversation of moe-edge; it is cut short")
        file.seek(size - FOOTER.size)
        magic, version, n_header, payload, spare, crc, header_crc = FOOTER.unpack(file.read(FOOTER.size))
        if magic != MAGIC:
            raise BadMagic(f"{path}: is no conversation of moe-edge, or it was cut short")
        if version != VERSION:
            raise BadFile(f"{path}: is of version {version} of the format, and this moe-edge reads version {VERSION}")
        if n_header > MOST_HEADER or payload + n_header + FOOTER.size != size:
            raise CutFile(f"{path}: has {size} bytes but says {payload + n_header + FOOTER.size}; it is cut or damaged")
        file.seek(payload)
        header = file.read(n_header)
        front = FOOTER.pack(magic, version, n_header, payload, spare, crc, 0)
        if zlib.crc32(front, zlib.crc32(header)) != header_crc:
            raise BadChecksum(f"{path}: its header is damaged")
        try:
            told = json.loads(header)
            n_tokens = int(told["n_tokens"])
            places = tuple((int(n), int(at), int(nbytes)) for n, at, nbytes in told["checkpoints"])
            file.seek(BEFORE_TOKENS)
            tokens = np.frombuffer(file.read(4 * n_tokens), np.int32)
            identity, extra, first = dict(told["identity"]), dict(told["extra"]), int(told["first"])
            lists = told.get("lists")
            spans = None if lists is None else tuple((int(at), int(n), int(crc)) for at, n, crc in lists)
        except (ValueError, KeyError, TypeError) as e:
            raise BadFile(f"{path}: its header is not one of this format") from e
    if len(tokens) != n_tokens or any(at + nbytes > payload for _, at, nbytes in places):
        raise BadFile(f"{path}: its header names more bytes than it has")
    return StateFile(path, identity, tokens, first, places, extra, payload, crc, spans)


def load_state(state: StateFile, llama: Any, checkpoints: Checkpoints) -> None:
    """Take the file's conversation in place of the present one. The caller has compared the identity.

    The disk is read once: the checksum is taken of the pages that llama.cpp reads, while it reads them. The lists of
    cells are checked first, since llama.cpp ends the process on some damage in them; where they are not known, all is.
    Raises BadFile, with an empty KV cache; OSError when the file went away.
    """
    checkpoints.clear()
    with open(state.path, "rb") as file, open(state.path, "rb") as beside:
        first = [(0, state.payload_bytes, state.payload_crc)] if state.lists is None else state.lists
        if any(_checksum(file, n, at) != crc for at, n, crc in first):
            clear_memory(llama)
            raise _damaged(state)
        with ThreadPoolExecutor(1) as aside:
            checked = aside.submit(_checksum, beside, state.payload_bytes if state.lists is not None else 0)
            took = load_sequence(llama, state.path)
            whole = state.lists is None or checked.result() == state.payload_crc
        if not (took and whole):
            clear_memory(llama)
            if not whole:
                raise _damaged(state)
            raise BadFile(f"{state.path}: llama.cpp does not take this conversation")
        for n_tokens, at, nbytes in state.checkpoints:
            file.seek(at)
            checkpoints.kept.append(Checkpoint(n_tokens, state_from_bytes(file.read(nbytes))))
        _drop_pages(file)


def _damaged(state: StateFile) -> BadChecksum:
    return BadChecksum(f"{state.path}: is damaged: its checksum does not fit its bytes")


def hold(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; False when another process has it. Without locks: True."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _checksum(file: IO[bytes], nbytes: int, at: int = 0) -> int:
    """CRC-32 of nbytes from an offset on, a block at a time."""
    file.seek(at)
    block, crc, left = bytearray(BLOCK), 0, nbytes
    while left > 0:
        n = file.readinto(memoryview(block)[: min(BLOCK, left)])  # type: ignore[attr-defined]
        if not n:
            break
        crc, left = zlib.crc32(memoryview(block)[:n], crc), left - n
    return crc


def _drop_pages(file: IO[bytes]) -> None:
    """The file's bytes leave the page cache, which experts have a better use for. Not on macOS, which has no call."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
