"""Exponents in codes of three bits: a chunk of the codec `codes` (docs/FORMAT.md has the bytes).

Entropy coding gets exponents shorter, 2.6 bits of BF16's eight where codes of one width need 3.2 with their escapes.
But these are unpacked 32 at a time by the vectors of every processor of today (native/exponents.cpp).
"""

from __future__ import annotations

import struct
from typing import Any

N_CODES = 7  # exponents with a code; the eighth code is for all others, which stand in a list
GROUP = 32  # values whose codes lie together
_FRONT = struct.Struct("<I8B")  # escapes; the exponents of the codes, most frequent first, and 0
_PAIRS, _BITS = 0x0303030303030303, 0x01010101


def packed_exponents(high: Any, is_f16: bool) -> bytes:
    """uint8 [n], the high bytes of values turned left, in codes: a chunk. is_f16: three bits of each are mantissa."""
    import numpy as np

    exponents = high & 0xF8 if is_f16 else high
    counts = np.bincount(exponents, minlength=256)
    common = np.argsort(-counts, kind="stable")[:N_CODES].astype(np.uint8)
    code_of = np.full(256, N_CODES, np.uint8)
    code_of[common] = np.arange(N_CODES)
    codes = code_of[exponents]
    escapes = exponents[codes == N_CODES]
    groups = _groups(codes)
    if is_f16:
        groups = np.concatenate((groups, _groups(high & 7)), axis=1)
    return b"".join((_FRONT.pack(len(escapes), *common.tolist(), 0), escapes.tobytes(), groups.tobytes()))


def unpacked_exponents(chunk: bytes, n: int, is_f16: bool) -> Any:
    """What `packed_exponents` was given, of n values. Raises ValueError for a chunk that cannot be one."""
    import numpy as np

    width = 24 if is_f16 else 12
    if len(chunk) < _FRONT.size:
        raise ValueError("its table is cut short")
    n_escapes, *table = _FRONT.unpack_from(chunk)
    if len(chunk) != _FRONT.size + n_escapes + -(-n // GROUP) * width or table[N_CODES]:
        raise ValueError("its size contradicts its table")
    escapes = np.frombuffer(chunk, np.uint8, n_escapes, _FRONT.size)
    groups = np.frombuffer(chunk, np.uint8, offset=_FRONT.size + n_escapes).reshape(-1, width)
    codes = _codes(groups[:, :12])[:n]
    high = np.array(table, np.uint8)[codes]
    if np.count_nonzero(codes == N_CODES) != n_escapes:
        raise ValueError("its escapes are not as many as its codes say")
    high[codes == N_CODES] = escapes
    return high | _codes(groups[:, 12:])[:n] if is_f16 else high


def _groups(codes: Any) -> Any:
    """uint8 [n] of three bits -> [groups, 12]: two bits of each in the first eight bytes, the third in four."""
    import numpy as np

    whole = np.zeros(-(-len(codes) // GROUP) * GROUP, np.uint8)
    whole[: len(codes)] = codes
    eights, fours = whole.view("<u8").reshape(-1, 4) & _PAIRS, whole.view("<u4").reshape(-1, 8) >> 2 & _BITS
    pairs, bits = eights[:, 0].copy(), fours[:, 0].copy()
    for k in range(1, 4):
        pairs |= eights[:, k] << 2 * k
    for k in range(1, 8):
        bits |= fours[:, k] << k
    return np.concatenate((pairs.reshape(-1, 1).view(np.uint8), bits.reshape(-1, 1).view(np.uint8)), axis=1)


def _codes(groups: Any) -> Any:
    """[groups, 12] -> uint8 [32 x groups]."""
    import numpy as np

    whole = np.ascontiguousarray(groups)
    pairs, bits = whole[:, :8].copy().view("<u8"), whole[:, 8:].copy().view("<u4")
    twos = (pairs >> np.arange(0, 8, 2, dtype=np.uint64) & _PAIRS).view(np.uint8).reshape(-1)
    ones = (bits >> np.arange(8, dtype=np.uint32) & _BITS).view(np.uint8).reshape(-1)
    return twos | ones << 2
