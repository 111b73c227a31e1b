"""Pages of 4, 16 and 64 KiB: Raspberry Pi 5 and Apple silicon have the second, some ARM servers the third.

The size is injected where everything takes it from, `memory.page_bytes()`, since the machine keeps its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import BUDGETS, open_engine
from moe_edge.models.errors import MissingFile
from moe_edge.models.store.store import open_model
from moe_edge.runner import memory
from moe_edge.runner.native import NativeModel
from reference import logits_of_context, stock_logits
from test_disk_source import COMPILER, FLAGS, ROOT, SANITIZERS, run, skip_without_runtime
from test_exact import some_tokens

PAGES = [size for size in (4096, 16384, 65536) if size >= os.sysconf("SC_PAGESIZE")]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: none of c++, g++ and clang++ is on the PATH")
def test_arena_and_reader_keep_their_books_in_pages_of_any_size(tmp_path: Path) -> None:
    sources = ("tests/native/pages_check.cpp", "native/pages.cpp", "native/arena.cpp", "native/disk_source.cpp")
    program, flags = tmp_path / "pages_check", [*FLAGS, *SANITIZERS["address"]]
    done = run(str(COMPILER), *flags, "-I", ROOT / "native", *(ROOT / each for each in sources), "-o", program)
    if done.returncode != 0:
        skip_without_runtime(tmp_path, "address")
    assert done.returncode == 0, done.stderr
    for size in PAGES:
        checked = run(program, tmp_path, str(size))
        if checked.returncode != 0:
            skip_without_runtime(tmp_path, "address")
        assert checked.returncode == 0 and checked.stdout.startswith("ok"), checked.stdout + checked.stderr


@pytest.mark.parametrize("size", PAGES)
def test_the_bits_are_stocks_and_the_budget_holds_in_pages_of_any_size(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(memory, "page_bytes", lambda: size)
    path, tokens = random_model("qwen3moe"), some_tokens(70)
    stock = stock_logits(path, tokens, 32, 1, n_ctx=128)
    for budget in BUDGETS:
        with (
            open_engine(path, budget, n_ctx=128, n_ubatch=32, n_threads=1, logits_all=True) as engine,
            engine.decoding(),
        ):
            assert all(unit % size == 0 for unit in engine.layout.unit_bytes)
            ours = logits_of_context(engine.llama._ctx.ctx, engine.llama._model.model, tokens, 32)
            c = engine.counters()
            assert c.committed_bytes % size == 0 and 0 < c.committed_bytes <= engine.plan.arena_bytes
            assert (c.evictions > 0) == (budget != "resident")
        assert np.array_equal(ours, stock)


def test_larger_pages_make_larger_units_and_a_higher_floor(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    floors, units, sizes = [], [], []
    model = open_model(random_model("qwen3moe"))
    for size in PAGES:
        monkeypatch.setattr(memory, "page_bytes", lambda size=size: size)
        native = NativeModel(model)
        units.append(native.unit_bytes())
        native.close()
        with open_engine(random_model("qwen3moe"), "floor", n_ctx=128, n_ubatch=32, n_threads=1) as engine:
            floors.append(engine.plan.floor_bytes)
            sizes.append(engine.layout.unit_bytes)
    assert units == sizes
    for smaller, larger, size in zip(units, units[1:], PAGES[1:], strict=False):
        assert larger == tuple(-(-unit // size) * size for unit in smaller)
    assert floors == sorted(floors)


def test_reads_are_aligned_to_the_blocks_of_the_disk_and_not_to_the_page(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece starts anywhere in a page of 16 KiB: the bytes that are read do not grow with the page."""
    read = []
    for size in PAGES:
        monkeypatch.setattr(memory, "page_bytes", lambda size=size: size)
        with open_engine(random_model("olmoe"), "resident", n_ctx=128, n_ubatch=32, n_threads=1) as engine:
            engine.native.preload(range(engine.native.n_units))
            read.append(engine.counters().bytes_read)
            assert engine.counters().direct_files == _takes_direct_reads(random_model("olmoe"))
    assert read[0] > 0 and len(set(read)) == 1


def _takes_direct_reads(path: Path) -> int:
    try:
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
    except OSError:
        return 0
    return 1


@pytest.mark.parametrize("size", [1024, 5000, 3 * 65536])
def test_a_page_that_no_system_has_is_refused(
    random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(memory, "page_bytes", lambda: size)
    with pytest.raises(MissingFile, match=f"pages of {size} bytes cannot be had: the system has pages of"):
        NativeModel(open_model(random_model("olmoe")))


def test_the_page_size_has_one_place() -> None:
    """Nothing else in the package asks the system, but for what speaks of the machine's own pages with mincore()."""
    rooms = [ROOT / room for room in ("convert", "models", "schedulers", "runner", "native")]
    grep = shutil.which("grep")
    if grep is None:
        pytest.skip("no grep on the PATH")
    found = subprocess.run(
        [grep, "-rlE", "SC_PAGESIZE|SC_PAGE_SIZE|getpagesize|mmap.PAGESIZE|mmap.ALLOCATIONGRANULARITY", *rooms,
         "--include=*.py", "--include=*.cpp", "--include=*.h"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert {Path(p).name for p in found.stdout.split()} == {"memory.py", "pages.cpp", "probe.py"}
