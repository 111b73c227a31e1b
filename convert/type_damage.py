"""What a type does to one expert's output, on the tokens routed to it. Pure numpy.

An expert computes E(x) = down @ h, with h = act(gate @ x) * (up @ x), or h = act(up @ x) without a gate. The error of
a type is the sum over the tokens of g^2 |E(x) - E_type(x)|^2, with g the gate weight: PAPERS.md, section 5 (GEMQ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.floats import Float64Array, FloatArray
from moe_edge.models.suggest import did_you_mean

IntArray = npt.NDArray[np.int64]
Activation = Callable[[FloatArray], FloatArray]
Weights = Mapping[str, FloatArray]  # projection -> (n_rows, n_cols), as quantize takes them
Assignment = Mapping[str, int | None]  # projection -> type id; None or absent: the reference weights

# A matrix of at most so many weights is quantized whole to find its errors; of a larger one some rows, about so many
# weights. 64 Ki of the 1.5 Mi weights of Qwen3-30B-A3B's matrices: docs/LOG.md, 2026-11-27.
WHOLE_WEIGHTS, SAMPLED_WEIGHTS, LEAST_ROWS = 1 << 18, 1 << 16, 32
CHUNK_TOKENS = 2048  # at a time: hidden states of 2048 tokens and 8192 columns are 64 MiB


@dataclass(frozen=True)
class ExpertErrors:
    """Sums over the expert's tokens of squared errors times squared gate weights.

    single: projection -> type id -> error with only that projection at that type.
    joint: error of each assignment given. removed: error without the expert, the sum of g^2 |E(x)|^2.
    """

    single: Mapping[str, Mapping[int, float]]
    joint: tuple[float, ...]
    removed: float


@dataclass(frozen=True)
class ColumnImportance:
    """Mean squares of what goes into an expert's columns: `inputs` (n_embd,), `hidden` (n_ff,)."""

    inputs: FloatArray
    hidden: FloatArray

    def of(self, projection: str) -> FloatArray:
        """The importance of the columns of `projection`, as quantize takes it."""
        return self.hidden if projection == "down" else self.inputs


def silu(x: FloatArray) -> FloatArray:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and x / infinity is right
        y: FloatArray = x / (1 + np.exp(-x))
    return y


def gelu(x: FloatArray) -> FloatArray:
    """ggml's GELU: the approximation by tanh."""
    root = np.float32(np.sqrt(2 / np.pi))
    y: FloatArray = np.float32(0.5) * x * (1 + np.tanh(root * x * (1 + np.float32(0.044715) * x * x)))
    return y


def relu(x: FloatArray) -> FloatArray:
    """The positive part."""
    y: FloatArray = np.maximum(x, np.float32(0))
    return y


def relu_squared(x: FloatArray) -> FloatArray:
    """The square of the positive part."""
    y: FloatArray = np.square(np.maximum(x, np.float32(0)))
    return y


# llama.cpp, build_moe_ffn calls in src/models/*.cpp: what each architecture passes as type_op.
ACTIVATIONS: Mapping[str, Activation] = {
    **dict.fromkeys(
        (
            "qwen2moe qwen3moe qwen3next qwen35moe qwen4exp ernie4_5-moe lfm2moe grovemoe mellum mimo2 qwen3vlmoe "
            "olmoe phimoe llama granitemoe minimax-m2 arctic dbrx granite granitehybrid mistral3 "
            "deepseek2 glm4moe dots1 afmoe bailingmoe deepseek deepseek2-ocr deepseek32 glm-dsa kimi-linear mistral4 "
            "cohere2moe laguna exaone-moe hunyuan-moe bailingmoe2 granite_swa "
            "minimax-01 hy_v3 dots3note"
        ).split(),
        silu,
    ),
    **dict.fromkeys(("grok", "gemma4"), gelu),
    "smallthinker": relu,
    "nemotron_h_moe": relu_squared,
}

# These clamp inside: E is another function of gate and up than the one above.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("gpt-oss", "minimax-m3"), "its experts use a clamped SwiGLU (swiglu_oai)"),
    "kimi-k3": "its experts use an activation of their own (situ)",
    **dict.fromkeys(
        "maple step35 bailingmoe3 deepseek4 glm5-next hy_v4".split(),
        "its experts clamp their SwiGLU (swiglu_clamp_exp)",
    ),
}


def find_activation(architecture: str, where: str) -> Activation:
    """The activation inside the experts of an architecture; `where` (a file) is named in the error.

    Raises UnknownName for one whose experts compute something else, or that is not in the table.
    """
    if architecture in ACTIVATIONS:
        return ACTIVATIONS[architecture]
    if architecture in REFUSED:
        raise UnknownName(
            f"{where}: --calibrate does not know the experts of '{architecture}': {REFUSED[architecture]}; "
            "convert without --calibrate"
        )
    raise UnknownName(
        f"{where}: --calibrate does not know the experts of architecture '{architecture}'"
        f"{did_you_mean(architecture, ACTIVATIONS)}"
    )


def expert_hidden(x: FloatArray, weights: Weights, activation: Activation) -> FloatArray:
    """(n, n_ff): what goes into `down` for inputs x (n, n_embd). weights: up, with gate or not, or a fused gate_up."""
    if "gate_up" in weights:
        gate, up = np.split(x @ weights["gate_up"].T, 2, axis=1)
        hidden: FloatArray = activation(gate) * up
        return hidden
    up = x @ weights["up"].T
    if "gate" not in weights:
        return activation(up)
    hidden = activation(x @ weights["gate"].T) * up
    return hidden


def expert_output(x: FloatArray, weights: Weights, activation: Activation) -> FloatArray:
    """(n, n_embd): the expert's output E(x) for inputs x (n, n_embd), without the gate weight."""
    output: FloatArray = expert_hidden(x, weights, activation) @ weights["down"].T
    return output


def expert_errors(
    x: FloatArray,
    g: FloatArray,
    reference: Weights,
    candidates: Mapping[str, Mapping[int, FloatArray]],
    activation: Activation,
    assignments: Sequence[Assignment] = (),
) -> ExpertErrors:
    """What types of one expert's projections do to its output.

    x: (n, n_embd) float32, the inputs of its tokens. g: (n,), their gate weights.
    reference: the exact weights. candidates: projection -> type id -> dequantized weights of the same shape.
    assignments: types of all projections together, for `joint`. No tokens give errors of 0.
    """
    single = {projection: dict.fromkeys(kinds, 0.0) for projection, kinds in candidates.items()}
    joint = [0.0] * len(assignments)
    mixed = [_assigned(reference, candidates, each) for each in assignments]
    removed = 0.0
    for rows, gate in _chunks(x, g):
        hidden = expert_hidden(rows, reference, activation)
        output = hidden @ reference["down"].T
        removed += _weighted_square(output, gate)
        for projection, kinds in candidates.items():
            for kind, weights in kinds.items():
                difference = _difference(rows, hidden, reference, projection, weights, activation)
                single[projection][kind] += _weighted_square(difference, gate)
        for number, each in enumerate(mixed):
            joint[number] += _weighted_square(expert_output(rows, each, activation) - output, gate)
    return ExpertErrors(single, tuple(joint), removed)


def rows_to_sample(n_rows: int, n_cols: int) -> IntArray | None:
    """Which rows of a matrix errors are estimated from, evenly spread; None when it is small and taken whole."""
    if n_rows * n_cols <= WHOLE_WEIGHTS:
        return None
    n = min(n_rows, max(LEAST_ROWS, SAMPLED_WEIGHTS // n_cols))
    rows: IntArray = np.linspace(0, n_rows - 1, n).round().astype(np.int64)
    return rows


def sampled_errors(
    x: FloatArray,
    g: FloatArray,
    reference: Weights,
    rows: Mapping[str, IntArray],
    candidates: Mapping[str, Mapping[int, FloatArray]],
    activation: Activation,
    assignments: Sequence[Assignment] = (),
) -> ExpertErrors:
    """As expert_errors, estimated from some rows of each projection; `removed` is exact.

    rows: projection -> which rows; gate and up have the same, and gate_up has them twice, n_ff apart. candidates:
    those rows alone, dequantized. Errors of different hidden units are taken as independent of each other, and an
    assignment's error as that of its hidden units and that of `down` (docs/LOG.md has how near this is).
    """
    single = {projection: dict.fromkeys(kinds, 0.0) for projection, kinds in candidates.items()}
    of_units, of_down = [0.0] * len(assignments), [0.0] * len(assignments)
    removed = 0.0
    part = {p: reference[p][rows[p]] for p in reference if p != "down"}
    down = reference["down"][rows["down"]]
    units = rows["gate_up"][: len(rows["gate_up"]) // 2] if "gate_up" in rows else rows["up"]
    reach = np.square(reference["down"], dtype=np.float64).sum(axis=0)  # of a hidden unit in the output
    whole, sampled = np.zeros(2), np.zeros(2)  # squares of hidden units as far as they reach, and of outputs
    for inputs, gate in _chunks(x, g):
        hidden = expert_hidden(inputs, reference, activation)
        output = hidden @ reference["down"].T
        mine = hidden[:, units]
        removed += _weighted_square(output, gate)
        whole += _reached(hidden, gate, reach), _weighted_square(output, gate)
        sampled += _reached(mine, gate, reach[units]), _weighted_square(output[:, rows["down"]], gate)
        for projection, kinds in candidates.items():
            for kind, weights in kinds.items():
                if projection == "down":
                    single[projection][kind] += _weighted_square(hidden @ (weights - down).T, gate)
                else:
                    changed = expert_hidden(inputs, {**part, projection: weights}, activation)
                    single[projection][kind] += _reached(changed - mine, gate, reach[units])
        for number, each in enumerate(assignments):
            mixed = {p: part[p] if (k := each.get(p)) is None else candidates[p][k] for p in part}
            of_units[number] += _reached(expert_hidden(inputs, mixed, activation) - mine, gate, reach[units])
            if (kind_of_down := each.get("down")) is not None:
                changed = candidates["down"][kind_of_down]
                of_down[number] += _weighted_square(hidden @ (changed - down).T, gate)
    # errors go with what they are errors of
    scales = np.divide(whole, sampled, out=np.ones(2), where=sampled > 0).tolist()
    return ExpertErrors(
        {p: {k: v * scales[p == "down"] for k, v in kinds.items()} for p, kinds in single.items()},
        tuple(a * scales[0] + b * scales[1] for a, b in zip(of_units, of_down, strict=True)),
        removed,
    )


def column_importance(x: FloatArray, hidden: FloatArray, g: FloatArray | None = None) -> ColumnImportance:
    """The importance matrix of one expert from its own tokens: zeros when it has none.

    x: (n, n_embd), its inputs. hidden: (n, n_ff), see expert_hidden. g: (n,), gate weights: given, tokens count by
    their squares; otherwise all alike, as in llama-imatrix.
    """
    weights = np.ones(len(x)) if g is None else np.square(g, dtype=np.float64)
    total = float(weights.sum())

    def mean_squares(values: FloatArray) -> FloatArray:
        sums = np.einsum("n,nc,nc->c", weights, values, values, dtype=np.float64)
        return np.asarray(sums / total if total > 0 else sums, np.float32)

    return ColumnImportance(mean_squares(x), mean_squares(hidden))


def _difference(
    x: FloatArray, hidden: FloatArray, reference: Weights, projection: str, weights: FloatArray, activation: Activation
) -> FloatArray:
    """(n, n_embd): how the output changes with `weights` in the place of one projection."""
    difference: FloatArray
    if projection == "down":
        difference = hidden @ (weights - reference["down"]).T
    else:
        changed = expert_hidden(x, {**reference, projection: weights}, activation)
        difference = (changed - hidden) @ reference["down"].T
    return difference


def _assigned(
    reference: Weights, candidates: Mapping[str, Mapping[int, FloatArray]], assignment: Assignment
) -> dict[str, FloatArray]:
    kinds = {projection: assignment.get(projection) for projection in reference}
    return {each: reference[each] if kind is None else candidates[each][kind] for each, kind in kinds.items()}


def _chunks(x: FloatArray, g: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
    for start in range(0, len(x), CHUNK_TOKENS):
        yield x[start : start + CHUNK_TOKENS], g[start : start + CHUNK_TOKENS]


def _reached(values: FloatArray, g: FloatArray, reach: Float64Array) -> float:
    """Sum of g^2 times squared hidden units times what each adds to the output's square."""
    sums = np.square(g, dtype=np.float64) @ np.square(values, dtype=np.float64)
    return float(sums @ reach)


def _weighted_square(values: FloatArray, g: FloatArray) -> float:
    rows = np.einsum("nc,nc->n", values, values, dtype=np.float64)
    return float(rows @ np.square(g, dtype=np.float64))
