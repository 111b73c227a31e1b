"""The quantizers of native/quantize.h give the bytes of ggml's, and are not used where they would not."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.convert import quantize as module
from moe_edge.convert.quantize import FAST_TYPES, is_fast, quantize, quantize_fast
from moe_edge.models.formats.ggml_types import find_type, row_bytes
from test_disk_source import COMPILER, said_by_check

SOURCES = ("tests/native/quantize_check.cpp", *(f"native/quantize{name}.cpp" for name in ("", "_avx2", "_avx512")))
PROCESSOR = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS_AVX2 = platform.machine() == "x86_64" and " avx2" in PROCESSOR and " fma" in PROCESSOR
NUMBERS = np.random.default_rng(7)
ROWS = NUMBERS.standard_t(3, (6, 768)).astype(np.float32)
IMPORTANCE = NUMBERS.random(768).astype(np.float32) + np.float32(0.01)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What is fast is asked anew in every test."""
    is_fast.cache_clear()
    yield
    is_fast.cache_clear()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: none of c++, g++ and clang++ is on the PATH")
@pytest.mark.parametrize(("sanitizer", "level"), [("plain", "-O2"), ("address", "-O1")])
def test_every_quantizer_gives_the_bytes_of_ggml(tmp_path: Path, sanitizer: str, level: str) -> None:
    said = said_by_check(tmp_path, SOURCES, ("ggml-base",), sanitizer, level)
    has_avx512 = HAS_AVX2 and all(f" avx512{each}" in PROCESSOR for each in ("f", "bw", "dq", "vl"))
    wanted = [8] * HAS_AVX2 + [16] * has_avx512
    for lanes in wanted:
        for name in FAST_TYPES:
            assert any(line.lower().startswith(f"{name.lower()}, {lanes} lanes: ") for line in said), (name, said)
    assert int(said[-1].split()[0]) >= 1_000_000 * len(wanted)


def by_ggml(monkeypatch: pytest.MonkeyPatch, kind: int) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fast", lambda: None)
        is_fast.cache_clear()
        assert not is_fast(kind)
        found = quantize(ROWS, kind, IMPORTANCE)
    is_fast.cache_clear()
    return found


@pytest.mark.parametrize("name", FAST_TYPES)
def test_quantize_uses_them_where_there_are_any(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = find_type(name).id
    calls = 0

    def counted(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return quantize_fast(*args)

    monkeypatch.setattr(module, "quantize_fast", counted)
    found = quantize(ROWS, kind, IMPORTANCE)
    assert calls == (2 if HAS_AVX2 else calls)  # the probe, and these rows
    assert found == by_ggml(monkeypatch, kind)


@pytest.mark.parametrize("name", FAST_TYPES)
def test_one_that_gives_other_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = find_type(name).id
    expected = by_ggml(monkeypatch, kind)

    def wrong(rows: Any, type_id: int, weights: Any, out: Any, *more: Any) -> int:
        written = quantize_fast(rows, type_id, weights, out, *more) or row_bytes(type_id, rows.shape[1]) * len(rows)
        out[written // 2] = bytes([out[written // 2][0] ^ 1])
        return written

    monkeypatch.setattr(module, "quantize_fast", wrong)
    assert not is_fast(kind)
    assert quantize(ROWS, kind, IMPORTANCE) == expected


def test_without_an_importance_ggml_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> int:
        raise AssertionError("these need an importance")

    monkeypatch.setattr(module, "quantize_fast", never)
    for name in ("Q2_K", "Q3_K", "Q4_K"):
        assert len(quantize(ROWS, find_type(name).id)) == 6 * row_bytes(find_type(name).id, 768)
