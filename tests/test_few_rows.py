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
    "native/tiled_rows_avx512.cpp",
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
    if platform.machine() == "x86_64" and " avx512_vnni" in flags_of_processor:
        assert "AVX-512: q4_K q4_K+ q6_K q6_K+" in said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("few")

    def model(expert_type: str, down_type: str) -> Path:
        path = folder / f"{expert_type}-{down_type}.gguf"
        if not path.exists():
            write_random_model(path, "qwen3moe", SHAPE, expert_type=expert_type, down_type=down_type)
        return path

    return model


@pytest.mark.parametrize(("expert_type", "down_type"), [("Q4_K", "Q6_K"), ("Q6_K", "Q4_K")])
@pytest.mark.parametrize(("n_ubatch", "n_threads"), [(40, 1), (40, 2), (140, 2)])
def test_the_logits_of_a_prompt_are_stocks_at_every_budget(
    made: Callable[[str, str], Path], expert_type: str, down_type: str, n_ubatch: int, n_threads: int
) -> None:
    path, tokens = made(expert_type, down_type), some_tokens(n_ubatch + 7)
    stock = stock_logits(path, tokens, n_ubatch, n_threads, n_ctx=256)
    for budget in BUDGETS:
        with (
            open_engine(path, budget, n_ctx=256, n_ubatch=n_ubatch, n_threads=n_threads, logits_all=True) as engine,
            engine.decoding(),
        ):
            ours = logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, n_ubatch)
            assert (engine.counters().evictions > 0) == (budget != "resident")
        assert np.array_equal(ours, stock), budget
