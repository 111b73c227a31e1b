"""Quantizing is ggml's own; what a type cannot hold is refused or falls back as in llama.cpp."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import (
    floats,
)
from moe_edge.convert.quantize import (
    NEED_IMATRIX,
    TARGETS,
    dequantize,
    fitting_type,
    prepare,
    quantize,
    requantize,
    target_type,
)
from moe_edge.models.errors import (
    BadFile,
    UnknownName,
    UsageError,
)
from moe_edge.models.formats.ggml_types import BY_NAME, type_name

BLOCKS = [name for name in (*TARGETS, *NEED_IMATRIX) if name not in ("F32", "F16", "BF16")]


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
        ("IQ2_XXS", 96, "IQ4_NL"), ("IQ1_M", 100, "F16"),
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
    with pytest.raises(BadFile, match="holds 1e\\+06, and IQ3_S stores at most 65504"):
        quantize(np.full((1, 256), 1e6, np.float32), BY_NAME["IQ3_S"].id)


@pytest.mark.parametrize("name", NEED_IMATRIX)
def test_types_that_need_an_importance_work_with_one(name: str) -> None:
    kind = target_type(name, with_imatrix=True)
    rows, importance = floats(3, 512), np.abs(floats(512)) + 0.1
    raw = np.frombuffer(quantize(rows, kind.id, importance), np.uint8).reshape(3, -1)
    read = dequantize(raw.tobytes(), kind.id, 512)
    assert np.array_equal(read, gguf.dequantize(raw, kind.id).reshape(3, 512))
    assert np.square(read - rows).sum() < np.square(rows).sum() / 2
    with pytest.raises(UsageError, match=f"{name} needs the importance of 512 columns"):
        quantize(rows, kind.id)
    with pytest.raises(UnknownName):
        target_type(name)


def test_columns_of_importance_are_stored_better() -> None:
    rows, importance = floats(32, 256), np.full(256, 0.01, np.float32)
    importance[::4] = 10
    for name in ("Q2_K", "Q4_K", "IQ4_XS", "IQ2_XS"):
        kind = BY_NAME[name].id
        errors = [
            np.square(dequantize(quantize(rows, kind, each), kind, 256) - rows)[:, ::4].sum()
            for each in (np.ones(256, np.float32), importance)
        ]
        assert errors[1] < 0.9 * errors[0], (name, errors)


@pytest.mark.parametrize("name", BLOCKS)
def test_scale_of_importance_changes_nothing(name: str) -> None:
    kind, rows, importance = BY_NAME[name].id, floats(2, 256), np.abs(floats(256)) + 0.1
    whole = quantize(rows, kind, importance)
    assert quantize(rows, kind, importance * 2**100) == quantize(rows, kind, importance * 2**-100) == whole


@pytest.mark.parametrize("name", BLOCKS)
def test_no_importance_makes_ggml_abort(name: str) -> None:
    kind, rows = BY_NAME[name].id, floats(2, 512) * 1000
    rows[:, 256:300] = 0
    sparse, spike = np.zeros((2, 512), np.float32)
    sparse[::7], spike[3] = 1e-30, 3e38
    for importance in (np.zeros(512, np.float32), sparse, spike, np.full(512, 1e-45, np.float32)):
        assert np.isfinite(dequantize(quantize(rows, kind, importance), kind, 512)).all()
    assert quantize(rows, kind, np.zeros(512, np.float32)) == quantize(rows, kind, np.ones(512, np.float32))


@pytest.mark.parametrize(
    ("importance", "says"),
    [
        (np.ones(255), "has shape [255], expected one number for each of 256 columns"),
        (np.ones((1, 256)), "has shape [1, 256]"),
        (np.full(256, np.nan), "not finite or negative"),
        (np.full(256, np.inf), "not finite or negative"),
        (np.full(256, -1.0), "not finite or negative"),
    ],
)
def test_importance_that_is_none_is_refused(importance: np.ndarray, says: str) -> None:
    with pytest.raises(BadFile) as caught:
        quantize(floats(1, 256), BY_NAME["Q4_K"].id, importance)
    assert says in str(caught.value)


def test_threads_quantize_with_importance_alike() -> None:
    rows, importance = floats(8, 256), np.abs(floats(256))
    kinds = [BY_NAME[name].id for name in ("IQ2_XXS", "IQ3_XXS", "Q4_K")] * 8
    prepare(set(kinds))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda kind: quantize(rows, kind, importance), kinds))
    assert together == [quantize(rows, kind, importance) for kind in kinds]
