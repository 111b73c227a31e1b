"""The bytes of a model as they are read, a layer at a time: fetched by ranges, kept on disk while needed, then deleted.

Layers are groups of tensors that follow one another. While one is read the next is fetched; what has been written out
is deleted. A read that lies further ahead, as happens with tiny layers, is not kept waiting for that.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from moe_edge.models.errors import MissingFile, MoeEdgeError, WorkError
from moe_edge.models.formats.derived import DerivedEntry
from moe_edge.models.formats.files import FileStamp
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.runner.hub.client import Expired, Hub, HubError, Repository
from moe_edge.runner.hub.download import write_all
from moe_edge.runner.hub.names import RemoteFile

AT_ONCE = 2  # layers on disk
CONNECTIONS = 4
CHUNK_BYTES = 16 << 20
GAP_BYTES = 1 << 20  # between two ranges that are fetched as one: less than a request costs
TRIES = 8  # of a range, in a row without a byte


@dataclass(frozen=True)
class Range:
    """Bytes of a file, and where they are in the scratch."""

    path: Path
    start: int
    end: int
    at: int


def ranges_of(entries: Sequence[TensorEntry]) -> tuple[Range, ...]:
    """What has to be fetched for these tensors, in order of file and place, near ones together."""
    wanted = sorted((leaf.path, leaf.offset, leaf.offset + leaf.nbytes) for each in entries for leaf in _leaves(each))
    found: list[Range] = []
    for path, start, end in wanted:
        last = found[-1] if found else None
        if last is not None and last.path == path and start <= last.end + GAP_BYTES:
            found[-1] = Range(path, last.start, max(end, last.end), last.at)
        else:
            found.append(Range(path, start, end, 0 if last is None else last.at + last.end - last.start))
    return tuple(found)


def _leaves(entry: TensorEntry) -> list[TensorEntry]:
    """The tensors of files that one is made of."""
    if isinstance(entry, DerivedEntry):
        return [leaf for part in entry.parts for leaf in _leaves(part)]
    return [entry]


@dataclass
class Layer:
    """n_tensors: how many were written, of all, when this one is not needed any more."""

    number: int
    n_tensors: int
    ranges: tuple[Range, ...]
    fd: int = -1
    is_there: bool = False
    is_dropped: bool = False
    starts: list[tuple[Path, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(each.end - each.start for each in self.ranges)

    def find(self, path: Path, start: int, end: int) -> int | None:
        """Where these bytes are in the scratch; None when they are not of this layer."""
        if not self.starts:
            self.starts = [(each.path, each.start) for each in self.ranges]
        i = bisect.bisect_right(self.starts, (path, start)) - 1
        if i < 0 or self.ranges[i].path != path or self.ranges[i].end < end:
            return None
        return self.ranges[i].at + start - self.ranges[i].start


def layers_of(tensors: Sequence[tuple[str, TensorEntry]], n_before: int) -> list[Layer]:
    """Tensors in the order they are read, in groups: those of one block that follow one another, or a single one.

    n_before: how many tensors were written before these.
    """
    groups: list[tuple[str, list[TensorEntry]]] = []
    for name, entry in tensors:
        words = name.split(".")
        label = words[1] if words[0] == "blk" and len(words) > 1 else name
        if not groups or groups[-1][0] != label:
            groups.append((label, []))
        groups[-1][1].append(entry)
    layers, n = [], n_before
    for number, (_, entries) in enumerate(groups):
        n += len(entries)
        layers.append(Layer(number, n, ranges_of(entries)))
    return layers


class Fetcher:
    """Brings ranges of files of one repository. address: of a file, asked for again when it has expired."""

    def __init__(self, hub: Hub, repo: Repository, remote: Mapping[Path, RemoteFile], told: Callable[[int], None]):
        self._hub, self._repo, self._remote, self._told = hub, repo, remote, told
        self._urls: dict[Path, str] = {}
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def fetch(self, path: Path, start: int, end: int, write: Callable[[bytes, int], None]) -> None:
        """write: called with bytes and how far from `start` they are. Raises HubError and what `write` raises."""
        file, at, failures = self._remote[path], start, 0
        error: MoeEdgeError | None = None
        while at < end and not self.stop.is_set():
            before = at
            try:
                for offset, data in self._hub.ranges(self._url(path, failures > 0), at, end, file.path):
                    piece = data[max(0, at - offset) :]
                    if piece:
                        write(piece, at - start)
                        self._told(len(piece))
                        at += len(piece)
                    if self.stop.is_set():
                        return
            except (Expired, HubError) as failed:
                error = failed
            failures = failures + 1 if at == before else 0
            if failures >= TRIES:
                raise error or HubError(f"{file.path}: the connection broke {TRIES} times without a byte")
            if failures:
                self.stop.wait(min(4.0, 0.05 * 2**failures))

    def _url(self, path: Path, again: bool) -> str:
        with self._lock:
            if again or path not in self._urls:
                self._urls[path] = self._hub.address(self._repo, self._remote[path])
            return self._urls[path]


class ArrivingFiles(SourceFiles):
    """Reads from layers that a thread fetches ahead into `folder`; a context manager, as SourceFiles is."""

    def __init__(
        self, stamps: Mapping[Path, FileStamp], layers: Sequence[Layer], fetcher: Fetcher, folder: Path
    ) -> None:
        super().__init__(stamps)
        self._layers, self._fetcher, self._folder = list(layers), fetcher, folder
        self._changed = threading.Condition()
        self._asked = 0  # the furthest layer that somebody waits for
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="moe-edge-layers", daemon=True)
        self.most_bytes = 0  # in the scratch at a time

    def __enter__(self) -> ArrivingFiles:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._fetcher.stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        for layer in self._layers:
            self._drop(layer)
        super().__exit__(None, None, None)

    def read(self, entry: TensorEntry, start: int, nbytes: int) -> bytes:
        """As SourceFiles.read; waits for the layer. Raises what fetching it raised."""
        if isinstance(entry, DerivedEntry):
            return super().read(entry, start, nbytes)
        first = entry.offset + start
        with self._changed:
            for layer in self._layers:
                at = None if layer.is_dropped else layer.find(entry.path, first, first + nbytes)
                if at is None:
                    continue
                while not layer.is_there and self._failed is None:
                    self._asked = max(self._asked, layer.number)
                    self._changed.notify_all()
                    self._changed.wait(1.0)
                if self._failed is not None:
                    raise self._failed
                fd = os.dup(layer.fd)  # the layer may be dropped meanwhile: another one can have the same bytes
                break
            else:
                raise AssertionError(f"{entry.path}: bytes {first}-{first + nbytes} are of no layer: {entry.name}")
        try:
            return _pread(fd, nbytes, at, self._folder)
        finally:
            os.close(fd)

    def written(self, n_tensors: int) -> bool:
        """So many tensors are written: layers that were for them go. True when one did."""
        with self._changed:
            over = [each for each in self._layers if not each.is_dropped and each.n_tensors <= n_tensors]
            for layer in over:
                self._drop(layer)
            self._changed.notify_all()
        return bool(over)

    # ---- the thread that fetches

    def _run(self) -> None:
        try:
            for layer in self._layers:
                with self._changed:
                    while not self._may_begin(layer) and not self._fetcher.stop.is_set():
                        self._changed.wait(1.0)
                if self._fetcher.stop.is_set():
                    return
                self._fetch(layer)
                if self._fetcher.stop.is_set():
                    return
                with self._changed:
                    layer.is_there = True
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _may_begin(self, layer: Layer) -> bool:
        on_disk = sum(1 for each in self._layers[: layer.number] if not each.is_dropped)
        return on_disk < AT_ONCE or self._asked >= layer.number

    def _fetch(self, layer: Layer) -> None:
        path = self._folder / f"layer-{layer.number}"
        try:
            layer.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)
            path.unlink()  # gone with this process, whatever ends it
        except OSError as error:
            raise MissingFile(f"{path}: cannot be written: {error.strerror or error}") from error
        on_disk = sum(each.nbytes for each in self._layers[: layer.number] if not each.is_dropped)
        self.most_bytes = max(self.most_bytes, on_disk + layer.nbytes)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            running = [
                pool.submit(self._fetch_chunk, layer, each, start, min(start + CHUNK_BYTES, each.end))
                for each in layer.ranges for start in range(each.start, each.end, CHUNK_BYTES)
            ]  # fmt: skip
            done, left = wait(running, return_when=FIRST_EXCEPTION)
            if left:
                self._fetcher.stop.set()
            for each in done:
                each.result()

    def _fetch_chunk(self, layer: Layer, whole: Range, start: int, end: int) -> None:
        at = whole.at + start - whole.start
        self._fetcher.fetch(whole.path, start, end, lambda data, n: write_all(layer.fd, data, at + n, self._folder))

    def _drop(self, layer: Layer) -> None:
        if layer.fd >= 0:
            os.close(layer.fd)
            layer.fd = -1
        layer.is_dropped = True


def _pread(fd: int, nbytes: int, at: int, folder: Path) -> bytes:
    pieces = []
    while nbytes:
        try:
            data = os.pread(fd, nbytes, at)
        except OSError as error:
            raise MissingFile(f"{folder}: cannot be read: {error.strerror or error}") from error
        if not data:
            raise WorkError(f"{folder}: a layer is shorter than it was written; is something else writing there?")
        pieces.append(data)
        at, nbytes = at + len(data), nbytes - len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
