"""Which board computes which layers. Pure: figures in, ranges of layers out.

Layers go to the boards in the order they are named, each a run without a gap, since the state of a token passes from
board to board once. What a board should take follows from what binds it: the bytes it can hold, and how fast it
computes and reads what it cannot hold. Here only the first counts; boards_split.py has both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from moe_edge.models.errors import UsageError


@dataclass(frozen=True)
class BoardFacts:
    """ram_bytes: its budget."""

    ram_bytes: int


def split_layers(
    boards: Sequence[BoardFacts], dense_bytes: Sequence[int], expert_bytes: Sequence[int], kv_bytes: Sequence[int]
) -> list[range]:
    """A run of layers for each board, by memory.

    dense_bytes, expert_bytes, kv_bytes: of each layer. Every board gets a share of the bytes in proportion to its
    memory, and at least one layer with experts. Raises UsageError when there are too few of those.
    """
    n = len(dense_bytes)
    with_experts = [i for i in range(n) if expert_bytes[i] > 0]
    check_enough_layers(len(boards), len(with_experts))
    cost = [dense_bytes[i] + expert_bytes[i] + kv_bytes[i] for i in range(n)]
    weight = [board.ram_bytes for board in boards]
    ends: list[int] = []
    for b in range(len(boards) - 1):
        begin = ends[-1] if ends else 0
        target = sum(cost) * sum(weight[: b + 1]) / max(1e-9, sum(weight))
        # It must leave a layer with experts to each board behind it, and take one itself.
        first = next(i for i in with_experts if i >= begin) + 1
        last = with_experts[len(with_experts) - (len(boards) - 1 - b)]
        end = min(range(first, last + 1), key=lambda e: abs(sum(cost[:e]) - target))
        ends.append(end)
    edges = [0, *ends, n]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def check_enough_layers(n_boards: int, n_with_experts: int) -> None:
    """Raises UsageError when not every board can have a layer with experts."""
    if n_with_experts < n_boards:
        raise UsageError(
            f"{n_boards} boards are too many: the model has {n_with_experts} layers with experts, and each board needs "
            "one; name fewer in --workers"
        )


def shares_of(layers: Sequence[range]) -> tuple[float, ...]:
    """llama.cpp's tensor_split that gives each device these layers, and the last one the output as well.

    llama.cpp puts layer i of n + 1 on the first device whose summed share is above i / (n + 1) (llama-model.cpp,
    load_tensors), so sums half way between two layers leave no room for rounding.
    """
    n = layers[-1].stop - layers[0].start + 1
    sums = [(run.stop - layers[0].start - 0.5) / n for run in layers[:-1]] + [1.0]
    return tuple(b - a for a, b in itertools.pairwise([0.0, *sums]))


# ---- what a user asks for ------------------------------------------------------------------------------------

AUTO, SPEED, MEMORY = "auto", "speed", "memory"
Split = str | tuple[int, ...]


def parse_split(text: str) -> Split:
    """`auto`, `speed`, `memory`, or the layers of each board: 20,14,14. Raises UsageError."""
    if text in (AUTO, SPEED, MEMORY):
        return text
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(
            f"--split {text} is neither auto, speed nor memory, nor a number of layers for each board such as 20,14,14"
        )
    return tuple(int(part) for part in parts)


def exact_split(counts: Sequence[int], expert_bytes: Sequence[int], n_boards: int) -> list[range]:
    """Runs of so many layers. Raises UsageError when they are not the model's, or a board gets none with experts."""
    said, n = ",".join(map(str, counts)), len(expert_bytes)
    if len(counts) != n_boards:
        raise UsageError(f"--split {said} is for {len(counts)} boards, and --workers names {n_boards}")
    if sum(counts) != n:
        raise UsageError(f"--split {said} has {sum(counts)} layers, and the model {n}")
    edges = [0, *itertools.accumulate(counts)]
    runs = [range(a, b) for a, b in itertools.pairwise(edges)]
    for number, run in enumerate(runs, 1):
        if not any(expert_bytes[i] for i in run):
            raise UsageError(
                f"--split {said} gives board {number} layers {run.start} to {run.stop - 1}, none of which has experts; "
                "give it one that has"
            )
    return runs
