"""Is the low level of an expert as good when it is a prefix of the high one's bits? KLD of both, and their sizes.

    python bench/nested.py ../shared/models/tiny-moe --text ../shared/models/texts/heldout.txt --chunks 16

A nested pair stores the high level in two parts: the leading bits of its quants, which are a low level by themselves,
and the rest. Promoting an expert then reads only the rest. Two pairs:

Q8_0 -> 4 bits: q = 16 h + r with h in -8..7 and r in -8..7; the scale is chosen so that no q is above 119, its sign so
that the largest value is the negative one. The low part is a Q4_0 block, 18 of the 34 bytes.
Q6_K -> 4 bits: the upper four of each quant's six bits, with the block's own 16 scales; no ggml type has that form.

Each is compared with what ggml's quantizer makes of the same weights at as many bits: Q4_0, and Q4_K. All are measured
as float experts of the same values, so that no kernel's rounding counts; against the source's own BF16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from moe_edge.convert import quantize as quantizer
from moe_edge.convert.convert import convert
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.ggml_types import BY_NAME, F16
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import evaluate

BLOCK = 32
Values = Callable[[FloatArray], FloatArray]


def nested_q8(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(high, low) values of (n_rows, n_cols) weights as a nested pair of Q8_0 and 4 bits."""
    blocks = rows.reshape(-1, BLOCK).astype(np.float64)
    most, least = blocks.max(axis=1), blocks.min(axis=1)
    sign = np.where(most > -least, -1.0, 1.0)  # times which the largest magnitude is negative
    flipped = blocks * sign[:, None]
    scale = np.maximum(-flipped.min(axis=1) / 128, flipped.max(axis=1) / 119)
    scale = np.where(scale > 0, scale, 1.0).astype(np.float16).astype(np.float64)
    q = np.clip(np.rint(flipped / scale[:, None]), -128, 119)
    h = np.floor((q + 8) / 16)
    assert h.min() >= -8 and h.max() <= 7
    factor = (sign * scale)[:, None]
    high, low = q * factor, 16 * h * factor
    return high.reshape(rows.shape).astype(np.float32), low.reshape(rows.shape).astype(np.float32)


def prefix_of_q6_k(rows: FloatArray) -> FloatArray:
    """What the upper four bits of each Q6_K quant say: 4 x floor(q / 4) + 2 in the middle of the step, q in -32..31."""
    kind = BY_NAME["Q6_K"]
    data = np.frombuffer(quantizer.quantize(rows, kind.id), np.uint8).reshape(-1, 210)
    scales = data[:, 192:208].view(np.int8).astype(np.float64)  # of 16 quants each
    d = data[:, 208:210].copy().view(np.float16).astype(np.float64)
    exact = quantizer.dequantize(data.tobytes(), kind.id, 256).astype(np.float64)
    step = np.repeat(scales * d, 16, axis=1)
    q = np.rint(np.divide(exact, step, out=np.zeros_like(exact), where=step != 0))
    low = (4 * np.floor(q / 4) + 1.5) * step
    values: FloatArray = low.reshape(rows.shape).astype(np.float32)
    return values


def direct(name: str) -> Values:
    def values(rows: FloatArray) -> FloatArray:
        kind = BY_NAME[name].id
        return quantizer.dequantize(quantizer.quantize(rows, kind), kind, rows.shape[1])

    return values


PAIRS: dict[str, tuple[float, Values]] = {  # name -> (bits a weight, what the weights become)
    "Q8_0": (8.5, direct("Q8_0")),
    "nested Q8_0": (8.5, lambda rows: nested_q8(rows)[0]),
    "Q4_0": (4.5, direct("Q4_0")),
    "prefix of nested Q8_0": (4.5, lambda rows: nested_q8(rows)[1]),
    "Q6_K": (6.5625, direct("Q6_K")),
    "Q4_K": (4.5, direct("Q4_K")),
    "prefix of Q6_K": (4.5625, prefix_of_q6_k),
}


def converted(source: Path, out: Path, values: Values | None) -> Path:
    """A model whose experts are float16 of what `values` makes of them; without: the source's own, as bfloat16."""
    original = quantizer.quantize

    def patched(rows: FloatArray, type_id: int, importance: FloatArray | None = None) -> bytes:
        return original(values(rows) if type_id == F16 and values else rows, type_id, importance)

    quantizer.quantize = patched
    try:
        convert(source, out, "F16" if values else "BF16", threads=1)
    finally:
        quantizer.quantize = original
    return out


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, help="a checkpoint with float experts")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--chunks", type=int, default=16)
    p.add_argument("--threads", type=int, default=1)
    o = p.parse_args()
    print("| experts | bits | mean KLD |\n|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory(prefix="moe-edge-nested-") as name:
        folder = Path(name)
        base = converted(o.source, folder / "base.gguf", None)
        for kind, (bits, values) in PAIRS.items():
            model = converted(o.source, folder / "model.gguf", values)
            result = evaluate(model, o.text, EngineOptions(n_threads=o.threads), reference=base, n_chunks=o.chunks)
            assert result.kld_mean is not None
            found[kind] = result.kld_mean
            print(f"| {kind} | {bits} | {found[kind]:.3e} |", flush=True)
            for path in folder.glob("model*"):
                path.unlink()
    for low, plain in (("prefix of nested Q8_0", "Q4_0"), ("prefix of Q6_K", "Q4_K")):
        print(f"{low} / {plain}: {found[low] / found[plain]:.2f}x the KLD")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
