"""Which file of a repository a name means. Pure: lists in, choices out.

The rules are llama.cpp's (common/download.cpp), with two differences: a tag must begin where a word begins, so that F16
does not take BF16, and of several hits the shortest path wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_edge.models.errors import BadFile, UsageError

DEFAULT_TAGS = ("Q4_K_M", "Q8_0")
NO_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # in a file's name: parts of something else

_NAME = re.compile(r"(?:hf\.co/|https://huggingface\.co/)?([\w][\w.-]*/[\w][\w.-]*?)(?::([\w.-]+))?/?")
_PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.gguf$")
_QUANT = re.compile(r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*|NVFP4\w*))(?=[.-]|$)", re.I)


@dataclass(frozen=True)
class HubName:
    """`user/repo:TAG`. tag: empty when none was given."""

    repo: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. sha256: of its bytes, as the hub says; empty for small files.

    blob: the name it has in the cache: its sha256, or git's SHA-1 for a small one.
    """

    path: str
    size: int
    blob: str
    sha256: str = ""


def hub_name(text: str) -> HubName | None:
    """What a user means by `user/repo[:TAG]`; None for a path: one that exists, or that names a GGUF."""
    found = _NAME.fullmatch(text)
    if found is None or text.lower().endswith(".gguf") or Path(text).exists():
        return None
    return HubName(found[1], found[2] or "")


def model_files(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The files that can be named: models, of split ones the first part."""
    found = []
    for each in files:
        name = each.path.rsplit("/", 1)[-1].lower()
        part = _PART.match(each.path)
        if name.endswith(".gguf") and not any(word in name for word in NO_MODELS) and (not part or int(part[2]) == 1):
            found.append(each)
    return found


def choose(files: Sequence[RemoteFile], name: HubName) -> RemoteFile:
    """The (first) file that a name means. Raises UsageError, with what there is, when there is none."""
    models = model_files(files)
    if not models:
        raise UsageError(f"{name.repo} has no GGUF model; convert a checkpoint with `moe-edge convert FOLDER`")
    for tag in (name.tag,) if name.tag else DEFAULT_TAGS:
        hits = [each for each in models if matches(each.path, tag)]
        if hits:
            return min(hits, key=lambda each: len(each.path))
    if not name.tag:
        return models[0]
    there = ", ".join(sorted({quant_of(each.path) or each.path for each in models}))
    raise UsageError(f"{name.repo} has no {name.tag}; it has {there}")


def matches(path: str, tag: str) -> bool:
    """Whether a tag names a file: `Q4_K_M` in `dir/Model-Q4_K_M.gguf`, whatever the case."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?=[./-]|$)", path, re.I) is not None


def parts_of(first: RemoteFile, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """All files of a model, in order. Raises BadFile when a part is not in the repository."""
    part = _PART.match(first.path)
    if part is None:
        return [first]
    by_path = {each.path: each for each in files}
    count = int(part[3])
    wanted = [f"{part[1]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if missing := [path for path in wanted if path not in by_path]:
        raise BadFile(f"{missing[0]}: is not in the repository, which has other parts of this model; choose another")
    return [by_path[path] for path in wanted]


def quant_of(path: str) -> str:
    """`Q4_K_M` of a file's name; empty when it says none."""
    found = _QUANT.findall(path.rsplit("/", 1)[-1])
    return str(found[-1]) if found else ""
