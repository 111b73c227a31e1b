"""How tensors of checkpoints are cut, turned and put together: what the families' files are made of.

Shapes are those of the checkpoint, row length last. What only moves numbers keeps their bits and type; what computes
gives F32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moe_edge.models.formats.derived import BF16, F16, F32, I8, DerivedEntry, Part
from moe_edge.models.formats.safetensors import SafeTensor

if TYPE_CHECKING:  # numpy: not for the runtime, see derived.py
    from moe_edge.models.formats.derived import Array

ELEMENT_BYTES = {F32: 4, F16: 2, BF16: 2, I8: 1}
MXFP4, MXFP4_BLOCK, MXFP4_BYTES = 39, 32, 17  # ggml's id, values of a block, bytes of it
FP8_BLOCK = 128


def moved(name: str, tensor: SafeTensor, shape: Sequence[int], move: Callable[[Array], Array]) -> DerivedEntry:
    """A tensor of the same type whose numbers stand elsewhere. shape: of what `move` returns."""
    entry = tensor.entry(name)
    nbytes = math.prod(shape) * ELEMENT_BYTES[entry.type]
    return DerivedEntry(
        name,
        tuple(shape)[::-1],
        entry.type,
        tensor.path,
        tensor.offset,
        nbytes,
        (tensor.raw(),),
        (tensor.shape,),
        lambda parts: move(parts[0].bits),
    )


def computed(
    name: str, tensors: Sequence[SafeTensor], shape: Sequence[int], compute: Callable[[Sequence[Part]], Array]
) -> DerivedEntry:
    """An F32 tensor computed of others. shape: of what `compute` returns."""
    import numpy as np

    first = tensors[0]
    return DerivedEntry(
        name,
        tuple(shape)[::-1],
        F32,
        first.path,
        first.offset,
        4 * math.prod(shape),
        tuple(each.raw() for each in tensors),
        tuple(each.shape for each in tensors),
        lambda parts: np.asarray(compute(parts), "<f4"),
    )


def value(name: str, like: SafeTensor, numbers: Sequence[float]) -> DerivedEntry:
    """A constant F32 vector, that no tensor of the checkpoint holds. like: any tensor, for messages."""
    import numpy as np

    made = np.asarray(numbers, "<f4")
    return DerivedEntry(name, made.shape, F32, like.path, like.offset, made.nbytes, (), (), lambda _: made)


def plus_one(name: str, tensor: SafeTensor) -> DerivedEntry:
    """A norm whose checkpoint holds the difference from 1."""
    import numpy as np

    return computed(name, [tensor], tensor.shape, lambda parts: parts[0].floats() + np.float32(1))


def minus_exp(name: str, tensor: SafeTensor, shape: Sequence[int] | None = None) -> DerivedEntry:
    """A state space's decay, of its logarithm."""
    import numpy as np

    shape = tensor.shape if shape is None else shape
    return computed(name, [tensor], shape, lambda parts: -np.exp(parts[0].floats()).reshape(shape))


def reshaped(name: str, tensor: SafeTensor, shape: Sequence[int]) -> DerivedEntry:
    """The same numbers in the same order under another shape."""
    return moved(name, tensor, shape, lambda bits: bits.reshape(tuple(shape)))


def rope_rows(name: str, tensor: SafeTensor, n_head: int) -> DerivedEntry:
    """Rows of a query or key from half-by-half (transformers' rope) to pair-by-pair order (llama's), head by head."""

    def turn(bits: Array) -> Array:
        half = bits.shape[0] // n_head // 2
        turned: Array = bits.reshape(n_head, 2, half, *bits.shape[1:]).swapaxes(1, 2).reshape(bits.shape)
        return turned

    return moved(name, tensor, tensor.shape, turn)


def rows(name: str, tensor: SafeTensor, start: int, stop: int) -> DerivedEntry:
    """Some rows of a matrix."""
    return moved(name, tensor, (stop - start, *tensor.shape[1:]), lambda bits: bits[start:stop])


def dequantized_fp8(name: str, tensor: SafeTensor, scale: SafeTensor) -> DerivedEntry:
    """FP8 (E4M3) with one scale for each block of 128 x 128, for each row or for all, as BF16.

    The product of a value of 8 bits and its scale is rounded to BF16, which is what the checkpoint was made from.
    """
    table = e4m3_values()

    def widen(parts: Sequence[Part]) -> Array:
        values, scales = table[parts[0].bits], parts[1].floats()
        if scales.ndim == 2 and scales.shape != (values.shape[0], 1) and scales.size > 1:
            scales = scales.repeat(FP8_BLOCK, 0)[: values.shape[0]].repeat(FP8_BLOCK, 1)[:, : values.shape[1]]
        return to_bf16(values * scales)

    return DerivedEntry(
        name,
        tensor.shape[::-1],
        BF16,
        tensor.path,
        tensor.offset,
        2 * math.prod(tensor.shape),
        (tensor.raw(), scale.raw()),
        (tensor.shape, scale.shape or (1,)),
        widen,
    )


def e4m3_values() -> Array:
    """float32 [256]: what each byte of FP8 E4M3 (finite, one NaN) stands for."""
    import numpy as np

    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(exponent == 15) & (mantissa == 7)] = np.nan
    return np.where(code >> 7, -values, values).astype(np.float32)


def to_bf16(values: Array) -> Array:
    """Bits of BF16, rounded to nearest, ties to even."""
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def slice_of(tensor: SafeTensor, index: int) -> SafeTensor:
    """One of the stacked tensors, which is a range of bytes of its own."""
    nbytes = tensor.nbytes // tensor.shape[0]
    return SafeTensor(
        f"{tensor.name}[{index}]", tensor.dtype, tensor.shape[1:], tensor.path, tensor.offset + index * nbytes, nbytes
    )


def mxfp4(name: str, blocks: SafeTensor, scales: SafeTensor, first_row: int, step: int) -> DerivedEntry:
    """Rows first_row, first_row + step, ... of FP4 blocks of 32 values with an exponent each: no number changes.

    blocks: bytes [rows, n_blocks, 16]. scales: bytes [rows, n_blocks]. The checkpoint packs neighbours into a byte;
    ggml packs value i with value i + 16, behind the exponent.
    """
    import numpy as np

    n_rows, n_blocks = len(range(first_row, blocks.shape[0], step)), blocks.shape[1]

    def pack(parts: Sequence[Part]) -> Array:
        packed, exponents = (part.bits[first_row::step] for part in parts)
        values = np.stack((packed & 15, packed >> 4), -1).reshape(n_rows, n_blocks, MXFP4_BLOCK)
        nibbles = values[..., :16] | values[..., 16:] << 4
        return np.concatenate((exponents[..., None], nibbles), -1).astype(np.uint8)

    return DerivedEntry(
        name,
        (n_blocks * MXFP4_BLOCK, n_rows),
        MXFP4,
        blocks.path,
        blocks.offset,
        n_rows * n_blocks * MXFP4_BYTES,
        (blocks.raw(), scales.raw()),
        (blocks.shape, scales.shape),
        pack,
    )
