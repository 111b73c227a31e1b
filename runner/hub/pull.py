"""Choosing a model of the hub, planning it from its headers alone, and bringing it into the cache."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.models.errors import CutFile, MoeEdgeError, UsageError
from moe_edge.models.formats.gguf import read_header
from moe_edge.runner.hub.client import Hub, HubError, Repository
from moe_edge.runner.hub.download import Download, Progress
from moe_edge.runner.hub.hub_cache import cache_folder, find_stored, link_blob, repo_folder, write_ref
from moe_edge.runner.hub.names import HubName, RemoteFile, choose, hub_name, model_files, parts_of, quant_of

FIRST_BYTES = 1 << 20  # of a header that is read by ranges; four times as many while it is not whole
READABLE = 5.0  # tok/s: about as fast as one reads
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A model of a repository: its files, in order."""

    repo: Repository
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(each.size for each in self.files)

    @property
    def name(self) -> str:
        return f"{self.repo.repo}:{quant_of(self.files[0].path) or self.files[0].path}"

    def blob(self, file: RemoteFile) -> Path:
        return repo_folder(self.repo.repo) / "blobs" / file.blob

    def link(self, file: RemoteFile) -> Path:
        return repo_folder(self.repo.repo) / "snapshots" / self.repo.commit / file.path


def find_choice(hub: Hub, name: HubName) -> Choice:
    """Raises UsageError for a tag that is not there, and what asking the hub raises."""
    repo = hub.repository(name.repo)
    first = choose(repo.files, name)
    return Choice(repo, tuple(parts_of(first, repo.files)))


def other_choices(choice: Choice) -> list[Choice]:
    """Every model of the repository, the largest first."""
    found = []
    for first in model_files(choice.repo.files):
        with contextlib.suppress(MoeEdgeError):  # a split model without all its parts
            found.append(Choice(choice.repo, tuple(parts_of(first, choice.repo.files))))
    return sorted(found, key=lambda each: -each.nbytes)


def plan_choice(hub: Hub, choice: Choice, **options: Any) -> Any:
    """`plan` of a model of which only the headers are fetched, some megabytes; see runner/measure/plan.py."""
    from moe_edge.runner.measure.plan import plan

    with _headers(hub, choice) as first:
        return plan(first, **options)


@contextlib.contextmanager
def _headers(hub: Hub, choice: Choice) -> Iterator[Path]:
    """The first of files that end behind their headers, on the disk of the cache, so that its speed is what counts."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".moe-edge-plan-", dir=cache_folder()) as folder:
        for file in choice.files:
            write_header(hub, choice, file, Path(folder) / Path(file.path).name)
        yield Path(folder) / Path(choice.files[0].path).name


def write_header(hub: Hub, choice: Choice, file: RemoteFile, path: Path) -> None:
    """The beginning of a GGUF into `path`, as far as its header goes or a little further."""
    url = hub.address(choice.repo, file)
    wanted, at, failures = FIRST_BYTES, 0, 0
    with open(path, "wb") as out:
        while True:
            end = min(wanted, file.size)
            before = at
            for offset, data in hub.ranges(url, at, end, file.path) if at < end else ():
                piece = data[max(0, at - offset) :]
                out.write(piece)
                at += len(piece)
            out.flush()
            if at < end:
                failures = failures + 1 if at == before else 0
                if failures > 5:
                    raise HubError(f"{file.path}: its header does not come; try again later")
                url = hub.address(choice.repo, file)
                continue
            try:
                read_header(path)
                return
            except CutFile:
                if at >= file.size:
                    raise
                wanted *= 4


def best_choice(hub: Hub, choices: Sequence[Choice], tell: Tell, **options: Any) -> tuple[Choice, Any] | None:
    """The largest model that runs here at a speed one can read, else the fastest that runs; None when none does."""
    fastest: tuple[float, Choice, Any] | None = None
    for each in choices:
        found = plan_choice(hub, each, **options)
        speed = found.estimate.tokens_per_second.expected if found.estimate is not None else 0.0
        tell(f"  {quant_of(each.files[0].path) or each.files[0].path:12} {each.nbytes / 1e9:7.1f} GB  {found.verdict}"
             + (f", {speed:.1f} tok/s" if found.will_run and speed else ""))  # fmt: skip
        if found.will_run and speed >= READABLE:
            return each, found
        if found.will_run and (fastest is None or speed > fastest[0]):
            fastest = speed, each, found
    return None if fastest is None else fastest[1:]


def missing_bytes(hub: Hub, choice: Choice) -> int:
    """What is still to be downloaded."""
    return sum(Download(hub, choice.repo, each, choice.blob(each)).left_bytes for each in choice.files)


def fetch(hub: Hub, choice: Choice, progress: Progress = lambda _: None) -> Path:
    """Bring a model into the cache; returns its first file. Raises what Download.run raises."""
    for file in choice.files:
        blob = Download(hub, choice.repo, file, choice.blob(file)).run(progress)
        link_blob(blob, choice.link(file))
    write_ref(choice.repo.repo, choice.repo.commit)
    return choice.link(choice.files[0])


def resolve_model(text: str, ask: Callable[[str], bool] | None, tell: Tell) -> str:
    """The path of a model that a user names: a path as it is, `user/repo[:TAG]` in the cache, fetched after a yes.

    ask: a question to answer with yes; None where nobody can. Raises UsageError when it is not there and nobody may say
    yes.
    """
    name = hub_name(text)
    if name is None:
        return text
    stored = find_stored(name)
    if stored is not None:
        with contextlib.suppress(OSError):
            os.utime(stored)
        return str(stored)
    if ask is None:
        raise UsageError(f"{text}: no such file, and no such model in {cache_folder()}; get it: moe-edge pull {text}")
    hub = Hub()
    choice = find_choice(hub, name)
    if not ask(f"{choice.name} is not here. Download {missing_bytes(hub, choice) / 1e9:.1f} GB?"):
        raise UsageError(f"{text}: is not here; get it: moe-edge pull {text}")
    from moe_edge.runner.hub.progress import shown_progress

    with shown_progress(missing_bytes(hub, choice), tell) as progress:
        return str(fetch(hub, choice, progress))
