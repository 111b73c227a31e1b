"""GGUF key-values and tensor headers: parsing bytes that may be damaged, or not yet be all there.

The parsers take a buffer and a position and return (value, end). When bytes are missing they raise struct.error (or
OverflowError), or return an end beyond the buffer; what can never be right raises ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

STRING, ARRAY = 8, 9
MAX_KEY = 65535  # bytes, by the GGUF specification
MAX_NAME = 255  # bytes of a tensor's name; llama.cpp reads 63
MAX_ELEMENTS = 1 << 21  # of an array; the largest known, merges of a vocabulary, have 2^19
# value type -> (struct code, bytes); strings and arrays are handled apart
SCALARS = {
    0: ("B", 1), 1: ("b", 1), 2: ("H", 2), 3: ("h", 2), 4: ("I", 4), 5: ("i", 4),
    6: ("f", 4), 7: ("?", 1), 10: ("Q", 8), 11: ("q", 8), 12: ("d", 8),
}  # fmt: skip

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_INFO = {n_dims: f"<{n_dims}QIQ" for n_dims in range(1, 5)}

TensorInfo = tuple[str, tuple[int, ...], int, int]  # name, shape in ggml order, type id, offset


class KeyValues(Mapping[str, Any]):
    """Metadata of a GGUF: `kv[key]` decodes the value when asked; `record(key)` is the raw key-value, to copy."""

    def __init__(self, buffer: bytes, spans: dict[str, tuple[int, int, int]]) -> None:
        self._buffer = buffer
        self._spans = spans  # key -> start of the record, start of its value type, end of the record

    def __getitem__(self, key: str) -> Any:
        _, at, end = self._spans[key]
        return _decode(self._buffer, at, end)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def record(self, key: str) -> bytes:
        """The bytes of the key-value in the file: key, value type and value."""
        start, _, end = self._spans[key]
        return self._buffer[start:end]

    def count(self, key: str) -> int:
        """How many elements an array has, without making them; 0 for a key that is missing or no array."""
        if key not in self._spans or self.types(key)[0] != ARRAY:
            return 0
        return int(_U64(self._buffer, self._spans[key][1] + 8)[0])

    def types(self, key: str) -> tuple[int, int | None]:
        """Value type of `key`, and for an array the type of its elements."""
        _, at, _ = self._spans[key]
        value_type = _U32(self._buffer, at)[0]
        return value_type, _U32(self._buffer, at + 4)[0] if value_type == ARRAY else None


def parse_records(records: Iterable[bytes]) -> KeyValues:
    """KeyValues over raw key-values of our own making, such as those of a converted checkpoint."""
    buffer, spans = b"".join(records), {}
    at = 0
    while at < len(buffer):
        (key, *span), at = parse_key_value(buffer, at)
        assert key not in spans, key
        spans[key] = (span[0], span[1], span[2])
    return KeyValues(buffer, spans)


def parse_u32(buffer: bytes, at: int) -> tuple[int, int]:
    return int(_U32(buffer, at)[0]), at + 4


def parse_u64(buffer: bytes, at: int) -> tuple[int, int]:
    return int(_U64(buffer, at)[0]), at + 8


def parse_key_value(buffer: bytes, start: int) -> tuple[tuple[str, int, int, int], int]:
    at = start + 8 + _length(buffer, start, MAX_KEY)
    if at > len(buffer):
        return ("", start, at, at), at
    key = buffer[start + 8 : at].decode()
    end = _skip(buffer, at + 4, _U32(buffer, at)[0])
    return (key, start, at, end), end


def _length(buffer: bytes, at: int, most: int) -> int:
    """The length of the name at `at`; a name that is too long is damage, however many bytes the file has."""
    length = int(_U64(buffer, at)[0])
    if length > most and at + 8 + length <= len(buffer):
        raise ValueError(f"a name of {length} bytes, at most {most} are read")
    return length


def parse_array_head(buffer: bytes, at: int) -> tuple[int, int, int]:
    """(value type, element type, elements) of the value whose type is at `at`; (value type, 0, 0) if it is no array."""
    value_type = int(_U32(buffer, at)[0])
    if value_type != ARRAY:
        return value_type, 0, 0
    element, count = struct.unpack_from("<IQ", buffer, at + 4)
    return value_type, int(element), int(count)


def _skip(buffer: bytes, at: int, value_type: int) -> int:
    """Where a value of `value_type` that starts at `at` ends."""
    if value_type in SCALARS:
        return at + SCALARS[value_type][1]
    if value_type == STRING:
        return at + 8 + int(_U64(buffer, at)[0])
    if value_type != ARRAY:
        raise ValueError(f"unknown value type {value_type}")
    element, count = struct.unpack_from("<IQ", buffer, at)
    at, count = at + 12, int(count)
    if element != STRING and element not in SCALARS:
        raise ValueError(f"arrays of value type {element} are not supported")
    least = at + count * (8 if element == STRING else SCALARS[element][1])
    if least > len(buffer):
        return int(least)  # the caller knows whether the file has so many bytes
    if count > MAX_ELEMENTS:
        raise ValueError(f"an array of {count} elements, at most {MAX_ELEMENTS} are read")
    if element in SCALARS:
        return int(least)
    unpack = _U64  # a local name: this loop runs once for each token and merge of the vocabulary
    for _ in range(count):
        at += 8 + unpack(buffer, at)[0]
    return int(at)


def parse_tensor_info(buffer: bytes, start: int) -> tuple[TensorInfo, int]:
    at = start + 8 + _length(buffer, start, MAX_NAME)
    if at > len(buffer):
        return ("", (), 0, 0), at
    name = buffer[start + 8 : at].decode()
    n_dims = _U32(buffer, at)[0]
    if not 1 <= n_dims <= 4:
        raise ValueError(f"tensor '{name}' has {n_dims} dimensions, expected 1 to 4")
    *shape, type_id, offset = struct.unpack_from(_INFO[n_dims], buffer, at + 4)
    return (name, tuple(shape), type_id, offset), at + 16 + 8 * n_dims


def _decode(buffer: bytes, at: int, end: int) -> Any:
    value_type = _U32(buffer, at)[0]
    at += 4
    if value_type in SCALARS:
        return struct.unpack_from("<" + SCALARS[value_type][0], buffer, at)[0]
    if value_type == STRING:
        return buffer[at + 8 : end].decode(errors="surrogateescape")
    element, count = struct.unpack_from("<IQ", buffer, at)
    at += 12
    if element in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[element][0]}", buffer, at))
    strings = []
    for _ in range(count):
        length = _U64(buffer, at)[0]
        strings.append(buffer[at + 8 : at + 8 + length].decode(errors="surrogateescape"))
        at += 8 + length
    return strings
