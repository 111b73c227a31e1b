"""Kernels that unpack a block of weights once for the rows of an expert give the bits of ggml's products.

Those of vec_dot for up to 7 rows, those of the tiled products from 8 on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from moe_edge.models.formats.ggml_types import BF16
from moe_edge.runner.capi import library
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits
from test_disk_source import COMPILER, said_by_check
from test_exact import some_tokens

SOURCES = (
    "tests/native/few_rows_check.cpp", "native/few_rows.cpp", "native/few_rows_avx2.cpp", "native/few_rows_avx512.cpp",
    "native/tiled_rows_avx512.cpp", "native/bf16_rows_avx512.cpp", "native/float_rows_avx512.cpp",
    "native/float_rows_avx2.cpp", "native/block_rows_avx512.cpp", "native/block_rows_avx2.cpp",
)  # fmt: skip
# Widths are multiples of 256, as blocks of K-quants are. Experts get 5 of 40 tokens on average, and 17 of 140.
SHAPE = Shape(n_layer=2, n_embd=256, n_ff=512, n_expert=24, n_used=3)


def flags() -> str:
    """What /proc/cpuinfo says of an x86-64 processor; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if platform.machine() == "x86_64" and file.exists() else ""


def has_avx2(flags_of_processor: str) -> bool:
    return " avx2" in flags_of_processor and " fma" in flags_of_processor


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: none of c++, g++ and clang++ is on the PATH")
@pytest.mark.parametrize(("sanitizer", "level"), [("plain", "-O2"), ("address", "-O1")])
def test_every_kernel_gives_the_bits_of_ggml(tmp_path: Path, sanitizer: str, level: str) -> None:
    said = said_by_check(tmp_path, SOURCES, ("ggml-base", "ggml-cpu"), sanitizer, level)
    flags_of_processor = flags()
    if has_avx2(flags_of_processor):
        assert "AVX2: q4_K q6_K" in said and int(said[-1].split()[0]) > 1000
        assert any(line.startswith("AVX2 floats: ") and "f16" in line and "bf16+" in line for line in said)
        used = next(line for line in said if line.startswith("used:")).split()
        assert {"bf16", "f16+", "q8_0+", "q4_0", "q5_0+", "iq4_nl", "mxfp4+", "mxfp4"} <= set(used)
    if " avx512_vnni" in flags_of_processor:
        assert "AVX-512: q4_K q4_K+ q6_K q6_K+" in said


@pytest.mark.parametrize("n_rows", [1, 2, 9, 100])
def test_the_library_multiplies_as_experts_are_multiplied(n_rows: int) -> None:
    """What `moe-edge doctor` times. BF16: no kernel for one row; else the products, out of 70 and 128 columns."""
    lib, drawn = library(), np.random.default_rng(3)
    weights, rows = (drawn.normal(size=(n, 128)).astype(np.float32) for n in (70, n_rows))
    packed = [np.ascontiguousarray((each.view(np.uint32) >> 16).astype(np.uint16)) for each in (weights, rows)]
    out = np.full((n_rows, 70), -1, np.float32)
    status = lib.me_multiply_rows(BF16, 128, 70, packed[0].ctypes.data, packed[1].ctypes.data, n_rows, out.ctypes.data)
    has_kernel = has_avx2(flags()) and n_rows > 1
    if status != 0:
        assert not has_kernel and (out == -1).all()
        return
    cut = [(each.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for each in packed]
    assert n_rows > 1 and np.allclose(out, cut[1] @ cut[0].T, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("few")

    def model(expert_type: str, down_type: str, shape: Shape = SHAPE) -> Path:
        path = folder / f"{expert_type}-{down_type}-{shape.n_ff}.gguf"
        if not path.exists():
            write_random_model(path, "qwen3moe", shape, expert_type=expert_type, down_type=down_type)
        return path

    return model


@pytest.mark.parametrize(("expert_type", "down_type"), [("Q4_K", "Q6_K"), ("Q6_K", "Q4_K")])
@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(40, 1), (40, 2), (140, 2)])
def test_the_logits_of_a_prompt_are_stocks_at_every_budget(
    made: Callable[[str, str], Path], expert_type: str, down_type: str, n_ubatch: int, n_threads: int
) -> None:
    check_a_prompt(made(expert_type, down_type), n_ubatch, n_threads)


def check_a_prompt(path: Path, n_ubatch: int, n_threads: int) -> None:
    tokens, n_ctx = some_tokens(n_ubatch + 7), 256 if n_ubatch <= 200 else 768
    stock = stock_logits(path, tokens, n_ubatch, n_threads, n_ctx=n_ctx)
    for budget in BUDGETS:
        with (
            open_engine(path, budget, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, logits_all=True) as engine,
            engine.decoding(),
        ):
            ours = logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, n_ubatch)
            assert (engine.counters().evictions > 0) == (budget != "resident")
        assert np.array_equal(ours, stock), budget


@pytest.mark.parametrize(
    ("expert_type", "down_type"),
    [
        ("BF16", "BF16"), ("F16", "BF16"), ("BF16", "Q6_K"), ("Q4_0", "F16"), ("Q8_0", "Q8_0"), ("MXFP4", "MXFP4"),
        ("IQ4_NL", "Q5_0"), ("Q5_1", "Q8_0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(40, 1), (140, 2), (600, 2)])
def test_so_are_those_of_types_without_tiled_products(
    made: Callable[..., Path], expert_type: str, down_type: str, n_ubatch: int, n_threads: int
) -> None:
    """Of 600 tokens an expert gets 75 on average: more than one graph of small groups takes."""
    check_a_prompt(made(expert_type, down_type), n_ubatch, n_threads)


@pytest.mark.parametrize(("expert_type", "down_type"), [("BF16", "F16"), ("Q4_0", "BF16"), ("Q8_0", "MXFP4")])
def test_hidden_rows_that_are_no_whole_steps_and_wider_than_all_else(
    made: Callable[..., Path], expert_type: str, down_type: str
) -> None:
    """544 columns are left to ggml; 2,304 hidden ones of 256 take more room than the input and the output."""
    for n_ff in (544, 2304):
        shape = Shape(n_layer=2, n_embd=256, n_ff=n_ff, n_expert=4, n_used=2)
        check_a_prompt(made(expert_type, down_type, shape), 200, 2)
