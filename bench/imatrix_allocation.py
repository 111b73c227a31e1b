"""What an importance matrix alone is worth for sharing out bits: KLD on held-out text against the full calibration.

python bench/imatrix_allocation.py tiny-moe --calibrate calibration.txt --text heldout.txt --out DIR

Converts the model four ways at each number of bits: types by the full calibration, by the same with types tried on a
few rows of each matrix (as is done for large models), by an importance matrix alone (written here, as llama-imatrix
would, from the same tokens), and spread evenly. Prints the KLD of each from the source's weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.convert import type_damage
from moe_edge.convert.checkpoints import open_source
from moe_edge.convert.conversion_plan import ExpertTypes
from moe_edge.convert.convert import convert
from moe_edge.convert.imatrix import read_imatrix
from moe_edge.convert.stacked import write_stacked
from moe_edge.models.formats.ggml_types import F32
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, kv_string, kv_strings, kv_u32
from moe_edge.runner.calibrate.by_imatrix import types_by_imatrix
from moe_edge.runner.calibrate.calibrate import CalibrateOptions, Calibrator
from moe_edge.runner.calibrate.observe import spread_chunks
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import eval_options
from moe_edge.runner.measure.logits import ReferenceLogits, bos_token, cut_chunks, read_text, tokenize_text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="3,4")
    parser.add_argument("--rows", type=int, default=16, help="of each matrix, to try types on")
    parser.add_argument("--chunks", type=int, default=12, help="of 512 held-out tokens")
    o = parser.parse_args(arguments)
    o.out.mkdir(parents=True, exist_ok=True)
    source = o.source
    if open_source(source).is_checkpoint:
        source = o.out / "source.gguf"
        if not source.exists():
            write_stacked(o.source, source, "BF16")
    made = make_models(source, o.calibrate, o.out, [float(each) for each in o.bits.split(",")], o.rows)
    klds = measure(source, made, o.text, o.chunks)
    for name, (mean, error) in klds.items():
        print(f"{name:24} KLD {mean:.5f} +- {error:.5f}")
    print(json.dumps({name: mean for name, (mean, _) in klds.items()}))
    return 0


def make_models(source: Path, text: Path, out: Path, bits: Sequence[float], rows: int) -> dict[str, Path]:
    """`how-bits` -> converted model."""
    made: dict[str, Path] = {}
    with Calibrator(source, out, CalibrateOptions(text, settings_tokens=0, n_threads=2), say) as calibrator:
        matrix = write_imatrix(calibrator, out / "imatrix.gguf")
        chosen: dict[str, Any] = {}
        for each in bits:
            chosen[f"full-{each:g}"] = calibrator.allocate(each)
            chosen[f"uniform-{each:g}"] = calibrator.allocate(each, "uniform")
        chosen |= sampled(calibrator, bits, rows)
        for name, homes in chosen.items():
            made[name] = out / f"{name}.gguf"
            convert(source, made[name], types=ExpertTypes(homes=homes), importance=calibrator.importance,
                    overwrite=True)  # fmt: skip
    importance = read_imatrix(matrix).expert_importance(open_source(source).layers)
    for each in bits:
        types = types_by_imatrix(source, matrix, ExpertTypes(), None, bits=each, low_bits=None, core_hours=1e6)
        made[f"imatrix-{each:g}"] = out / f"imatrix-{each:g}.gguf"
        convert(source, made[f"imatrix-{each:g}"], types=types, importance=importance, overwrite=True)
    return made


def sampled(calibrator: Calibrator, bits: Sequence[float], rows: int) -> dict[str, Any]:
    """The full calibration's choice, had the matrices been large; prints how far the errors are off."""
    whole = calibrator.errors()
    before = type_damage.WHOLE_WEIGHTS, type_damage.SAMPLED_WEIGHTS, type_damage.LEAST_ROWS
    type_damage.WHOLE_WEIGHTS, type_damage.SAMPLED_WEIGHTS, type_damage.LEAST_ROWS = 0, 0, rows
    try:
        found: dict[tuple[int, int], Any] = {}
        for layer, view in calibrator._layers():
            for path in calibrator._kept.folder.glob("errors-*"):
                path.unlink()
            found |= calibrator._layer_errors(layer, view)
    finally:
        type_damage.WHOLE_WEIGHTS, type_damage.SAMPLED_WEIGHTS, type_damage.LEAST_ROWS = before
    for p in ("gate", "up", "down"):
        ratios = np.array([
            [found[key].single[p][kind] / each.single[p][kind] for kind in each.single[p]]
            for key, each in whole.items() if each.removed > 0
        ])  # fmt: skip
        print(f"{p}: errors by {rows} rows over those by all: mean {ratios.mean():.3f}, spread {ratios.std():.3f}")
    calibrator._errors = found
    chosen = {f"sampled-{each:g}": calibrator.allocate(each) for each in bits}
    calibrator._errors = dict(whole)
    return chosen


def write_imatrix(calibrator: Calibrator, path: Path) -> Path:
    """As llama-imatrix would write it of the same tokens: sums of squares, each token alike, and counts."""
    tensors: dict[str, np.ndarray] = {}
    for layer, view in calibrator._layers():
        counts = np.bincount(view.experts.ravel(), minlength=layer.n_expert)
        sums: dict[str, list[np.ndarray]] = {p: [] for p in layer.projections}
        for expert in range(layer.n_expert):
            x, g = view.rows_of(expert)
            hidden = type_damage.expert_hidden(
                x, calibrator._weights.of(layer, expert), type_damage.find_activation(
                    calibrator.source.architecture.name, "")
            )  # fmt: skip
            found = type_damage.column_importance(x, hidden)
            for p in layer.projections:
                sums[p].append(found.of(p) * len(g))
        for p in layer.projections:
            name = f"blk.{layer.layer}.ffn_{p}_exps.weight"
            tensors[f"{name}.in_sum2"] = np.stack(sums[p]).astype("<f4")
            tensors[f"{name}.counts"] = counts.astype("<f4")[:, None]
    kvs = {
        "general.type": kv_string("general.type", "imatrix"),
        "imatrix.datasets": kv_strings("imatrix.datasets", ["calibration"]),
        "imatrix.chunk_count": kv_u32("imatrix.chunk_count", 32),
        "imatrix.chunk_size": kv_u32("imatrix.chunk_size", 512),
    }  # fmt: skip
    specs = [TensorSpec(name, tuple(reversed(v.shape)), F32, v.nbytes) for name, v in tensors.items()]
    path.unlink(missing_ok=True)
    with GGUFOutput(path, kvs, specs) as output:
        for values in tensors.values():
            output.write(values.tobytes())
        output.finish()
        output.commit()
    return path


def measure(source: Path, made: Mapping[str, Path], text: Path, n_chunks: int) -> dict[str, tuple[float, float]]:
    """Name -> KLD from the source on held-out text spread over the file, and its standard error."""
    found = {}
    with ReferenceLogits() as kept:
        with Engine(source, eval_options(source, EngineOptions(n_threads=2), 512)) as engine:
            tokens = tokenize_text(engine, read_text(text))
            chunks = spread_chunks(cut_chunks(tokens, 512, bos=bos_token(engine)), n_chunks * 512)
            kept.keep(engine, chunks)
        for name, path in made.items():
            with Engine(path, eval_options(path, EngineOptions(n_threads=2), 512)) as engine:
                kld = kept.kld(engine, chunks)
            found[name] = float(kld.mean()), float(kld.std() / np.sqrt(len(kld)))
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
