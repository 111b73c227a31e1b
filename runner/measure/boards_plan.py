"""`moe-edge plan --workers`: what several boards would do together. Each is asked for its speeds; the network is
probed; nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BoardError
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.loading import Loading
from moe_edge.runner.measure.doctor import doctor, machine_speeds, n_cores
from moe_edge.runner.measure.probe import BLOCK_BYTES, Unmeasured
from moe_edge.runner.prove import LOADS
from moe_edge.runner.sizes import sizes_of
from moe_edge.runner.workers.board import Board, Network
from moe_edge.runner.workers.part import content_id, dense_bytes_by_block, expert_bytes_by_block, n_blocks
from moe_edge.runner.workers.wire import Address
from moe_edge.runner.workers.worker import versions
from moe_edge.schedulers.boards_forecast import (
    BlockWork,
    BoardForecast,
    BoardsForecast,
    BoardSpeeds,
    forecast_boards,
    grow,
    stops_paying_at,
)
from moe_edge.schedulers.budget import format_arg, format_bytes
from moe_edge.schedulers.estimate import MachineSpeeds, ModelWork

N_PROMPT = 512  # tokens in the KV cache that a token looks at, as `plan` has it
SPEED_SECONDS = 300.0  # a board that was never measured takes a minute


@dataclass(frozen=True)
class BoardsPlan:
    """addresses, networks: of the boards of `forecast`, in order. grown: 1, 2, ... boards like the first."""

    model: str
    addresses: tuple[str, ...]
    networks: tuple[Network, ...]
    forecast: BoardsForecast
    grown: tuple[BoardsForecast, ...]

    @property
    def will_run(self) -> bool:
        return self.forecast.will_run

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "will_run": self.will_run, "tokens_per_second": self.forecast.tokens_per_second,
            "client_seconds": self.forecast.client_seconds,
            "boards": [
                {
                    "board": address, "layers": [each.layers.start, each.layers.stop - 1],
                    "ram_bytes": each.ram_bytes, "needed_bytes": each.needed_bytes, "arena_bytes": each.arena_bytes,
                    "seconds": each.seconds if each.estimate else None, "network_seconds": each.network_seconds,
                    "binds": each.binds, "network": asdict(network),
                }
                for address, network, each in zip(self.addresses, self.networks, self.forecast.boards, strict=True)
            ],
            "more_boards": [each.tokens_per_second for each in self.grown],
            "stops_paying_at": stops_paying_at(self.grown),
        }  # fmt: skip

    def text(self) -> str:
        lines = [f"{self.model} on {len(self.addresses)} boards"]
        for address, network, each in zip(self.addresses, self.networks, self.forecast.boards, strict=True):
            lines.append(_line(address, network, each))
        if self.will_run:
            slowest = self.addresses[self.forecast.boards.index(self.forecast.slowest)]
            lines.append(
                f"together about {self.forecast.tokens_per_second:.1f} tok/s; most of a token is spent at board "
                f"{slowest}, where the {self.forecast.slowest.binds} binds"
            )
        speeds = ", ".join(
            f"{n}: {each.tokens_per_second:.1f}" if each.will_run else f"{n}: too small"
            for n, each in enumerate(self.grown, 1)
        )
        end = stops_paying_at(self.grown)
        word = f"beyond {end}, one more gives less than 5 %" if end else "each more pays"
        lines.append(f"boards like the first, tok/s: {speeds}; {word}")
        return "\n".join(lines)


def _line(address: str, network: Network, each: BoardForecast) -> str:
    head = (
        f"board {address}: layers {each.layers.start} to {each.layers.stop - 1}, memory "
        f"{format_bytes(each.ram_bytes)}, network {1e3 * network.latency_seconds:.2f} ms and "
        f"{network.bytes_per_second / 1e6:.0f} MB/s"
    )
    if each.estimate is None:
        return f"{head}: too small, it needs {format_arg(each.needed_bytes)}"
    e = each.estimate
    return (
        f"{head}: {format_bytes(each.arena_bytes)} for experts, about {100 * e.hit_rate.expected:.0f} % hits, "
        f"{1e3 * each.seconds:.1f} ms a token (computing {1e3 * e.compute_seconds:.1f}, reading "
        f"{1e3 * e.read_seconds:.1f}) and {1e3 * each.network_seconds:.2f} ms of network; the {each.binds} binds"
    )


def plan_boards(
    path: str | Path,
    workers: Sequence[Address],
    *,
    n_ctx: int = 0,
    n_ubatch: int = 0,
    n_threads: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> BoardsPlan:
    """Ask each worker. Raises BoardError for one that cannot be asked, UsageError for too many boards."""
    options = EngineOptions(n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, proof=LOADS)
    model, fixed_bytes = block_work(path, options)
    client = _own_speeds(path, options, tell)
    ours, mine = versions(), content_id(Loading(path, options).model)
    boards: list[BoardSpeeds] = []
    networks: list[Network] = []
    for address in workers:
        board = Board(address)
        try:
            board.check(mine, ours)
            network = board.probe()
            tell(f"board {address}: measuring its disk and processor, unless that was done before")
            found = board.ask("speeds", within=SPEED_SECONDS)
        finally:
            board.close()
        if "why_not" in found:
            raise BoardError(f"board {address}: its speeds cannot be measured: {found['why_not']}")
        speeds = MachineSpeeds(**found["speeds"])
        boards.append(
            BoardSpeeds(
                int(board.facts["ram_bytes"]), fixed_bytes, speeds, network.latency_seconds, network.bytes_per_second
            )
        )
        networks.append(network)
    forecast = forecast_boards(model, boards, client)
    grown = tuple(grow(model, boards[0], client))
    return BoardsPlan(str(path), tuple(map(str, workers)), tuple(networks), forecast, grown)


def block_work(path: str | Path, options: EngineOptions) -> tuple[BlockWork, int]:
    """(the model, block by block; what a board takes whatever its layers, in bytes)."""
    sizes = sizes_of(path, options)
    loading = Loading(path, options)
    model, fixed = sizes.model, sizes.plan.fixed
    blocks = n_blocks(model.architecture, loading.metadata)
    dense, others = dense_bytes_by_block(loading.skeleton, blocks)
    counts = None if model.calibration is None else model.calibration.counts
    work = ModelWork(
        sizes.layout, model.n_expert_used, sum(dense), 0, counts, model.stored_expert_bytes / model.expert_bytes
    )
    kv = tuple([fixed.kv_bytes // max(1, blocks)] * blocks)
    share = min(N_PROMPT, sizes.n_ctx) / max(1, sizes.n_ctx)
    output = loading.skeleton.tensors.get("output.weight") or loading.skeleton.tensors.get("token_embd.weight")
    n_embd = max((layer.n_embd for layer in model.layers), default=0)
    made = BlockWork(
        work, tuple(layer.layer for layer in model.layers), tuple(dense), tuple(expert_bytes_by_block(model, blocks)),
        kv, share, n_embd, output.nbytes if output else others,
    )  # fmt: skip
    return made, fixed.compute_bytes + fixed.scratch_bytes


def speeds_here(path: str | Path, options: EngineOptions, tell: Callable[[str], None]) -> MachineSpeeds | Unmeasured:
    """This machine's, for the experts of a model: measured once and kept, as `doctor` does."""
    model = Loading(path, options).model
    by_type: dict[int, int] = {}
    for piece in model.pieces:
        by_type[piece.type] = by_type.get(piece.type, 0) + piece.nbytes
    largest = max(model.files, key=lambda file: file.stat().st_size)
    target = largest if largest.stat().st_size >= BLOCK_BYTES else largest.absolute().parent
    measured = doctor(target, n_threads=options.n_threads or n_cores(), tell=tell)
    return machine_speeds(
        measured, max(by_type, key=lambda t: by_type[t]), sum(by_type.values()) // len(model.pieces),
        disk_bytes_per_second=options.disk_bytes_per_second,
    )  # fmt: skip


def _own_speeds(path: str | Path, options: EngineOptions, tell: Callable[[str], None]) -> MachineSpeeds:
    found = speeds_here(path, options, tell)
    if isinstance(found, Unmeasured):
        raise BoardError(f"this machine's speeds cannot be measured: {found.why}")
    return found
