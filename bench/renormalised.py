"""A trained model whose router normalises the chosen gate weights, made of one whose router does not.

    python bench/renormalised.py tiny-moe.gguf out.gguf --text calibration.txt
    python bench/renormalised.py MODEL.gguf --text calibration.txt      # what dropping and replacing cost in a model

OLMoE's graph with normalised weights is llama.cpp's minimax-m2, softmax for its sigmoid and a selection bias of zero.
The experts of each layer get the mean of what a token's weights summed up to, measured on the text, so that the layer's
output keeps its size. What comes out is another model, close to the first, and its own reference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from moe_edge.convert.quantize import dequantize, quantize
from moe_edge.models.errors import MoeEdgeError, UnknownName
from moe_edge.models.formats.floats import Float64Array, FloatArray
from moe_edge.models.formats.ggml_types import F32
from moe_edge.models.formats.gguf import GGUFFile, TensorEntry, read_gguf
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.write import GGUFOutput, TensorSpec, encode_kv, kv_string, kv_u32
from moe_edge.runner.calibrate.calibrate import CalibrateOptions, Calibrator
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.logits import read_text
from moe_edge.runner.measure.record import record_trace
from moe_edge.schedulers.policies.gates import gate_weights_of

FROM, TO = "olmoe", "minimax-m2"
SOFTMAX = 1  # of llama.cpp's gating functions
DOWN = "ffn_down_exps.weight"


def weight_sums(model: Path, text: Path, n_tokens: int) -> list[float]:
    """Of each layer the mean of what a token's gate weights sum up to."""
    with Engine(model, EngineOptions(n_ctx=256, n_ubatch=256, n_threads=1)) as engine:
        trace = record_trace(engine, read_text(text), n_tokens, one_by_one=False)
    there = trace.experts[:, :, 0] >= 0
    sums = trace.weights.astype(np.float64).sum(-1)
    return [float(sums[there[:, layer], layer].mean()) for layer in range(trace.n_layers)]


def renormalise(source: Path, out: Path, sums: Sequence[float]) -> None:
    """Write the model. sums: by layer. Raises UnknownName for another architecture than OLMoE's."""
    file = read_gguf(source)
    if file.kv["general.architecture"] != FROM:
        raise UnknownName(f"{source}: is {file.kv['general.architecture']}; worked out for {FROM} only")
    n_expert = int(file.kv[f"{FROM}.expert_count"])
    biases = [TensorSpec(f"blk.{i}.exp_probs_b.bias", (n_expert,), F32, 4 * n_expert) for i in range(len(sums))]
    specs = [TensorSpec(t.name, t.shape, t.type, t.nbytes) for t in file.tensors.values()]
    with SourceFiles() as files, GGUFOutput(out, _metadata(file), specs + biases) as output:
        for entry in file.tensors.values():
            for data in _scaled(files, entry, sums):
                output.write(data)
        for spec in biases:
            output.write(bytes(spec.nbytes))
        output.finish()
        output.commit()


def _metadata(file: GGUFFile) -> dict[str, bytes]:
    dropped = "general.architecture", "general.alignment"
    renamed = {key: key.replace(f"{FROM}.", f"{TO}.", 1) for key in file.kv if key not in dropped}
    records = {new: encode_kv(new, file.kv[key], *file.kv.types(key)) for key, new in renamed.items()}
    width = f"{TO}.expert_feed_forward_length"
    records["general.architecture"] = kv_string("general.architecture", TO)
    records[width] = kv_u32(width, int(file.kv[f"{FROM}.feed_forward_length"]))
    records[f"{TO}.expert_gating_func"] = kv_u32(f"{TO}.expert_gating_func", SOFTMAX)
    return records


def _scaled(files: SourceFiles, entry: TensorEntry, sums: Sequence[float]) -> Iterator[bytes]:
    data = files.read(entry, 0, entry.nbytes)
    if not entry.name.endswith(DOWN):
        yield data
        return
    scale = np.float32(sums[int(entry.name.split(".")[1])])
    yield quantize(dequantize(data, entry.type, entry.shape[0]) * scale, entry.type)


# ---- what a use costs that is dropped or given to another --------------------------------------------------


def costs(model: Path, text: Path, n_tokens: int) -> list[str]:
    """Squared change of a layer's output, relative to dropping an expert and leaving the other weights as they are.

    By the ratio of the gates of the other expert and the one in whose place it comes, the mean over the layers; and of
    dropping it while the other weights take over its share, by the rank of the expert.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = CalibrateOptions(text, ("Q3_K",), n_tokens, settings_tokens=0, n_threads=1)
        with Calibrator(model, Path(folder), options, lambda _: None) as calibrator:
            seen = calibrator.seen
            replaced = calibrator._substitution()
            if replaced is None:
                raise UnknownName(f"{model}: its graph does not show what gate weights are made of")
            shares = np.zeros((len(seen.rankings), seen.rankings[0].n_used))
            for layer, (ranking, (kind, scale)) in enumerate(zip(seen.rankings, seen.gating, strict=True)):
                x = seen.layers[layer].inputs[ranking.rows].astype(np.float32)
                y = np.zeros((len(x), ranking.n_used, x.shape[1]), np.float32)
                for expert in np.unique(ranking.experts[:, : ranking.n_used]).tolist():
                    at, ranks = np.nonzero(ranking.experts[:, : ranking.n_used] == expert)
                    y[at, ranks] = calibrator._weights.output(calibrator.source.layers[layer], expert, x[at])
                shares[layer] = dropped(gate_weights_of(kind, scale, ranking.gates[:, : ranking.n_used]), y)
    lines = ["ratio of the gates | replacing, relative to dropping, mean (lowest - highest layer)"]
    for i, column in enumerate(replaced.factor.T):
        middle = (i + 0.5) / len(replaced.factor.T)
        lines.append(f"{middle:.2f} | {column.mean():.2f} ({column.min():.2f} - {column.max():.2f})")
    lines.append("rank | dropping and renormalising, relative to dropping")
    return lines + [f"{i + 1} | {c.mean():.2f} ({c.min():.2f} - {c.max():.2f})" for i, c in enumerate(shares.T)]


def dropped(weights: Float64Array, y: FloatArray) -> Float64Array:
    """[k]: the squared change when the expert of a rank is dropped and the others' weights grow, over that without.

    weights: [T, k]. y: [T, k, n_embd], the experts' outputs.
    """
    found = np.zeros(weights.shape[1])
    for rank in range(weights.shape[1]):
        rest = weights.copy()
        rest[:, rank] = 0
        rest *= weights.sum(axis=1, keepdims=True) / rest.sum(axis=1, keepdims=True)
        change = np.einsum("tk,tkd->td", rest - weights, y)
        plain = weights[:, rank, None] * y[:, rank]
        found[rank] = np.square(change).sum() / np.square(plain, dtype=np.float64).sum()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, help="a GGUF of an OLMoE model")
    p.add_argument("out", type=Path, nargs="?", help="left out: measure what dropping and replacing cost in the source")
    p.add_argument("--text", type=Path, required=True, help="to measure the weights' sums on")
    p.add_argument("--tokens", type=int, default=4096)
    o = p.parse_args(arguments)
    try:
        if o.out is None:
            print("\n".join(costs(o.source, o.text, o.tokens)))
            return 0
        sums = weight_sums(o.source, o.text, o.tokens)
        renormalise(o.source, o.out, sums)
    except MoeEdgeError as error:
        print(f"renormalised.py: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{o.out}: weights summed up to {', '.join(f'{each:.3f}' for each in sums)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
