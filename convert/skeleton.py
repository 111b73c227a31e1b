"""The skeleton: what llama.cpp loads. Dense tensors as they are, a width-1 NaN stub for each expert tensor.

Also finds or writes the cached skeleton of a stock GGUF whose experts are read in place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from moe_edge.convert.experts import MoELayer
from moe_edge.convert.ggml_types import F16, F32, tensor_bytes
from moe_edge.convert.gguf import GGUFFile, GGUFModel, open_gguf, read_gguf
from moe_edge.convert.source import FORMAT_VERSION, KIND, STORE_ID, Source, gguf_source
from moe_edge.convert.stream import SourceFiles
from moe_edge.convert.write import GGUFOutput, TensorSpec, check_space, kv_bool, kv_string, kv_strings, kv_u32
from moe_edge.models.errors import BadFile, MissingFile, MoeEdgeError

VERSION = 1
SKELETON_KIND = "skeleton"
IN_PLACE = "moe_edge.in_place"
SOURCE = "moe_edge.source"
SOURCE_FILES = "moe_edge.source_files"
SOURCE_IDENTITY = "moe_edge.source_identity"
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


def own_kvs(store_id: str, source: str, in_place: Mapping[Path, str] | None = None) -> dict[str, bytes]:
    """moe-edge's keys of a skeleton. in_place: absolute path -> identity of each file the experts stay in."""
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
    return kvs


def skeleton_for(
    path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> Path:
    """The cached skeleton of a stock GGUF (any part of a split one); written when there is none yet.

    cache_dir: instead of `$MOE_EDGE_CACHE`, `$XDG_CACHE_HOME/moe-edge` or `~/.cache/moe-edge`.
    prove: called with a skeleton that was just written; when it raises, the skeleton is removed.
    A skeleton is found again while path, size, modification time and header of every part stay the same.
    Raises what open_source does, and DiskFull.
    """
    return skeleton_of(open_gguf(path), cache_dir, prove)


def skeleton_of(
    model: GGUFModel,
    cache_dir: str | os.PathLike[str] | None = None,
    prove: Callable[[Path], None] | None = None,
) -> Path:
    """As skeleton_for, for a model that is open already."""
    identity = file_identities([part.path for part in model.parts])
    store_id = in_place_id(model.parts, identity)
    folder = cache_folder(cache_dir)
    target = folder / f"{model.path.stem}-{store_id}.gguf"
    if _is_skeleton(target, store_id):
        return target
    source = gguf_source(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingFile(f"{folder}: cannot create the cache folder: {error.strerror}; set MOE_EDGE_CACHE") from error
    _write_in_place(source, target, own_kvs(store_id, str(next(iter(identity))), identity))
    if prove is not None:
        remove_unless_proven(prove, target, (target,))
    return target


def remove_unless_proven(prove: Callable[[Path], None], skeleton: Path, files: Iterable[Path]) -> None:
    """Call `prove` with the skeleton; when it raises, remove `files` and let the error through."""
    try:
        prove(skeleton)
    except BaseException:
        for each in files:
            each.unlink(missing_ok=True)
        raise


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of cached skeletons; see skeleton_for. Raises MissingFile when there is no home folder for it."""
    if cache_dir is None:
        cache_dir = os.environ.get("MOE_EDGE_CACHE")
    if cache_dir:
        return Path(cache_dir) / "skeletons"
    xdg = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(xdg) if xdg else Path.home() / ".cache") / "moe-edge" / "skeletons"
    except RuntimeError as error:  # no HOME, and a user that the system does not know, as in some containers
        raise MissingFile(
            "there is no home folder to keep skeletons in; set MOE_EDGE_CACHE to a folder that can be written"
        ) from error


def file_identities(paths: Iterable[Path]) -> dict[Path, str]:
    """Absolute path -> `size:mtime_ns`. Raises MissingFile."""
    identities = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise MissingFile(f"{path}: no such file") from error
        identities[path.absolute()] = f"{stat.st_size}:{stat.st_mtime_ns}"
    return identities


def in_place_id(parts: Iterable[GGUFFile], identity: Mapping[Path, str]) -> str:
    """32 hex digits over path, size, modification time and header of every part of a stock GGUF."""
    digest = hashlib.sha256(f"moe-edge skeleton {VERSION}".encode())
    for part, (path, each) in zip(parts, identity.items(), strict=True):
        digest.update(f"\0{path}\0{each}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(part.header).digest())
    return digest.hexdigest()[:32]


def check_version(file: GGUFFile, kind: str) -> None:
    """Raise BadFile unless `file` is a moe-edge file of this kind and of a version we know."""
    found = file.kv.get(KIND)
    if found != kind:
        raise BadFile(f"{file.path}: is {found or 'not a moe-edge file'}, expected a moe-edge {kind} file")
    version = file.kv.get(FORMAT_VERSION)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise BadFile(
            f"{file.path}: has format version {version}; this moe-edge reads up to version {VERSION}: upgrade moe-edge"
        )


def _is_skeleton(path: Path, store_id: str) -> bool:
    """Whether a whole skeleton of this id is at `path`; a damaged one is written again."""
    if not path.exists():
        return False
    try:
        file = read_gguf(path)
        check_version(file, SKELETON_KIND)
    except MoeEdgeError:
        return False
    return bool(file.kv.get(STORE_ID) == store_id)


def _write_in_place(source: Source, target: Path, own: Mapping[str, bytes]) -> None:
    stubs = stub_specs(source.layers, source.biases)
    specs = [TensorSpec(each.name, each.shape, each.type, each.nbytes) for each in source.dense]
    kvs = skeleton_kvs(source, own, {})
    output = GGUFOutput(target, kvs, (*specs, *stubs), source.alignment, part_suffix=f".{os.getpid()}.part")
    check_space(target.parent, output.total_bytes, f"{target}: the skeleton of {source.name}")
    with output, SourceFiles() as files:
        for entry in source.dense:
            for data in files.chunks(entry):
                output.write(data)
        for stub in stubs:
            for data in stub_data(stub.nbytes):
                output.write(data)
        output.finish()
        output.verify()
        output.commit()


def _spec(name: str, shape: tuple[int, ...], type_id: int) -> TensorSpec:
    return TensorSpec(name, shape, type_id, tensor_bytes(type_id, shape))
