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
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits
from test_disk_source import COMPILER, said_by_check
from test_exact import some_tokens

SOURCES = (
    "tests/native/few_rows_check.cpp", "native/few_rows.cpp", "native/few_rows_avx2.cpp", "native/few_rows_avx512.cpp",
    "native/tiled_rows_avx512.cpp", "native/bf16_rows_avx512.cpp", "native/float_rows_avx512.cpp",
    "native/float_rows_avx2.cpp",
)  # fmt: skip
# Widths are multiples of 256, as blocks of K-quants are. Experts get 5 of 40 tokens on average, and 17 of 140.
SHAPE = Shape(n_layer=2, n_embd=256, n_ff=512, n_expert=24, n_used=3)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: none of c++, g++ and clang++ is on the PATH")
@pytest.mark.parametrize(("sanitizer", "level"), [("plain", "-O2"), ("address", "-O1")])
def test_every_kernel_gives_the_bits_of_ggml(tmp_path: Path, sanitizer: str, level: str) -> None:
    said = said_by_check(tmp_path, SOURCES, ("ggml-base", "ggml-cpu"), sanitizer, level)
    flags_of_processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if platform.machine() == "x86_64" and " avx2" in flags_of_processor and " fma" in flags_of_processor:
        assert "AVX2: q4_K q6_K" in said and int(said[-1].split()[0]) > 1000
        assert any(line.startswith("AVX2 floats: ") and "f16" in line and "bf16+" in line for line in said)
        assert next(line for line in said if line.startswith("used:")).endswith(" bf16 bf16+")
    if platform.machine() == "x86_64" and " avx512_vnni" in flags_of_processor:
        assert "AVX-512: q4_K q4_K+ q6_K q6_K+" in said


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
    ("expert_type", "down_type"), [("BF16", "BF16"), ("F16", "BF16"), ("BF16", "Q6_K"), ("Q4_0", "F16")]
)
@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(40, 1), (140, 2), (600, 2)])
def test_so_are_those_of_experts_in_bf16_and_f16(
    made: Callable[..., Path], expert_type: str, down_type: str, n_ubatch: int, n_threads: int
) -> None:
    """Of 600 tokens an expert gets 75 on average: more than one graph of small groups takes."""
    check_a_prompt(made(expert_type, down_type), n_ubatch, n_threads)


@pytest.mark.parametrize(("expert_type", "down_type"), [("BF16", "F16"), ("BF16", "BF16")])
def test_hidden_rows_that_are_no_whole_steps_and_wider_than_all_else(
    made: Callable[..., Path], expert_type: str, down_type: str
) -> None:
    """544 columns are left to ggml; 2,304 hidden ones of 256 take more room than the input and the output."""
    for n_ff in (544, 2304):
        shape = Shape(n_layer=2, n_embd=256, n_ff=n_ff, n_expert=4, n_used=2)
        check_a_prompt(made(expert_type, down_type, shape), 200, 2)
