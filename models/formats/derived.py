"""A tensor that is made from others while it is streamed: permuted, split, widened, put together.

A checkpoint does not always hold what ggml wants to read: rows of a rope are in another order, several matrices are
one, weights are FP8 with scales beside them. Such a tensor is made when it is read, one at a time and whole; none is
larger than a layer's largest dense matrix, or one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_edge.models.formats.gguf import TensorEntry

if TYPE_CHECKING:  # numpy is not for the runtime, which opens models and converts none
    import numpy.typing as npt
    from moe_edge.models.formats.floats import FloatArray

    Array: TypeAlias = npt.NDArray[Any]
F32, F16, I8, BF16 = 0, 1, 24, 30
_CODES = {F32: "<u4", F16: "<u2", BF16: "<u2", I8: "u1"}
_NAMES = {F32: "F32", F16: "F16", BF16: "BF16"}


@dataclass(frozen=True)
class Part:
    """A tensor to make another one of: its bits as numbers without sign, in the checkpoint's shape, and their type.

    type: of ggml; I8 stands for any bytes, FP8 among them.
    """

    bits: Array
    type: int

    def floats(self) -> FloatArray:
        """The values as float32. Raises KeyError for bytes."""
        import numpy as np
        from moe_edge.models.formats.floats import bf16_to_f32

        if self.type == BF16:
            return bf16_to_f32(self.bits)
        values = self.bits.view({F32: "<f4", F16: "<f2"}[self.type])
        return np.asarray(values, np.float32)


Make: TypeAlias = "Callable[[Sequence[Part]], Array]"


@dataclass(frozen=True)
class DerivedEntry(TensorEntry):
    """A tensor that `make` makes of `parts`. shape and nbytes are those of what it makes, in ggml's order.

    part_shapes: of each part, in the checkpoint's order. path and offset are those of the first part, for messages.
    """

    parts: tuple[TensorEntry, ...] = ()
    part_shapes: tuple[tuple[int, ...], ...] = ()
    make: Make = field(default=lambda parts: parts[0].bits, compare=False)

    def build(self, data: Sequence[bytes]) -> bytes:
        """The tensor's bytes, of those of its parts. Raises ValueError when what was made is not what was planned."""
        import numpy as np

        made = self.make(
            [
                Part(np.frombuffer(each, _CODES[entry.type]).reshape(shape), entry.type)
                for each, entry, shape in zip(data, self.parts, self.part_shapes, strict=True)
            ]
        )
        out = np.ascontiguousarray(made).tobytes()
        if len(out) != self.nbytes:
            raise ValueError(f"{self.name}: {len(out)} bytes were made, {self.nbytes} were planned")
        return out
