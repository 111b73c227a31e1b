"""Which board gets which layers: what `--split` says, by the figures that the boards know of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_edge.models.errors import BoardError
from moe_edge.runner.loading import Loading
from moe_edge.runner.sizes import head_bytes
from moe_edge.runner.workers.board import Board, Network
from moe_edge.runner.workers.part import dense_bytes_by_block, expert_bytes_by_block, n_blocks
from moe_edge.schedulers.boards_forecast import BlockWork, BoardSpeeds, runs_by_memory
from moe_edge.schedulers.boards_split import split_by_speed
from moe_edge.schedulers.budget import FixedSizes
from moe_edge.schedulers.estimate import MachineSpeeds, ModelWork
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.workers import AUTO, MEMORY, Split, exact_split

N_PROMPT = 512  # tokens in the KV cache that a token looks at, as `plan` has it
SPEED_SECONDS = 300.0  # a board that was never measured takes a minute
HERE = Network(0.0, float("inf"))  # which has no say in the split


def block_work(loading: Loading, layout: Layout, fixed: FixedSizes) -> tuple[BlockWork, int]:
    """(the model, block by block; what a board takes whatever its layers, in bytes)."""
    model = loading.model
    blocks = n_blocks(model.architecture, loading.metadata)
    dense, others = dense_bytes_by_block(loading.skeleton, blocks)
    counts = None if model.calibration is None else model.calibration.counts
    work = ModelWork(layout, model.n_expert_used, sum(dense), 0, counts, model.stored_expert_bytes / model.expert_bytes)
    kv = tuple([fixed.kv_bytes // max(1, blocks)] * blocks)
    share = min(N_PROMPT, loading.n_ctx) / max(1, loading.n_ctx)
    n_embd = max((layer.n_embd for layer in model.layers), default=0)
    made = BlockWork(
        work, tuple(layer.layer for layer in model.layers), tuple(dense), tuple(expert_bytes_by_block(model, blocks)),
        kv, share, n_embd, head_bytes(loading.skeleton) or others,
    )  # fmt: skip
    return made, fixed.compute_bytes + fixed.scratch_bytes


def speeds_of(board: Board, fixed_bytes: int, network: Network = HERE, *, measured_only: bool = False) -> BoardSpeeds:
    """A board's figures, which it measures unless it has. Raises BoardError when it has none to give.

    measured_only: as they were measured before, by `plan` or `doctor`.
    """
    found = board.ask("speeds", within=max(SPEED_SECONDS, board.timeout), measured_only=measured_only)
    if "why_not" in found:
        raise BoardError(f"board {board.address}: {found['why_not']}")
    return BoardSpeeds(
        int(board.facts["ram_bytes"]), fixed_bytes, speeds_from_json(found["speeds"]), network.latency_seconds,
        network.bytes_per_second,
    )  # fmt: skip


def speeds_from_json(found: dict[str, Any]) -> MachineSpeeds:
    """What a board has sent as JSON, where tuples are lists."""
    rows = {name: tuple((int(n), float(rate)) for n, rate in found[name]) for name in ("expert_rows", "dense_rows")}
    return MachineSpeeds(**{**found, **rows})


def choose_runs(
    boards: Sequence[Board], split: Split, model: BlockWork, fixed_bytes: int, tell: Callable[[str], None]
) -> list[range]:
    """The layers of each board. Raises UsageError for a split that is not the model's; BoardError."""
    if not isinstance(split, str):
        return exact_split(split, model.expert_bytes, len(boards))
    by_memory = runs_by_memory(model, [int(board.facts["ram_bytes"]) for board in boards])
    if split == MEMORY or len(boards) == 1:
        return by_memory
    speeds: list[BoardSpeeds] = []
    for board in boards:
        if split != AUTO:
            tell(f"board {board.address}: measuring its disk and processor, unless that was done before")
        try:
            speeds.append(speeds_of(board, fixed_bytes, measured_only=split == AUTO))
        except BoardError as e:
            if split != AUTO or board.why_lost:
                raise
            tell(f"layers go by memory alone: {e}; `moe-edge plan --workers` measures it, and then they go by speed")
            return by_memory
    return split_by_speed(model, speeds)
