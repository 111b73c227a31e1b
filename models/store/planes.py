"""The codecs `planes` and `codes`: matrices of experts packed without loss, field by field of their blocks (ZipMoE,
docs/PAPERS.md).

A 16-bit float is rotated left by one bit and cut into its bytes: the high one is the exponent (BF16) or the exponent
with the first bits of the mantissa (F16), and packs; the low one is mantissa and sign, and does not. A quantized block
is cut into its scales, byte by byte, and its quants. What zstd shortens is kept packed, chunk by chunk, the rest raw.
`codes` has 16-bit floats only, their exponents in codes of one width (codes.py): longer, but unpacked in a third of the
time. docs/FORMAT.md has the bytes, native/codec.cpp unpacks them while a model runs.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from moe_edge.models.errors import BadFile
from moe_edge.models.formats.ggml_types import BF16, BY_NAME, F16, TYPES
from moe_edge.models.store.codes import packed_exponents, unpacked_exponents
from moe_edge.models.store.experts import Piece

PLANES, CODES = 1, 2  # the codecs' numbers, as in native/codec.h
CODEC_NAMES = {PLANES: "planes", CODES: "codes"}
MAGIC = 0x4B50454D
HEADER = struct.Struct("<4IQ2I")  # magic, type, blocks in a chunk, planes, blocks, chunks, 1 for `codes` or else 0
CHUNK_BYTES = 128 << 10  # of the matrix: a chunk with all its planes stays in a core's second cache
WORTH = 1 / 32  # a chunk that saves less of its bytes than this is kept raw, which is faster to unpack

# Bytes of each field of a block, in order, for the types that save 3 % or more (measured, docs/LOG.md, 2026-11-26).
_NAMED = {
    "Q4_0": (1, 1, 16),
    "Q4_1": (1, 1, 1, 1, 16),
    "Q5_0": (1, 1, 4, 16),
    "Q5_1": (1, 1, 1, 1, 4, 16),
    "Q8_0": (1, 1, 32),
    "Q2_K": (16, 64, 1, 1, 1, 1),
    "Q4_K": (1, 1, 1, 1, 12, 128),
    "IQ4_NL": (1, 1, 16),
    "MXFP4": (1, 16),
    "TQ2_0": (64, 1, 1),
}
FIELDS = {F16: (1, 1), BF16: (1, 1), **{BY_NAME[name].id: fields for name, fields in _NAMED.items()}}

# What a packed matrix takes of its bytes, about: the worse of tiny-moe's weights and Gaussian ones (docs/LOG.md).
TYPICAL_SHARE = {
    (PLANES, F16): 0.85, (PLANES, BF16): 0.67, (CODES, F16): 0.89, (CODES, BF16): 0.70,
    **{(PLANES, BY_NAME[name].id): share for name, share in (
        ("Q4_0", 0.93), ("Q4_1", 0.93), ("Q5_0", 0.98), ("Q5_1", 0.95), ("Q8_0", 0.95), ("Q2_K", 0.94), ("Q4_K", 0.985),
        ("IQ4_NL", 0.97), ("MXFP4", 0.95), ("TQ2_0", 0.41),
    )},
}  # fmt: skip

# zstd's fast strategy, with a table of matches too small to find any: what is left is its entropy coder. It packs
# exponents to 33.0 % where level 1 packs them to 37.4 %, and unpacks 1.4 times as fast.
_PARAMETERS = {"strategy": 1, "min_match": 7, "hash_log": 6, "window_log": 17}


def can_pack(type_id: int, codec: int = PLANES) -> bool:
    """Whether a codec knows the fields of a ggml type."""
    return type_id in FIELDS and (codec == PLANES or (codec == CODES and type_id in (F16, BF16)))


def usual_codec(type_id: int) -> int:
    """What packs a type that `can_pack`, where nothing else is asked for: `codes` where it can (docs/LOG.md)."""
    return CODES if can_pack(type_id, CODES) else PLANES


def main_codec(pieces: Iterable[Piece], type_id: int) -> int:
    """What packs most bytes of a type; where none is packed, what `convert --pack planes` would pack it with."""
    sizes = Counter[int]()
    for piece in pieces:
        if piece.type == type_id and piece.codec in CODEC_NAMES:
            sizes[piece.codec] += piece.nbytes
    return max(sizes, key=sizes.__getitem__, default=usual_codec(type_id))


def chunk_blocks(type_id: int) -> int:
    """Blocks that are packed together; a 16-bit float is a block."""
    return CHUNK_BYTES // _block_bytes(type_id)


def most_bytes(type_id: int, nbytes: int) -> int:
    """What a packed matrix of `nbytes` takes at most."""
    n_chunks = -(-(nbytes // _block_bytes(type_id)) // chunk_blocks(type_id))
    return HEADER.size + 4 * len(FIELDS[type_id]) * n_chunks + nbytes


def pack(data: bytes, type_id: int, codec: int) -> bytes:
    """A matrix of this ggml type, packed. The codec must know the type, `data` be whole blocks."""
    import numpy as np

    fields, step = FIELDS[type_id], chunk_blocks(type_id)
    blocks = _as_blocks(np.frombuffer(data, np.uint8), type_id)
    chunks: list[list[bytes]] = []
    at = 0
    for width in fields:
        plane = np.ascontiguousarray(blocks[:, at : at + width])
        chunks.append([_chunk(plane[i : i + step], type_id, codec, at) for i in range(0, len(plane), step)])
        at += width
    sizes = [len(chunk) for plane in chunks for chunk in plane]
    header = HEADER.pack(MAGIC, type_id, step, len(fields), len(blocks), len(chunks[0]), int(codec == CODES))
    return b"".join([header, struct.pack(f"<{len(sizes)}I", *sizes), *(chunk for plane in chunks for chunk in plane)])


def unpack(data: bytes, type_id: int, codec: int, nbytes: int, where: str) -> bytes:
    """What `pack` was given: the matrix of `nbytes`. Raises BadFile, `where` naming file and tensor."""
    import numpy as np

    fields = FIELDS[type_id]
    n_blocks = nbytes // _block_bytes(type_id)
    blocks = np.empty((n_blocks, _block_bytes(type_id)), np.uint8)
    at, room = 0, list(_chunks(data, type_id, codec, n_blocks, where))
    for plane, width in enumerate(fields):
        for first, chunk in room[plane]:
            n = min(chunk_blocks(type_id), n_blocks - first)
            raw = chunk if len(chunk) == n * width else _unpacked(chunk, n * width, type_id, codec, plane, where)
            blocks[first : first + n, at : at + width] = np.frombuffer(raw, np.uint8).reshape(n, width)
        at += width
    return _from_blocks(blocks, type_id)


def _chunks(data: bytes, type_id: int, codec: int, n_blocks: int, where: str) -> Iterator[list[tuple[int, bytes]]]:
    """For each plane its chunks: (first block, bytes as stored)."""
    step, fields = chunk_blocks(type_id), FIELDS[type_id]
    n_chunks = -(-n_blocks // step)
    expected = HEADER.pack(MAGIC, type_id, step, len(fields), n_blocks, n_chunks, int(codec == CODES))
    if data[: HEADER.size] != expected:
        raise BadFile(f"{where} is packed with a header of another matrix; convert or download it again")
    table = data[HEADER.size : HEADER.size + 4 * len(fields) * n_chunks]
    sizes = struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
    if len(sizes) != len(fields) * n_chunks or HEADER.size + len(table) + sum(sizes) != len(data):
        raise BadFile(f"{where} is packed in {len(data)} bytes, which its table contradicts; convert it again")
    at = HEADER.size + len(table)
    for plane in range(len(fields)):
        chunks = []
        for number in range(n_chunks):
            size = sizes[plane * n_chunks + number]
            chunks.append((number * step, data[at : at + size]))
            at += size
        yield chunks


def _as_blocks(data: Any, type_id: int) -> Any:
    """uint8 [blocks, bytes of a block]; 16-bit floats rotated, the high byte first."""
    import numpy as np

    if type_id not in (F16, BF16):
        return data.reshape(-1, _block_bytes(type_id))
    words = data.view("<u2")
    return ((words << 1) | (words >> 15)).astype(">u2").view(np.uint8).reshape(-1, 2)


def _from_blocks(blocks: Any, type_id: int) -> bytes:
    if type_id not in (F16, BF16):
        return bytes(blocks.tobytes())
    rotated = blocks.reshape(-1).view(">u2").astype("<u2")
    return bytes(((rotated >> 1) | (rotated << 15)).astype("<u2").tobytes())


def _chunk(plane: Any, type_id: int, codec: int, first_byte: int) -> bytes:
    """As it is stored: packed, or raw where that saves too little. first_byte: of the plane's field in its block."""
    raw: bytes = plane.tobytes()
    if codec == CODES:
        packed = packed_exponents(plane.reshape(-1), type_id == F16) if first_byte == 0 else raw
    else:
        packed = _compressor().compress(raw)
    return packed if len(packed) <= len(raw) * (1 - WORTH) else raw


def _unpacked(chunk: bytes, nbytes: int, type_id: int, codec: int, plane: int, where: str) -> bytes:
    import zstandard

    if codec == CODES:
        try:
            if plane:
                raise ValueError("its signs and mantissas are not raw")
            return bytes(unpacked_exponents(chunk, nbytes, type_id == F16).tobytes())
        except ValueError as error:
            raise BadFile(f"{where} does not unpack ({error}); convert or download it again") from error
    try:
        raw: bytes = zstandard.ZstdDecompressor().decompress(chunk, max_output_size=nbytes)
    except zstandard.ZstdError as error:
        raise BadFile(f"{where} does not unpack ({error}); convert or download it again") from error
    if len(raw) != nbytes:
        raise BadFile(f"{where} unpacks to {len(raw)} bytes where {nbytes} are needed; convert or download it again")
    return raw


def _compressor() -> Any:
    """One for each call: a compressor must not be shared by threads."""
    import zstandard

    return zstandard.ZstdCompressor(compression_params=_compression_parameters())


@lru_cache(maxsize=1)
def _compression_parameters() -> Any:
    import zstandard

    return zstandard.ZstdCompressionParameters(write_content_size=True, write_checksum=False, **_PARAMETERS)


def _block_bytes(type_id: int) -> int:
    return TYPES[type_id].block_bytes
