"""The files of a model as they will be, without their weights: what a conversion is planned from.

Small files come whole. Of a GGUF or safetensors file the header comes, and the rest of its size is a hole.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from moe_edge.models.errors import BadMagic, MissingFile, UsageError
from moe_edge.models.formats.safetensors import INDEX_NAME, MAX_HEADER, SINGLE_NAME, read_json_file
from moe_edge.runner.hub.client import Hub, Repository
from moe_edge.runner.hub.download import Download
from moe_edge.runner.hub.layers import Fetcher
from moe_edge.runner.hub.names import HubName, RemoteFile, model_files
from moe_edge.runner.hub.pull import find_choice, write_header

SMALL = (".json", ".model", ".txt", ".jinja", ".tiktoken")
SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Mirror:
    """source: what to convert. remote: local path -> the file of the hub it stands for, of those with weights."""

    source: Path
    repo: Repository
    remote: dict[Path, RemoteFile]

    @property
    def nbytes(self) -> int:
        return sum(each.size for each in self.remote.values())


def mirror_of(hub: Hub, name: HubName, folder: Path) -> Mirror:
    """The model that `name` means, in `folder`: a GGUF, or the checkpoint of a repository without one.

    Raises what asking the hub raises, UsageError for a repository with neither, BadChecksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    repo = hub.repository(name.repo)
    if name.tag or model_files(repo.files):
        choice = find_choice(hub, name)
        remote = {}
        for file in choice.files:
            path = folder / Path(file.path).name
            write_header(hub, choice, file, path)
            os.truncate(path, file.size)
            remote[path] = file
        return Mirror(next(iter(remote)), choice.repo, remote)
    return _checkpoint(hub, repo, folder / name.repo.split("/")[1])


def _checkpoint(hub: Hub, repo: Repository, folder: Path) -> Mirror:
    by_name = {each.path: each for each in repo.files if "/" not in each.path}
    if "config.json" not in by_name:
        raise UsageError(f"{repo.repo} has neither a GGUF model nor a checkpoint (config.json): nothing to convert")
    folder.mkdir(exist_ok=True)
    for file in by_name.values():
        if file.path.endswith(SMALL) and file.size <= SMALL_BYTES:
            path = folder / file.path
            path.unlink(missing_ok=True)
            if file.size:
                Download(hub, repo, file, path).run()
            else:
                path.touch()
    names = {SINGLE_NAME}
    if INDEX_NAME in by_name:
        weights = read_json_file(folder / INDEX_NAME).get("weight_map")
        names = {str(each) for each in weights.values()} if isinstance(weights, dict) else set()
    remote = {folder / each: by_name[each] for each in sorted(names) if each in by_name}
    if not remote:
        raise MissingFile(f"{repo.repo}: has no safetensors files at its root, which a conversion reads")
    fetcher = Fetcher(hub, repo, remote, lambda _: None)
    for path, file in remote.items():
        _write_safetensors_header(fetcher, path, file)
    return Mirror(folder, repo, remote)


def _write_safetensors_header(fetcher: Fetcher, path: Path, file: RemoteFile) -> None:
    if file.size < 8:
        raise BadMagic(f"{file.path}: has {file.size} bytes, a safetensors file has at least 8")
    with open(path, "wb") as out:

        def write(data: bytes, at: int) -> None:
            out.seek(at)
            out.write(data)

        fetcher.fetch(path, 0, 8, write)
        out.flush()
        length = struct.unpack("<Q", path.read_bytes()[:8])[0]
        if length <= min(MAX_HEADER, file.size - 8):  # else the reader says what is wrong with it
            fetcher.fetch(path, 8, 8 + length, lambda data, at: write(data, 8 + at))
    os.truncate(path, file.size)
