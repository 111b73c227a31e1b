"""How fast several boards are together, and where one more stops paying. Pure: figures in, seconds out.

A token passes through the boards one after the other, so their seconds add up: what each reads and computes of its own
layers, by the cost model of one machine (estimate.py), and one way there and back over the network. Boards do not make
a token faster by computing together; they hold more experts together, and so read less.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_edge.models.errors import UsageError
from moe_edge.schedulers.budget import arena_floor_bytes
from moe_edge.schedulers.estimate import Estimate, MachineSpeeds, ModelWork, estimate
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.workers import BoardFacts, split_layers

WORTH = 1.05  # times the speed: what one more board must give to be worth it
# From a graph's command to its answer, both relays and ggml's server: what a token takes at each board besides the
# network, computing and reading.
RELAY_SECONDS = 150e-6


@dataclass(frozen=True)
class BoardSpeeds:
    """ram_bytes: the budget. fixed_bytes: of it, what no layer takes: compute buffers, scratch. speeds: of doctor.

    latency_seconds: there and back. network_bytes_per_second: one way.
    """

    ram_bytes: int
    fixed_bytes: int
    speeds: MachineSpeeds
    latency_seconds: float
    network_bytes_per_second: float


@dataclass(frozen=True)
class BlockWork:
    """The model, block by block. work: all of it. moe_blocks: the block of each MoE layer, ascending.

    dense_bytes, expert_bytes, kv_bytes: of each block, as they are held; kv_bytes is the whole context's. used_share:
    of the KV cache that a token reads. n_embd: of the hidden state. output_bytes: what the client multiplies itself.
    """

    work: ModelWork
    moe_blocks: tuple[int, ...]
    dense_bytes: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    used_share: float
    n_embd: int
    output_bytes: int

    def part(self, blocks: range) -> ModelWork:
        """The work of a token in these blocks."""
        layout, n_levels = self.work.layout, self.work.layout.n_levels
        inside = [i for i, block in enumerate(self.moe_blocks) if block in blocks]
        counts = None if self.work.counts is None else self.work.counts[inside]
        units: list[int] = []
        for i in inside:
            first = layout.first_unit[i]
            units += layout.unit_bytes[first : first + layout.n_experts[i] * n_levels]
        return replace(
            self.work,
            layout=Layout(tuple(layout.n_experts[i] for i in inside), n_levels, tuple(units)),
            dense_bytes=sum(self.dense_bytes[b] for b in blocks),
            kv_bytes=int(self.used_share * sum(self.kv_bytes[b] for b in blocks)),
            counts=counts,
        )


@dataclass(frozen=True)
class BoardForecast:
    """One board's share of a token. needed_bytes: the least budget that works; arena_bytes 0 when this one does not."""

    layers: range
    ram_bytes: int
    needed_bytes: int
    arena_bytes: int
    estimate: Estimate | None
    network_seconds: float

    @property
    def seconds(self) -> float:
        """Reading and computing; infinite when the budget is too small."""
        return 1 / self.estimate.tokens_per_second.expected if self.estimate else float("inf")

    @property
    def binds(self) -> str:
        """What a faster one of would help this board's part of a token most."""
        if self.estimate is None:
            return "memory"
        return "network" if self.network_seconds > self.seconds else self.estimate.binds


@dataclass(frozen=True)
class BoardsForecast:
    """client_seconds: the output, computed where the tokens are chosen."""

    boards: tuple[BoardForecast, ...]
    client_seconds: float

    @property
    def will_run(self) -> bool:
        return all(board.estimate is not None for board in self.boards)

    @property
    def tokens_per_second(self) -> float:
        """0 when some board's budget is too small."""
        return 1 / (self.client_seconds + sum(board.seconds + board.network_seconds for board in self.boards))

    @property
    def slowest(self) -> BoardForecast:
        return max(self.boards, key=lambda board: board.seconds + board.network_seconds)


def runs_by_memory(model: BlockWork, ram_bytes: Sequence[int]) -> list[range]:
    """The layers of each board where only its memory decides; as split_layers()."""
    facts = [BoardFacts(each) for each in ram_bytes]
    return split_layers(facts, model.dense_bytes, model.expert_bytes, model.kv_bytes)


def forecast_boards(
    model: BlockWork, boards: Sequence[BoardSpeeds], client: MachineSpeeds, runs: Sequence[range] | None = None
) -> BoardsForecast:
    """A token on these boards. runs: the layers of each; None: as a client would split them.

    Raises UsageError when there are more boards than layers with experts.
    """
    if runs is None:
        runs = runs_by_memory(model, [board.ram_bytes for board in boards])
    made = tuple(_forecast(model, board, run) for board, run in zip(boards, runs, strict=True))
    return BoardsForecast(made, model.output_bytes / client.compute)


def _forecast(model: BlockWork, board: BoardSpeeds, layers: range) -> BoardForecast:
    work = model.part(layers)
    held = board.fixed_bytes + sum(model.dense_bytes[b] + model.kv_bytes[b] for b in layers)
    needed = held + arena_floor_bytes(work.layout)
    state_bytes = 2 * 4 * model.n_embd  # there and back, F32
    network = board.latency_seconds + state_bytes / board.network_bytes_per_second + RELAY_SECONDS
    if board.ram_bytes < needed:
        return BoardForecast(layers, board.ram_bytes, needed, 0, None, network)
    arena = min(board.ram_bytes - held, work.layout.total_bytes)
    return BoardForecast(layers, board.ram_bytes, needed, arena, estimate(work, arena, board.speeds), network)


def grow(model: BlockWork, board: BoardSpeeds, client: MachineSpeeds, most: int = 8) -> list[BoardsForecast]:
    """1 to `most` boards like this one; fewer when the model has fewer layers with experts."""
    out: list[BoardsForecast] = []
    for n in range(1, most + 1):
        try:
            out.append(forecast_boards(model, [board] * n, client))
        except UsageError:
            break
    return out


def stops_paying_at(grown: Sequence[BoardsForecast]) -> int | None:
    """The number of boards beyond which one more gives less than 5 %; None when that is not reached."""
    for n, (now, more) in enumerate(itertools.pairwise(grown), 1):
        if now.will_run and more.tokens_per_second < WORTH * now.tokens_per_second:
            return n
    return None
