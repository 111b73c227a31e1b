"""Writing the expert store of a conversion (docs/FORMAT.md); models/store/store.py opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_edge.models.calibration import Calibration
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, kv_string, kv_strings, kv_u32, kv_u32s
from moe_edge.models.store.calibration_keys import calibration_kvs
from moe_edge.models.store.experts import RAW
from moe_edge.models.store.skeleton import SOURCE, VERSION
from moe_edge.models.store.source import FORMAT_VERSION, KIND, STORE_ID
from moe_edge.models.store.store import (
    ALIGNMENT,
    CHECKSUMS,
    CODECS,
    LEVELS,
    PACKED_COLS,
    PACKED_ROWS,
    PACKED_TYPES,
    PACKED_VERSION,
    SOURCE_SHA256,
    STORE_KIND,
    store_id,
)


def new_store(
    path: Path,
    architecture: str,
    source: str,
    source_sha256: str,
    levels: Sequence[str],
    tensors: Sequence[TensorSpec],
    calibration: Calibration | None = None,
    part: Path | None = None,
    packed: Mapping[str, tuple[int, int, int, int]] | None = None,
    whole: Sequence[int] | None = None,
) -> GGUFOutput:
    """The output for a store, to be filled and then closed by `seal_store`. part, whole: as GGUFOutput has them.

    packed: name -> (codec, type, cols, rows) of the tensors that are stored packed.
    Raises UsageError for a calibration the format cannot hold.
    """
    kvs = {
        "general.architecture": kv_string("general.architecture", architecture),
        "general.alignment": kv_u32("general.alignment", ALIGNMENT),
        FORMAT_VERSION: kv_u32(FORMAT_VERSION, PACKED_VERSION if packed else VERSION),
        KIND: kv_string(KIND, STORE_KIND),
        STORE_ID: kv_string(STORE_ID, "0" * 32),
        LEVELS: kv_strings(LEVELS, levels),
        SOURCE: kv_string(SOURCE, source),
        SOURCE_SHA256: kv_string(SOURCE_SHA256, source_sha256),
        CHECKSUMS: kv_u32s(CHECKSUMS, [0] * len(tensors)),
    }
    if packed:
        kvs |= _packed_kvs(packed, tensors)
    if calibration is not None:
        kvs |= calibration_kvs(calibration)
    return GGUFOutput(path, kvs, tensors, ALIGNMENT, part, whole)


def _packed_kvs(packed: Mapping[str, tuple[int, int, int, int]], tensors: Sequence[TensorSpec]) -> dict[str, bytes]:
    rows = [packed[each.name] if each.name in packed else (RAW, 0, 0, 0) for each in tensors]
    keys = (CODECS, PACKED_TYPES, PACKED_COLS, PACKED_ROWS)
    return {key: kv_u32s(key, column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def seal_store(output: GGUFOutput) -> str:
    """Put checksums and id into a store whose tensors are all written, and sync it. Returns the id."""
    identity = store_id(output.tensors, output.checksums)
    output.patch(CHECKSUMS, kv_u32s(CHECKSUMS, output.checksums))
    output.patch(STORE_ID, kv_string(STORE_ID, identity))
    output.finish()
    return identity
