"""`moe-edge pull REPO --then convert`: the weights come a layer at a time, and are converted and deleted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moe_edge.convert.convert import ConvertReport
from moe_edge.models.errors import BadChecksum, UsageError
from moe_edge.models.formats.files import FileStamp
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.write import GGUFOutput
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import print_result
from moe_edge.runner.hub.client import Hub
from moe_edge.runner.hub.download import exclusive, replace_text
from moe_edge.runner.hub.layers import AT_ONCE, ArrivingFiles, Fetcher, layers_of
from moe_edge.runner.hub.mirror import Mirror, mirror_of
from moe_edge.runner.hub.names import HubName

TWICE = ("calibrate", "bits", "low_bits")  # of convert's options, those that read the model twice


class PulledConversion:
    """Brings a mirror's bytes to convert() (convert/arriving.py), and keeps a journal of what was written.

    folder: where everything is that is not whole. told: called with bytes that have come.
    """

    def __init__(self, hub: Hub, mirror: Mirror, folder: Path, told: Callable[[int], None], check: bool = False):
        self.folder = folder
        self._hub, self._mirror, self._told, self._check = hub, mirror, told, check
        self._journal = folder / "journal.json"
        self._identity = ""
        self._n_before = 0
        self._tensors: Sequence[tuple[str, TensorEntry]] = ()
        self._files: ArrivingFiles | None = None
        self.most_bytes = 0  # of layers on disk at a time

    def resume(self, identity: str) -> tuple[Sequence[int], Sequence[int]]:
        blobs = [each.blob for each in self._mirror.remote.values()]
        self._identity = hashlib.sha256("\0".join([identity, *blobs]).encode()).hexdigest()
        store, skeleton = self._read_journal()
        self._n_before = len(store) + len(skeleton)
        return store, skeleton

    def _read_journal(self) -> tuple[list[int], list[int]]:
        """Nothing where it is of another conversion, or damaged."""
        try:
            found = json.loads(self._journal.read_text())
            lists = [int(each) for each in found["store"]], [int(each) for each in found["skeleton"]]
            are_there = all((self.folder / str(name)).is_file() for name in found["parts"])
            return lists if found["identity"] == self._identity and are_there else ([], [])
        except (OSError, ValueError, KeyError, TypeError):
            return [], []

    def begin(self, tensors: Sequence[tuple[str, TensorEntry]]) -> int:
        self._tensors = tensors
        sizes = sorted((each.nbytes for each in layers_of(tensors, 0)), reverse=True)
        return sum(sizes[:AT_ONCE])

    def files(self, stamps: Mapping[Path, FileStamp]) -> SourceFiles:
        layers = layers_of(self._tensors, self._n_before)
        fetcher = Fetcher(self._hub, self._mirror.repo, self._mirror.remote, self._told)
        self._files = ArrivingFiles(stamps, layers, fetcher, self.folder)
        return self._files

    def written(self, store: GGUFOutput, skeleton: GGUFOutput) -> None:
        assert self._files is not None
        self.most_bytes = self._files.most_bytes
        if self._files.written(len(store.checksums) + len(skeleton.checksums)):
            store.sync()
            skeleton.sync()
            state = {
                "identity": self._identity, "store": store.checksums, "skeleton": skeleton.checksums,
                "parts": [store.part.name, skeleton.part.name],
            }  # fmt: skip
            replace_text(self._journal, json.dumps(state))

    def check(self) -> None:
        if not self._check:
            return
        fetcher = Fetcher(self._hub, self._mirror.repo, self._mirror.remote, lambda _: None)
        for path, file in self._mirror.remote.items():
            found = hashlib.sha256()
            fetcher.fetch(path, 0, file.size, lambda data, _, found=found: found.update(data))  # type: ignore[misc]
            if file.sha256 and found.hexdigest() != file.sha256:
                raise BadChecksum(
                    f"{self._mirror.repo.repo}/{file.path}: has the checksum {found.hexdigest()[:16]}..., the hub says "
                    f"{file.sha256[:16]}...; what was made of it was thrown away"
                )

    def finished(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def pull_and_convert(hub: Hub, name: HubName, arguments: Sequence[str], check: bool, as_json: bool) -> None:
    """arguments: of convert, without its source. Raises UsageError, and what the hub and convert() raise."""
    from moe_edge.runner.commands.convert import command as convert
    from moe_edge.runner.hub.progress import shown_progress

    context = convert.make_context("moe-edge pull ... --then convert", [".", *arguments], auto_envvar_prefix=None)
    options = context.params
    if given := [each for each in TWICE if options[each] is not None]:
        raise UsageError(f"--{given[0].replace('_', '-')} reads the model twice; pull it first, then convert it")
    if options["pack"] != "none":
        raise UsageError("--pack writes tensors whose size is known only then; pull the model first, then convert it")
    output: Path | None = options["output"]
    if output is None:
        raise UsageError("where to? give --then convert -o NAME.gguf")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder to write {output.name} to")
    folder = output.with_name(output.name + ".moe-edge-pull")
    folder.mkdir(exist_ok=True)
    with exclusive(output.with_name(output.name + ".moe-edge-lock")):
        mirror = mirror_of(hub, name, folder / "source")
        terminal.say(f"{name}: {mirror.nbytes / 1e9:.2f} GB, converted as it comes; {folder} has what is on its way")
        try:
            with shown_progress(mirror.nbytes, terminal.say) as told:
                report = _convert(options, mirror, PulledConversion(hub, mirror, folder, told, check))
        except BadChecksum:  # whatever is wrong with it, nobody is to go on from there
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            terminal.say("stopped; the layers that were written stay: the same command goes on from there")
            raise
        if report.skeleton is None:  # a dry run
            shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder) and not any(folder.iterdir()):
        folder.rmdir()
    print_result(report.to_json() if as_json or options["as_json"] else report.text())


def _convert(options: dict[str, object], mirror: Mirror, arriving: PulledConversion) -> ConvertReport:
    from moe_edge.runner.commands.conversion import run_convert
    from moe_edge.runner.commands.convert import request_of

    return run_convert(request_of(mirror.source, options, arriving), tell=terminal.say)
