"""Arrays of floating-point numbers: what they are called everywhere, and BF16, which numpy lacks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def bf16_to_f32(values: npt.NDArray[np.uint16]) -> FloatArray:
    """float32 of bfloat16 bits: the upper half of a float."""
    return (values.astype(np.uint32) << 16).view(np.float32)
