"""Is moe-edge exact with the libraries installed here? Run with the folder of tests/reference.py as first argument.

    python3 exact_here.py FOLDER

All logits of prompts of several lengths, from the embedded model, at the floor of memory, halfway and with everything
resident, against stock llama.cpp's own loader and decode in the same process. Prints one line a setting; exits with 1
when a bit differs or when a budget that should force evictions did not.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, sys.argv[1])

import numpy as np
from moe_edge.models.embedded import tiny_model_path
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.llama_package import llama_build
from moe_edge.runner.sizes import NO_LIMIT
from reference import logits_of_context, stock_logits

LENGTHS, N_CTX = (1, 9, 65), 256
SETTINGS = ((8, 1), (64, 2))  # micro-batch, threads


def main() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama.cpp's log
    path = tiny_model_path()
    failed = False
    for n_ubatch, n_threads in SETTINGS:
        tokens = [[int(t) for t in np.random.default_rng(n).integers(0, 255, n)] for n in LENGTHS]
        stock = [stock_logits(path, each, n_ubatch, n_threads, n_ctx=N_CTX) for each in tokens]
        engine = _engine(path, n_ubatch, n_threads, NO_LIMIT)
        floor, resident = engine.plan.floor_bytes, engine.plan.resident_bytes
        engine.close()
        for name, ram in (("floor", floor), ("middle", (floor + resident) // 2), ("resident", resident)):
            engine = _engine(path, n_ubatch, n_threads, ram)
            with engine, engine.decoding():
                llama = engine.llama
                ours = [logits_of_context(llama._ctx.ctx, llama._model.model, each, n_ubatch) for each in tokens]
                evictions = engine.counters().evictions
            same = all(np.array_equal(a, b) for a, b in zip(ours, stock, strict=True))
            forced = (evictions > 0) == (name != "resident")
            failed |= not (same and forced)
            print(f"{llama_build()}: {name}, micro-batch {n_ubatch}, {n_threads} threads, {evictions} evictions: "
                  f"{'the bits of stock' if same else 'DIFFERS from stock'}", flush=True)  # fmt: skip
    sys.exit(int(failed))


def _engine(path: object, n_ubatch: int, n_threads: int, ram: int) -> Engine:
    options = EngineOptions(ram_bytes=ram, n_ctx=N_CTX, n_ubatch=n_ubatch, n_threads=n_threads, logits_all=True)
    return Engine(path, options)  # type: ignore[arg-type]


main()
