"""One file of the hub, range by range, so that whatever ends a download, the next one goes on from there.

What has come is in `BLOB.moe-edge.part`, and which ranges of it are whole in `BLOB.moe-edge.json` beside it. A range is
listed there only after its bytes were synced. At the end the SHA-256 decides, and the file gets its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BadChecksum, MissingFile, WorkError
from moe_edge.models.formats.write import check_space
from moe_edge.runner.hub.client import Expired, Hub, HubError, Repository
from moe_edge.runner.hub.names import RemoteFile

CHUNK_BYTES = 16 << 20
CONNECTIONS = 4
TRIES = 8  # of a chunk, in a row without a byte
Progress = Callable[[int], None]  # bytes that have just come


class Download:
    """A file on its way to `blob`. left_bytes: what is still to come."""

    def __init__(self, hub: Hub, repo: Repository, file: RemoteFile, blob: Path, chunk: int = CHUNK_BYTES) -> None:
        self._hub, self._repo, self._file = hub, repo, file
        self.blob = blob
        self.part = blob.with_name(blob.name + ".moe-edge.part")
        self.journal = blob.with_name(blob.name + ".moe-edge.json")
        self._chunk = chunk
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._url = ""
        self._fd = -1
        self._done = self._read_journal()

    @property
    def left_bytes(self) -> int:
        if self.blob.exists():
            return 0
        return self._file.size - sum(self._length(number) for number in self._done)

    def run(self, progress: Progress = lambda _: None, connections: int = CONNECTIONS) -> Path:
        """Fetch what is missing. Raises HubError, DiskFull, BadChecksum; KeyboardInterrupt leaves what has come."""
        self.blob.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.blob.with_name(self.blob.name + ".moe-edge.lock")):
            if self.blob.exists():  # another program brought it meanwhile
                return self.blob
            self._done = self._read_journal()
            check_space(self.blob.parent, self.left_bytes, str(self.blob))
            self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                os.ftruncate(self._fd, self._file.size)
                self._fetch_all(progress, connections)
                self._check()
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
            os.replace(self.part, self.blob)
            self.journal.unlink(missing_ok=True)
        return self.blob

    # ---- ranges

    def _length(self, number: int) -> int:
        return min(self._chunk, self._file.size - number * self._chunk)

    def _fetch_all(self, progress: Progress, connections: int) -> None:
        n_chunks = -(-self._file.size // self._chunk)
        missing = iter([number for number in range(n_chunks) if number not in self._done])
        with ThreadPoolExecutor(connections) as pool:
            running: set[Future[None]] = set()
            try:
                for number in missing:
                    running.add(pool.submit(self._fetch, number, progress))
                    if len(running) >= connections:
                        running = self._settle(running, FIRST_COMPLETED)
                self._settle(running, "ALL_COMPLETED")
            except BaseException:
                self._stop.set()  # the others end at their next piece
                raise

    @staticmethod
    def _settle(running: set[Future[None]], when: str) -> set[Future[None]]:
        while True:  # in short waits, so that Ctrl-C is heard
            done, left = wait(running, timeout=0.2, return_when=when)
            for each in done:
                each.result()
            if not left or (when == FIRST_COMPLETED and done):
                return left

    def _fetch(self, number: int, progress: Progress) -> None:
        """One chunk, over as many connections as it takes."""
        start = number * self._chunk
        end = start + self._length(number)
        at, failures = start, 0
        error: Exception | None = None
        while at < end and not self._stop.is_set():
            before = at
            try:
                for offset, data in self._hub.ranges(self._address(failures > 0), at, end, self._file.path):
                    if self._stop.is_set():
                        return
                    piece = data[max(0, at - offset) :]  # a server that ignores ranges sends what was skipped, too
                    if piece:
                        write_all(self._fd, piece, at, self.part)
                        progress(len(piece))
                        at += len(piece)
            except (Expired, HubError) as failed:
                error = failed
            if at == before:
                failures += 1
                if failures >= TRIES:
                    raise error or HubError(f"{self._file.path}: the connection broke {TRIES} times without a byte")
                self._stop.wait(min(4.0, 0.05 * 2**failures))
            elif at < end:
                failures = 0
        if at == end:
            self._finish(number, start, end)

    def _address(self, again: bool) -> str:
        with self._lock:
            if again or not self._url:
                self._url = self._hub.address(self._repo, self._file)
            return self._url

    def _finish(self, number: int, start: int, end: int) -> None:
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self._done.add(number)
            replace_text(self.journal, json.dumps({**self._identity(), "done": sorted(self._done)}))

    # ---- journal and check

    def _identity(self) -> dict[str, Any]:
        return {"version": 1, "blob": self._file.blob, "size": self._file.size, "chunk": self._chunk}

    def _read_journal(self) -> set[int]:
        """Chunks that are whole; none when the journal is of another file, or damaged."""
        try:
            found = json.loads(self.journal.read_text())
            done = {int(each) for each in found.pop("done")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()
        n_chunks = -(-self._file.size // self._chunk)
        good = found == self._identity() and self.part.exists() and all(0 <= each < n_chunks for each in done)
        return done if good and self.part.stat().st_size == self._file.size else set()

    def _check(self) -> None:
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {self._file.size}\0".encode(), usedforsecurity=False)
        at = 0
        while data := os.pread(self._fd, 8 << 20, at):
            (sha256 if self._file.sha256 else sha1).update(data)
            at += len(data)
        found = (sha256 if self._file.sha256 else sha1).hexdigest()
        needed = self._file.sha256 or self._file.blob
        if needed and found != needed:
            self.part.unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
            raise BadChecksum(
                f"{self._repo.repo}/{self._file.path}: what came has the checksum {found[:16]}..., the hub says "
                f"{needed[:16]}...; it was thrown away: pull again"
            )


def write_all(fd: int, data: bytes, offset: int, path: Path) -> None:
    """All of data at this offset. Raises MissingFile, naming `path`."""
    view = memoryview(data)
    while len(view):
        try:
            n = os.pwrite(fd, view, offset)
        except OSError as error:
            raise MissingFile(f"{path}: cannot be written: {error.strerror or error}") from error
        view, offset = view[n:], offset + n


def replace_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Only one process fetches a file; another waits until it is there."""
    try:
        import fcntl
    except ImportError:  # no such locks: the journal is read before and written after each chunk all the same
        yield
        return
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError as error:
                raise WorkError(f"{path}: cannot be locked: {error.strerror}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
