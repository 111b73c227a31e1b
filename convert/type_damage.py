"""What a type does to one expert's output, on the tokens routed to it. Pure numpy.

An expert computes E(x) = down @ h, with h = act(gate @ x) * (up @ x), or h = act(up @ x) without a gate. The error of
a type is the sum over the tokens of g^2 |E(x) - E_type(x)|^2, with g the gate weight: PAPERS.md, section 5 (GEMQ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from moe_edge.models.errors import UnknownName
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.suggest import did_you_mean

Activation = Callable[[FloatArray], FloatArray]
Weights = Mapping[str, FloatArray]  # projection -> (n_rows, n_cols), as quantize takes them
Assignment = Mapping[str, int | None]  # projection -> type id; None or absent: the reference weights

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


def _weighted_square(values: FloatArray, g: FloatArray) -> float:
    rows = np.einsum("nc,nc->n", values, values, dtype=np.float64)
    return float(rows @ np.square(g, dtype=np.float64))
