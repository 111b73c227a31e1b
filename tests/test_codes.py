"""The codec `codes`: exponents in codes of three bits, the same bits by every unpacker, whatever the values are."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
from moe_edge.models.errors import BadFile
from moe_edge.models.formats.ggml_types import BF16, F16, type_name
from moe_edge.models.store.codes import packed_exponents, unpacked_exponents
from moe_edge.models.store.planes import CODES, HEADER, PLANES, pack, unpack
from moe_edge.runner.capi import library
from test_planes import matrix, native_unpack

UNPACKERS = {0: "plain", 1: "AVX2", 2: "AVX-512", 3: "NEON"}
CHUNK = 65536


@pytest.fixture(params=UNPACKERS, ids=UNPACKERS.get)
def unpacker(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each that this processor has, in turns; the best one is back afterwards."""
    lib = library()
    if lib.me_use_code_unpacker(request.param) != 0:
        pytest.skip(f"this processor has no {UNPACKERS[request.param]}")
    yield request.param
    for each in (0, 3, 1, 2):  # the last that works is the best
        lib.me_use_code_unpacker(each)


def of_exponents(exponents: np.ndarray, seed: int = 0) -> bytes:
    """BF16 values with these exponents [n], any signs and mantissas."""
    rest = np.random.default_rng(seed).integers(0, 256, len(exponents)).astype(np.uint16)
    return bytes((exponents.astype(np.uint16) << 7 | (rest & 0x7F) | (rest >> 7 << 15)).astype("<u2").tobytes())


def cases() -> dict[str, bytes]:
    """Matrices of 16-bit words, as BF16 and F16 alike."""
    random = np.random.default_rng(7)
    common = 120 + random.integers(0, 7, CHUNK + 96)
    rare = np.where(random.random(CHUNK + 96) < 0.05, random.integers(0, 256, CHUNK + 96), common)
    bunched = common.copy()
    bunched[1000:1900] = random.integers(0, 256, 900)  # whole groups that escape
    bunched[-40:] = 255  # and the end
    return {
        "every word there is": np.arange(65536, dtype="<u2").tobytes(),
        "all equal": struct.pack("<H", 0x3DCC) * (CHUNK + 64),
        "zeros": bytes(2 * CHUNK),
        "NaN, infinity, denormals, zeros of both signs": np.tile(
            np.array([0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x7C00, 0xFC00, 0x7E01, 1, 0x8001, 0x7F, 0, 0x8000], "<u2"),
            6000,
        ).tobytes(),
        "seven exponents, no escape": of_exponents(common),
        "escapes": of_exponents(rare),
        "escapes in a bunch": of_exponents(bunched),
        "Gaussian": matrix(BF16, CHUNK + 256 * 5),
    }  # fmt: skip


@pytest.mark.parametrize("type_id", [BF16, F16], ids=type_name)
@pytest.mark.parametrize("case", cases())
def test_every_unpacker_gives_back_the_same_bits(unpacker: int, case: str, type_id: int) -> None:
    raw = cases()[case]
    for nbytes in (len(raw), len(raw) - 2, len(raw) - 2 * 33, 2, 62, 64, 66, 130, 258, 2000):
        some = raw[-nbytes:]
        packed = pack(some, type_id, CODES)
        assert native_unpack(packed, type_id, CODES, len(some)) == some == unpack(packed, type_id, CODES, nbytes, "m")
    if case == "seven exponents, no escape" and type_id == BF16:
        assert len(pack(raw, type_id, CODES)) < 0.69 * len(raw)  # eight bits and three


@pytest.mark.parametrize("is_f16", [False, True])
def test_a_chunk_by_hand(is_f16: bool) -> None:
    """33 values: two groups. Exponents 8, 16, ... 56 are the common ones, 200 and 248 escape."""
    high = np.array([8 * (1 + i % 7) for i in range(31)] + [200, 248], np.uint8) | (5 if is_f16 else 0)
    chunk = packed_exponents(high, is_f16)
    width = 24 if is_f16 else 12
    n_escapes, *table = struct.unpack_from("<I8B", chunk)
    assert n_escapes == 2 and sorted(table) == [0, 8, 16, 24, 32, 40, 48, 56] and table[7] == 0
    if not is_f16:
        assert list(chunk[12:14]) == [200, 248] and len(chunk) == 14 + 2 * width
        group = chunk[14:26]
        assert group[7] >> 6 == 3 and group[8 + 3] >> 7 == 1  # value 31 escapes: all three bits
        assert (group[1] & 3) + 4 * (group[9] & 1) == table.index(16)  # value 1
    assert np.array_equal(unpacked_exponents(chunk, len(high), is_f16), high)


@pytest.mark.parametrize("type_id", [BF16, F16], ids=type_name)
def test_damage_is_found_by_every_unpacker_and_nothing_is_written_outside(unpacker: int, type_id: int) -> None:
    """Escapes too many and too few, a table that cannot be, groups turned to escapes, planes of other sizes."""
    raw = matrix(type_id, 2 * CHUNK)
    packed = bytearray(pack(raw, type_id, CODES))
    first = HEADER.size + 4 * 2 * 2  # the first chunk
    (size,) = struct.unpack_from("<I", packed, HEADER.size)
    n_escapes = struct.unpack_from("<I", packed, first)[0]
    groups = first + 12 + n_escapes
    for at, data in (
        (first, struct.pack("<I", n_escapes + 1)), (first, struct.pack("<I", n_escapes - 1)), (first, b"\xff" * 4),
        (first + 11, b"\x01"), (groups, b"\xff" * 12), (groups, b"\xff" * (size - 12 - n_escapes)),
        (groups, bytes(size - 12 - n_escapes)), (HEADER.size, struct.pack("<2I", size + 1, size - 1)),
        (HEADER.size, struct.pack("<3I", 8, *struct.unpack_from("<I", packed, HEADER.size + 4), CHUNK + size - 8)),
    ):  # fmt: skip
        damaged = packed.copy()
        damaged[at : at + len(data)] = data
        found = native_unpack(bytes(damaged), type_id, CODES, len(raw))
        assert isinstance(found, str) and "convert or download it again" in found, (at - first, found)
        with pytest.raises(BadFile, match="m "):
            unpack(bytes(damaged), type_id, CODES, len(raw), "m")


def test_chance_damage_never_reaches_outside(unpacker: int) -> None:
    random = np.random.default_rng(unpacker)
    raw = matrix(BF16, 256 * 40)
    packed = pack(raw, BF16, CODES)
    told = 0
    for _ in range(1500):
        damaged = bytearray(packed)
        for _ in range(random.integers(1, 6)):
            damaged[random.integers(HEADER.size, len(damaged))] = random.integers(0, 256)
        told += isinstance(native_unpack(bytes(damaged), BF16, CODES, len(raw)), str)
    assert told > 200


def test_a_piece_of_one_codec_is_not_taken_for_the_other() -> None:
    raw = matrix(BF16, CHUNK)
    for codec, other in ((CODES, PLANES), (PLANES, CODES)):
        found = native_unpack(pack(raw, BF16, codec), BF16, other, len(raw))
        assert isinstance(found, str) and "a header of another matrix" in found
        with pytest.raises(BadFile, match="a header of another matrix"):
            unpack(pack(raw, BF16, codec), BF16, other, len(raw), "m")
