"""The cache on disk that huggingface_hub, llama.cpp and moe-edge share, so that nothing is stored twice.

    models--user--repo/blobs/BLOB                     the bytes
    models--user--repo/snapshots/COMMIT/path/in/repo  a link to them
    models--user--repo/refs/main                      the commit that `main` was
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_edge.models.errors import MissingFile, MoeEdgeError
from moe_edge.runner.hub.names import HubName, RemoteFile, choose, model_files, parts_of

_PREFIX = "models--"


def cache_folder() -> Path:
    """Where models are kept, in llama.cpp's and huggingface_hub's order of environment variables."""
    for name, below in (
        ("LLAMA_CACHE", ""), ("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):  # fmt: skip
        if value := os.environ.get(name):
            return Path(value).expanduser() / below
    return Path("~/.cache/huggingface/hub").expanduser()


def repo_folder(repo: str) -> Path:
    return cache_folder() / (_PREFIX + repo.replace("/", "--"))


@dataclass(frozen=True)
class Stored:
    """A model that is whole in the cache. files: its parts, as links in a snapshot. used: seconds since the epoch."""

    repo: str
    commit: str
    files: tuple[Path, ...]
    nbytes: int
    used: float


def link_blob(blob: Path, link: Path) -> None:
    """Make `link` a name of `blob`; where links are not possible the blob itself moves there."""
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except (OSError, NotImplementedError):
        shutil.move(blob, link)


def write_ref(repo: str, commit: str, revision: str = "main") -> None:
    ref = repo_folder(repo) / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)


def find_stored(name: HubName) -> Path | None:
    """The first file of a model that is whole in the cache, of the newest snapshot; None when there is none."""
    folder = repo_folder(name.repo)
    ref = folder / "refs" / "main"
    newest = ref.read_text().strip() if ref.is_file() else ""
    snapshots = sorted(
        (each for each in (folder / "snapshots").glob("*") if each.is_dir()),
        key=lambda each: (each.name == newest, each.stat().st_mtime), reverse=True,
    )  # fmt: skip
    for snapshot in snapshots:
        there = _files_of(snapshot)
        with contextlib.suppress(MoeEdgeError):
            first = choose(there, name)
            parts_of(first, there)
            return snapshot / first.path
    return None


def _files_of(snapshot: Path) -> list[RemoteFile]:
    """What of a snapshot is there; a link to nothing is not."""
    return [
        RemoteFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, path.resolve().name)
        for path in sorted(snapshot.rglob("*")) if path.is_file()
    ]  # fmt: skip


def stored_models() -> Iterator[Stored]:
    """Every whole model in the cache, the one used last first."""
    found = []
    for folder in cache_folder().glob(_PREFIX + "*"):
        repo = folder.name[len(_PREFIX) :].replace("--", "/", 1)
        for snapshot in (folder / "snapshots").glob("*"):
            there = _files_of(snapshot)
            for first in model_files(there):
                with contextlib.suppress(MoeEdgeError):
                    parts = parts_of(first, there)
                    paths = tuple(snapshot / each.path for each in parts)
                    used = max(path.stat().st_atime for path in paths)
                    found.append(Stored(repo, snapshot.name, paths, sum(each.size for each in parts), used))
    yield from sorted(found, key=lambda each: -each.used)


def remove(model: Stored) -> int:
    """Remove a model's links, and the blobs that nothing else in the repository needs. Returns the bytes freed."""
    folder = repo_folder(model.repo)
    blobs = {path.resolve() for path in model.files}
    freed = 0
    for path in model.files:
        if not path.is_symlink():
            freed += path.stat().st_size
        path.unlink()
    needed = {path.resolve() for path in (folder / "snapshots").rglob("*") if path.is_symlink()}
    for blob in blobs - needed:
        if blob.is_file() and blob.parent == (folder / "blobs").resolve():
            freed += blob.stat().st_size
            blob.unlink()
    for snapshot in list((folder / "snapshots").glob("*")):
        _remove_empty(snapshot)
    if not any((folder / "snapshots").glob("*")) and not any((folder / "blobs").glob("*")):
        shutil.rmtree(folder)
    return freed


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def find_removable(name: HubName) -> list[Stored]:
    """The models in the cache that a name means; all of the repository without a tag. Raises MissingFile for none."""
    mine = [each for each in stored_models() if each.repo == name.repo]
    if name.tag:
        from moe_edge.runner.hub.names import matches

        mine = [each for each in mine if matches(each.files[0].name, name.tag)]
    if not mine:
        raise MissingFile(f"{name}: is not in {cache_folder()}; `moe-edge ls` lists what is there")
    return mine
