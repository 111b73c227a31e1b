"""A prompt unpacks what it reads, once, on the threads that read: counted, with and without a packed cache."""

from __future__ import annotations

import ctypes
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_edge.models.store.store import open_model
from moe_edge.runner import native
from moe_edge.runner.zstd import zstd_functions
from moe_edge.schedulers.layout import Routing
from test_exact import some_tokens
from test_packed_cache import engine_with, packed_model

Decompress = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)


@pytest.mark.parametrize(("share", "asked"), [(0.25, "off"), (0.6, "off"), (0.4, "70%"), (0.6, "85%")])
@pytest.mark.parametrize("n_ubatch", [64, 320])
def test_each_touched_expert_is_unpacked_once_a_micro_batch_at_most(
    tmp_path: Path, share: float, asked: str, n_ubatch: int
) -> None:
    _, packed = packed_model(tmp_path, "BF16")
    engine = engine_with(packed, share, asked, n_ubatch=n_ubatch)
    unit_bytes = sum(piece.nbytes for piece in open_model(packed).pieces[:3])
    touched: list[int] = []
    unpacked: list[int] = []

    def note(_layer: int, routing: Routing, _x: Any) -> None:
        touched.append(len(np.unique(routing.experts)))
        unpacked.append(engine.counters().unpacked_bytes // unit_bytes)

    with engine, engine.decoding():
        engine.native.observe = note
        engine.llama.eval(some_tokens(320))
        c = engine.counters()
    n_layers, steps = 3, len(touched)
    assert steps == n_layers * (320 // n_ubatch) and sum(touched) == c.uses
    # What was read, ahead or not, was unpacked once, and what was in memory not at all. Of what is read ahead and not
    # asked for, a read may be given up before it is unpacked.
    assert (c.loads + c.prefetch_useful) * unit_bytes <= c.unpacked_bytes <= (c.loads + c.prefetched) * unit_bytes
    assert c.hits == c.uses - c.loads and c.evictions > 0
    # In each micro-batch no more than it touched, but for what was read ahead and then not asked for.
    before = [*unpacked[::n_layers], c.unpacked_bytes // unit_bytes]
    wasted = c.prefetched - c.prefetch_useful
    for at, (start, end) in enumerate(pairwise(before)):
        assert end - start <= sum(touched[at * n_layers : (at + 1) * n_layers]) + wasted


@pytest.mark.parametrize("asked", ["off", "70%"])
def test_the_thread_that_computes_unpacks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    _, packed = packed_model(tmp_path, "BF16", "zstd")
    create, free, decompress, is_error = zstd_functions()
    really, threads = Decompress(decompress), list[int]()

    def note(*arguments: Any) -> int:
        threads.append(threading.get_native_id())
        return int(really(*arguments))

    noted = Decompress(note)
    address = ctypes.cast(noted, ctypes.c_void_p).value or 0
    monkeypatch.setattr(native, "zstd_functions", lambda: (create, free, address, is_error))
    with engine_with(packed, 0.5, asked, n_ubatch=64) as engine, engine.decoding():
        engine.llama.eval(some_tokens(160))
        for token in some_tokens(30):
            engine.llama.eval([token])
    assert len(threads) > 300 and threading.get_native_id() not in threads
    assert 1 < len(set(threads)) <= 8  # four that read; four more for what is in memory packed


@pytest.fixture(autouse=True)
def zstd_again(tmp_path: Path) -> Any:
    """The library keeps the functions it was given last: those of a test end with it."""
    yield
    packed = tmp_path / "m.gguf"
    engine_with(packed, 0.5, "off").close()
