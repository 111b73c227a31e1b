"""Quantizing to the types that a calibration chooses from: ggml's quantizers and ours (native/quantize.h), in turns.

python bench/quantizers.py [--threads 1] [--rounds 5]

Random rows of 2,048 weights with an importance. Prints million weights a second of all threads together, the median of
the rounds and their spread; types that have no quantizer of ours have ggml's alone. Their bytes are compared as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from moe_edge.convert.quantize import is_fast, prepare, quantize, quantize_by_ggml
from moe_edge.models.formats.ggml_types import find_type
from moe_edge.runner.calibrate.calibrate import DEFAULT_TYPES

ROWS, COLS = 64, 2048


def speed(work: Callable[[], object], threads: int) -> float:
    """Million weights a second of so many threads at it."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: work(), range(threads)))
        return threads * ROWS * COLS / 1e6 / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args(arguments)
    numbers = np.random.default_rng(0)
    rows = (0.02 * numbers.standard_normal((ROWS, COLS))).astype(np.float32)
    importance = numbers.random(COLS).astype(np.float32) + np.float32(0.1)
    print(f"{o.threads} threads, {o.rounds} rounds in turns, million weights a second: median (least to most)")
    for name in DEFAULT_TYPES:
        kind = find_type(name).id
        prepare({kind})
        arms = {"ggml": lambda kind=kind: quantize_by_ggml(rows, kind, importance)}
        if is_fast(kind):
            arms["ours"] = lambda kind=kind: quantize(rows, kind, importance)
            assert arms["ggml"]() == arms["ours"](), f"{name}: the bytes differ"
        found: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(o.rounds):
            for arm, work in arms.items():
                found[arm].append(speed(work, o.threads))
        said = [f"{arm} {statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for arm, v in found.items()]
        if "ours" in found:
            said.append(f"{statistics.median(found['ours']) / statistics.median(found['ggml']):.1f}x")
        print(f"{name}: {', '.join(said)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
