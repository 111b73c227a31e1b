"""The skeleton: what llama.cpp loads. Dense tensors as they are, a width-1 NaN stub for each expert tensor.

Also finds or writes the cached skeleton of a stock GGUF whose experts are read in place.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from moe_edge.models.errors import BadFile, MissingFile, MoeEdgeError
from moe_edge.models.formats import work
from moe_edge.models.formats.files import FileStamp, shown, stamp_of
from moe_edge.models.formats.ggml_types import F16, F32, tensor_bytes
from moe_edge.models.formats.gguf import GGUFFile, GGUFModel, open_gguf
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, check_space, kv_bool, kv_string, kv_strings, kv_u32
from moe_edge.models.store.experts import MoELayer
from moe_edge.models.store.sample import dense_digest
from moe_edge.models.store.sound import is_sound, mark_sound
from moe_edge.models.store.source import FORMAT_VERSION, KIND, STORE_ID, Source, gguf_source

VERSION = 1
SKELETON_KIND = "skeleton"
IN_PLACE = "moe_edge.in_place"
SOURCE = "moe_edge.source"
SOURCE_FILES = "moe_edge.source_files"
SOURCE_IDENTITY = "moe_edge.source_identity"
SOURCE_DIGEST = "moe_edge.source_digest"
STEM_CHARACTERS = 40  # of the user's file name, in names of the cache
STUB_CHUNK = 1 << 20


def stub_specs(layers: Iterable[MoELayer], biases: Iterable[tuple[int, str]]) -> tuple[TensorSpec, ...]:
    """The stubs of all expert tensors, in the order of the layers: expert width 1, F16 (biases F32)."""
    specs = []
    with_bias = set(biases)
    for layer in layers:
        for projection in layer.projections:
            rows = 2 if projection == "gate_up" else 1
            cols, rows = (1, layer.n_embd) if projection == "down" else (layer.n_embd, rows)
            specs.append(_spec(f"blk.{layer.layer}.ffn_{projection}_exps.weight", (cols, rows, layer.n_expert), F16))
        for projection in layer.projections:
            if (layer.layer, projection) in with_bias:
                specs.append(_spec(f"blk.{layer.layer}.ffn_{projection}_exps.bias", (1, layer.n_expert), F32))
    return tuple(specs)


def stub_data(nbytes: int) -> Iterator[bytes]:
    """The bytes of a stub: all 0xFF, which is NaN in F16 and F32, so a run without the engine cannot look right."""
    while nbytes > 0:
        piece = min(nbytes, STUB_CHUNK)
        yield b"\xff" * piece
        nbytes -= piece


def skeleton_kvs(source: Source, own: Mapping[str, bytes], changed: Mapping[str, bytes]) -> dict[str, bytes]:
    """The skeleton's key-values: the source's byte for byte, but for the width keys, `changed` and `own`."""
    replaced = {**source.stub_overrides(), **changed}
    kvs = {key: source.kv.record(key) for key in source.kv if not key.startswith("split.")}
    return {**kvs, **replaced, **own}


def own_kvs(
    store_id: str, source: str, in_place: Mapping[Path, str] | None = None, digest: str | None = None
) -> dict[str, bytes]:
    """moe-edge's keys of a skeleton.

    in_place: absolute path -> identity of each file the experts stay in. digest: of the dense weights in them.
    """
    kvs = {
        FORMAT_VERSION: kv_u32(FORMAT_VERSION, VERSION),
        KIND: kv_string(KIND, SKELETON_KIND),
        STORE_ID: kv_string(STORE_ID, store_id),
        IN_PLACE: kv_bool(IN_PLACE, in_place is not None),
        SOURCE: kv_string(SOURCE, source),
    }
    if in_place is not None:
        kvs[SOURCE_FILES] = kv_strings(SOURCE_FILES, [str(path) for path in in_place])
        kvs[SOURCE_IDENTITY] = kv_strings(SOURCE_IDENTITY, list(in_place.values()))
    if digest is not None:
        kvs[SOURCE_DIGEST] = kv_string(SOURCE_DIGEST, digest)
    return kvs


def skeleton_for(
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> Path:
    """The cached skeleton of a stock GGUF (any part of a split one); written when there is none that is sound.

    cache_dir: instead of `$MOE_EDGE_CACHE`, `$XDG_CACHE_HOME/moe-edge` or `~/.cache/moe-edge`.
    prove: called with a skeleton that was just written, before it has its name; when it raises, the skeleton is gone.
    A skeleton is found again while real path, size, modification time, header and sampled dense weights of every part
    stay the same, and what this release makes of them.
    Raises what open_source does, and DiskFull.
    """
    return skeleton_of(open_gguf(path), cache_dir, prove)


def skeleton_of(
    model: GGUFModel,
    cache_dir: str | os.PathLike[str] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> Path:
    """As skeleton_for, for a model that is open already."""
    source = gguf_source(model)
    with SourceFiles(source.stamps) as files:
        digest = dense_digest(source.dense, files)
        identity = part_identities(model.parts)
        store_id = in_place_id(model.parts, identity, digest, _derived(source))
        folder = cache_folder(cache_dir)
        target = folder / f"{short_stem(next(iter(identity)))}-{store_id}.gguf"
        own = own_kvs(store_id, str(next(iter(identity))), identity, digest)
        part = work.part_path(folder) / target.name
        output = GGUFOutput(target, skeleton_kvs(source, own, {}), _specs(source), source.alignment, part)
        if is_sound(target, output, source.dense, digest, files):
            return target
        _write_in_place(source, target, own, prove)
    return target


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of cached skeletons; see skeleton_for. Raises MissingFile where the user has no home."""
    if cache_dir is None:
        cache_dir = os.environ.get("MOE_EDGE_CACHE")
    if cache_dir:
        return Path(cache_dir) / "skeletons"
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        return Path(xdg) / "moe-edge" / "skeletons"
    try:
        home = Path.home()
    except RuntimeError as error:  # neither HOME nor an entry in the list of users, as in containers
        raise MissingFile("there is no home folder to keep a cache in; set MOE_EDGE_CACHE to a folder") from error
    return home / ".cache" / "moe-edge" / "skeletons"


def short_stem(path: Path) -> str:
    """The start of a file's name in plain letters, for a name in the cache, whatever the user's is."""
    plain = re.sub("[^A-Za-z0-9._-]+", "_", path.name.removesuffix(".gguf"))
    return plain[:STEM_CHARACTERS].strip("._") or "model"


def file_identities(paths: Iterable[Path]) -> dict[Path, str]:
    """Real path -> `size:mtime_ns`. Raises MissingFile."""
    return {real_path(path): _identity(stamp_of(path)) for path in paths}


def part_identities(parts: Iterable[GGUFFile]) -> dict[Path, str]:
    """file_identities() of open files, as they were when their headers were read."""
    return {real_path(part.path): _identity(part.stamp) for part in parts}


def real_path(path: Path) -> Path:
    """Absolute and without links: in the cache of the hub, each commit has links to the same files."""
    return Path(os.path.realpath(path))


def _identity(stamp: FileStamp) -> str:
    return f"{stamp.nbytes}:{stamp.mtime_ns}"


def in_place_id(parts: Iterable[GGUFFile], identity: Mapping[Path, str], *more: str) -> str:
    """32 hex digits over path, size, modification time and header of every part of a stock GGUF, and over `more`."""
    digest = hashlib.sha256(f"moe-edge skeleton {VERSION}".encode())
    for part, (path, each) in zip(parts, identity.items(), strict=True):
        digest.update(f"\0{path}\0{each}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(part.header).digest())
    for text in more:
        digest.update(f"\0{text}".encode())
    return digest.hexdigest()[:32]


def check_version(file: GGUFFile, kind: str, newest: int = VERSION) -> None:
    """Raise BadFile unless `file` is a moe-edge file of this kind and of a version we know, up to `newest`."""
    found = file.kv.get(KIND)
    if found != kind:
        what = "not a moe-edge file" if found is None else str(found)[:40]
        raise BadFile(f"{file.path}: is {what}, expected a moe-edge {kind} file")
    version = file.kv.get(FORMAT_VERSION)
    if not isinstance(version, int) or not 1 <= version <= newest:
        raise BadFile(
            f"{file.path}: has format version {shown(version)}; this moe-edge reads up to version {newest}: "
            "upgrade moe-edge"
        )


def _specs(source: Source) -> tuple[TensorSpec, ...]:
    dense = [TensorSpec(each.name, each.shape, each.type, each.nbytes) for each in source.dense]
    return (*dense, *stub_specs(source.layers, source.biases))


def _derived(source: Source) -> str:
    """A digest of what this release makes of a source: another one, or a corrected table, may make other skeletons."""
    records = b"".join(record for _, record in sorted(source.stub_overrides().items()))
    tensors = repr([(each.name, each.shape, each.type) for each in _specs(source)]).encode(errors="surrogateescape")
    return hashlib.sha256(records + tensors).hexdigest()


def _write_in_place(
    source: Source, target: Path, own: Mapping[str, bytes], prove: Callable[[Path], None] | None
) -> None:
    """Write, check, prove, and only then give the name; what has it before keeps it until then."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingFile(
            f"{target.parent}: cannot create the cache folder: {error.strerror}; set MOE_EDGE_CACHE"
        ) from error
    with work.WorkFolder(target.parent, [target.name]) as folder:
        part = folder.path / target.name
        output = GGUFOutput(target, skeleton_kvs(source, own, {}), _specs(source), source.alignment, part)
        check_space(target.parent, output.total_bytes, f"{target}: the skeleton of {source.name}")
        with output, SourceFiles(source.stamps) as files:
            _fill(output, source, files)
            files.check_unchanged()
            output.finish()
            output.verify()
            output.close()
        if prove is not None:
            try:
                prove(part)
            except MoeEdgeError as error:
                raise work.renamed_in(error, [(part, source.files[0])]) from error.__cause__
        folder.commit()
    mark_sound(target)


def _fill(output: GGUFOutput, source: Source, files: SourceFiles) -> None:
    for entry in source.dense:
        for data in files.chunks(entry):
            output.write(data)
    for stub in output.tensors[len(source.dense) :]:
        for data in stub_data(stub.nbytes):
            output.write(data)


def _spec(name: str, shape: tuple[int, ...], type_id: int) -> TensorSpec:
    return TensorSpec(name, shape, type_id, tensor_bytes(type_id, shape))
