"""The ggml tensor types: id, name, elements and bytes of a block. No imports, so that the runtime stays lean.

A test checks the table against ggml itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe_edge.models.errors import BadFile, UnknownName
from moe_edge.models.suggest import did_you_mean


class GGMLType(NamedTuple):
    """A tensor type; `block` elements of a row are stored in `block_bytes` bytes."""

    id: int
    name: str
    block: int
    block_bytes: int


_SIZES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

TYPES = {type_id: GGMLType(type_id, *sizes) for type_id, sizes in _SIZES.items()}
BY_NAME = {entry.name: entry for entry in TYPES.values()}

F32, F16, BF16, I8 = 0, 1, 30, 24
FLOAT_TYPES = frozenset({F32, F16, BF16})

# ggml has no matrix product for weights of these on a CPU: it calls a null pointer. Into Q8_1 and Q8_K it turns the
# other operand of a product.
WITHOUT_PRODUCT = frozenset(BY_NAME[name].id for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))
_INDEX_TYPES = frozenset(BY_NAME[name].id for name in ("I32", "I64"))
# Tables of indices, not weights: deepseek4's token -> experts, and the vocabularies of draft models.
_INDEX_TENSORS = re.compile(r"(?:blk\.\d+\.)?(?:ffn_gate_tid2eid|d2t|t2d)(?:\.weight)?")


def type_name(type_id: int) -> str:
    """`Q4_K` for 12; `type 99` for one we do not know."""
    return TYPES[type_id].name if type_id in TYPES else f"type {type_id}"


def find_type(name: str) -> GGMLType:
    """The type called `name`, in any case. Raises UnknownName with the nearest name."""
    entry = BY_NAME.get(name.upper())
    if entry is None:
        raise UnknownName(f"unknown tensor type '{name}'{did_you_mean(name.upper(), BY_NAME)}")
    return entry


def check_product(name: str, type_id: int, where: str) -> None:
    """Raise BadFile when llama.cpp cannot compute with a tensor of this type; `where` names the file."""
    if type_id not in WITHOUT_PRODUCT or (type_id in _INDEX_TYPES and _INDEX_TENSORS.fullmatch(name)):
        return
    raise BadFile(
        f"{where}: tensor '{name}' is of type {type_name(type_id)}, which ggml cannot multiply by on a CPU; "
        "quantize the model again with another type for it, such as Q8_0"
    )


def row_bytes(type_id: int, cols: int) -> int:
    """Bytes of one row of `cols` elements; `cols` must be a multiple of the type's block."""
    entry = TYPES[type_id]
    assert cols % entry.block == 0, f"{cols} is not a multiple of {entry.block}"
    return cols // entry.block * entry.block_bytes


def tensor_bytes(type_id: int, shape: Sequence[int]) -> int:
    """Bytes of a whole tensor, `shape` in ggml order (row length first)."""
    return row_bytes(type_id, shape[0]) * math.prod(shape[1:])


def main_type(sizes: Iterable[tuple[int, int]]) -> int:
    """The type that most bytes are in. sizes: (type id, bytes), at least one."""
    by_type: dict[int, int] = {}
    for type_id, nbytes in sizes:
        by_type[type_id] = by_type.get(type_id, 0) + nbytes
    return max(by_type, key=lambda type_id: by_type[type_id])
