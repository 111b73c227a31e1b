"""What a calibration has found so far, on disk, so that one that was killed goes on where it was.

A folder of arrays, each file whole or not there: written beside, synced, renamed. It belongs to one identity (model,
text, options); another's is thrown away. The files that a conversion writes stay there too until they are whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import DiskFull, MissingFile
from moe_edge.models.formats.files import FileStamp
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.work import new_file, sync_folder
from moe_edge.models.formats.write import GGUFOutput, free_bytes
from moe_edge.models.store.source import Source

SUFFIX = ".moe-edge-calibrate"
IDENTITY, WRITTEN, WRITING = "identity", "written.json", "writing"
VERSION = 1  # of what is kept; another version's is thrown away
Arrays = Mapping[str, npt.NDArray[Any]]


def journal_folder(output: Path) -> Path:
    """Where the journal of a calibrated conversion to `output` lies."""
    return output.with_name(output.name + SUFFIX)


def identity_of_run(source: Source, text: bytes, asked: str, imatrix: Path | None) -> str:
    """Of a calibration: the model's files, the text, and all that was asked for and changes what comes out."""
    found = hashlib.sha256(f"{VERSION}\0{source.header_sha256}\0{asked}\0".encode())
    for path in source.files:
        status = path.stat()
        found.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    found.update(hashlib.sha256(text).digest())
    if imatrix is not None:
        found.update(hashlib.sha256(imatrix.read_bytes()).digest())
    return found.hexdigest()


class Journal:
    """A folder of what was found. identity: see identity_of_run; None for one that nobody goes on from.

    Raises MissingFile when the folder cannot be made or written, DiskFull.
    """

    def __init__(self, folder: Path, identity: str | None = None) -> None:
        self.folder = folder
        try:
            if identity is not None and self._identity() != identity:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._failed(error) from error
        if identity is not None and self._identity() != identity:
            self.write_text(IDENTITY, identity)

    def _identity(self) -> str | None:
        return self.read_text(IDENTITY)

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep arrays by a name; whoever sees the name sees all of them."""
        self._write(f"{name}.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def load(self, name: str) -> dict[str, npt.NDArray[Any]] | None:
        """What was kept by a name; None when nothing was, or it cannot be read."""
        try:
            data = io.BytesIO((self.folder / f"{name}.npz").read_bytes())  # np.load leaves a torn file open
            with np.load(data, allow_pickle=False) as found:
                return {key: found[key] for key in found.files}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def found(self, name: str, find: Callable[[], Arrays]) -> Arrays:
        """What was kept by a name, or what `find` returns, which is kept then."""
        known: Arrays | None = self.load(name)
        if known is None:
            known = find()
            self.save(name, known)
        return known

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.npz").is_file()

    def remove_empty(self) -> None:
        """Remove it when nothing was found yet that took any time."""
        if not self.has("chunk-00000"):
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_text(self, name: str, text: str) -> None:
        """Keep a small text."""
        self._write(name, lambda file: file.write(text.encode()))

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Raises MissingFile, DiskFull."""
        try:
            with new_file(self.folder / name) as file:
                write(file)
            sync_folder(self.folder)
        except OSError as error:
            raise self._failed(error) from error

    def read_text(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text()
        except (OSError, ValueError):
            return None

    def _failed(self, error: OSError) -> Exception:
        free = free_bytes(self.folder.parent)
        if free is not None and free < 1 << 20:
            return DiskFull(f"{self.folder}: no room left for what the calibration found; {free} bytes are free")
        return MissingFile(f"{self.folder}: cannot be written: {error.strerror or error}")


class WrittenLayers:
    """The two files of a conversion on their way (convert/arriving.py): whole layers stay when it is killed."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.folder = journal.folder / WRITING
        self._identity = ""
        self._ends: frozenset[int] = frozenset()  # numbers of tensors written, at which a layer is whole
        self._saved = self.n_before = 0  # tensors on disk; of an earlier run

    def resume(self, identity: str) -> tuple[Sequence[int], Sequence[int]]:
        self._identity = identity
        self.folder.mkdir(exist_ok=True)
        store, skeleton = self._read()
        self._saved = self.n_before = len(store) + len(skeleton)
        return store, skeleton

    def _read(self) -> tuple[list[int], list[int]]:
        try:
            found = json.loads(self._journal.read_text(WRITTEN) or "")
            lists = [int(each) for each in found["store"]], [int(each) for each in found["skeleton"]]
            there = all((self.folder / str(n)).stat().st_size >= int(size) for n, size in found["parts"].items())
            return lists if found["identity"] == self._identity and there else ([], [])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [], []

    def begin(self, tensors: Sequence[tuple[str, TensorEntry]]) -> int:
        layers = [name.split(".")[1] if name.startswith("blk.") else "" for name, _ in tensors]
        changes = [i + 1 for i, (a, b) in enumerate(zip(layers, [*layers[1:], None], strict=False)) if a != b]
        self._ends = frozenset(self._saved + each for each in changes)
        return 0

    def files(self, stamps: Mapping[Path, FileStamp]) -> SourceFiles:
        return SourceFiles(stamps)

    def written(self, store: GGUFOutput, skeleton: GGUFOutput) -> None:
        n = len(store.checksums) + len(skeleton.checksums)
        if n == self._saved or n not in self._ends:
            return
        self._saved = n
        store.sync()
        skeleton.sync()
        state = {
            "identity": self._identity, "store": store.checksums, "skeleton": skeleton.checksums,
            "parts": {each.part.name: each.part.stat().st_size for each in (store, skeleton)},
        }  # fmt: skip
        self._journal.write_text(WRITTEN, json.dumps(state))

    def check(self) -> None:
        """Nothing to compare with: the source was at hand."""

    def finished(self) -> None:
        """The journal goes as a whole, when its owner says so."""
