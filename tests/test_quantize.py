"""Quantizing is ggml's own; what a type cannot hold is refused or falls back as in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import (
    floats,
)
from moe_edge.convert.ggml_types import BY_NAME, type_name
from moe_edge.convert.quantize import TARGETS, dequantize, fitting_type, quantize, requantize, target_type
from moe_edge.models.errors import (
    BadFile,
    UnknownName,
)


@pytest.mark.parametrize("name", TARGETS)
def test_quantized_rows_read_as_gguf_reads_them(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    data = quantize(floats(3, 512), kind)
    ours = dequantize(data, kind, 512)
    raw = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}.get(name, np.uint8)).reshape(3, -1)
    assert np.array_equal(ours, gguf.dequantize(raw, kind).reshape(3, 512))


def test_bfloat16_is_exact_both_ways() -> None:
    rows = floats(4, 64)
    assert np.array_equal(dequantize(quantize(rows, 30), 30, 64), rows)
    ties = np.array([[1.00390625, 1.01171875, -1.00390625, np.inf]], np.float32)  # halfway: to the even neighbour
    assert dequantize(quantize(ties, 30), 30, 4).tolist() == [[1.0, 1.015625, -1.0, np.inf]]


def test_only_one_copy_of_ggml_is_loaded() -> None:
    quantize(floats(1, 256), BY_NAME["Q4_K"].id)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libggml-base" in line}
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("name", "cols", "fitting"),
    [
        ("Q4_K", 512, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q5_K", 96, "Q5_1"), ("Q6_K", 96, "Q8_0"), ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 96, "Q4_0"), ("IQ4_XS", 96, "IQ4_NL"), ("Q4_K", 100, "F16"), ("Q8_0", 100, "F16"), ("F32", 7, "F32"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fill_blocks_fall_back(name: str, cols: int, fitting: str) -> None:
    assert type_name(fitting_type(BY_NAME[name].id, cols)) == fitting


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("IQ2_XXS", "IQ2_XXS needs an importance matrix"),
        ("IQ1_S", "IQ1_S needs an importance matrix"),
        ("Q4_K_M", "did you mean 'Q4_K'"),
        ("Q4K", "did you mean 'Q4_K'"),
        ("Q8_K", "cannot quantize to Q8_K"),
    ],
)
def test_impossible_types_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(UnknownName, match=says):
        target_type(name)


def test_values_a_type_cannot_store_are_refused() -> None:
    with pytest.raises(BadFile, match="'x': holds NaN"):
        requantize(np.full((1, 256), np.nan, np.float32).tobytes(), 0, 12, 256, "tensor 'x'")
    with pytest.raises(BadFile, match="holds 1e\\+06, and F16 stores at most 65504"):
        requantize(np.full((1, 256), 1e6, np.float32).tobytes(), 0, 1, 256, "tensor 'x'")
