"""`moe-edge plan --workers`: what several boards would do together. Each is asked for its speeds; the network is
probed; nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BoardError
from moe_edge.models.formats.ggml_types import main_type
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.loading import Loading
from moe_edge.runner.measure.doctor import doctor, is_measured, machine_speeds, n_cores, probed_file
from moe_edge.runner.measure.probe import Unmeasured
from moe_edge.runner.prove import LOADS
from moe_edge.runner.sizes import sizes_of
from moe_edge.runner.workers.board import Board, Network
from moe_edge.runner.workers.chosen_layers import block_work, speeds_of
from moe_edge.runner.workers.part import content_id
from moe_edge.runner.workers.wire import Address
from moe_edge.runner.workers.worker import versions
from moe_edge.schedulers.boards_forecast import (
    BoardForecast,
    BoardsForecast,
    BoardSpeeds,
    forecast_boards,
    grow,
    stops_paying_at,
)
from moe_edge.schedulers.boards_split import split_by_speed
from moe_edge.schedulers.budget import format_arg, format_bytes
from moe_edge.schedulers.estimate import MachineSpeeds
from moe_edge.schedulers.workers import AUTO, MEMORY, SPEED, Split, exact_split


@dataclass(frozen=True)
class BoardsPlan:
    """addresses, networks: of the boards of `forecast`, in order. grown: 1, 2, ... boards like the first.

    split: as it was asked for. by_memory: the same boards when only their memory decides.
    """

    model: str
    addresses: tuple[str, ...]
    networks: tuple[Network, ...]
    split: Split
    forecast: BoardsForecast
    by_memory: BoardsForecast
    grown: tuple[BoardsForecast, ...]

    @property
    def will_run(self) -> bool:
        return self.forecast.will_run

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "will_run": self.will_run, "tokens_per_second": self.forecast.tokens_per_second,
            "client_seconds": self.forecast.client_seconds, "split": _said(self.split),
            "layer_counts": _counts(self.forecast), "by_memory": {
                "layer_counts": _counts(self.by_memory), "tokens_per_second": self.by_memory.tokens_per_second,
            },
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

    def _split_line(self) -> str:
        counts, others = (",".join(map(str, _counts(each))) for each in (self.forecast, self.by_memory))
        how = {SPEED: "the fastest for these boards", MEMORY: "in proportion to memory"}
        line = f"layers {counts}: {how.get(_said(self.split), 'as --split says')}"
        if counts == others:
            return line if self.split == MEMORY else f"{line}, which is in proportion to memory as well"
        speed = f"{self.by_memory.tokens_per_second:.1f} tok/s" if self.by_memory.will_run else "too little memory"
        return f"{line}; in proportion to memory it would be {others} and {speed}"

    def text(self) -> str:
        lines = [f"{self.model} on {len(self.addresses)} boards", self._split_line()]
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


def _said(split: Split) -> str:
    return split if isinstance(split, str) else ",".join(map(str, split))


def _counts(forecast: BoardsForecast) -> list[int]:
    return [len(each.layers) for each in forecast.boards]


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
    split: Split = SPEED,
    tell: Callable[[str], None] = lambda _: None,
) -> BoardsPlan:
    """Ask each worker. split: `auto` is `speed` here, since every board is measured.

    Raises BoardError for one that cannot be asked, UsageError for too many boards or a split that is not the model's.
    """
    options = EngineOptions(n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, repack="off", proof=LOADS)
    sizes, loading = sizes_of(path, options), Loading(path, options)
    model, fixed_bytes = block_work(loading, sizes.layout, sizes.plan.fixed)
    client = _own_speeds(path, options, tell)
    ours, mine = versions(), content_id(loading.model)
    boards: list[BoardSpeeds] = []
    networks: list[Network] = []
    for address in workers:
        board = Board(address)
        try:
            board.check(mine, ours)
            network = board.probe()
            tell(f"board {address}: measuring its disk and processor, unless that was done before")
            boards.append(speeds_of(board, fixed_bytes, network))
        finally:
            board.close()
        networks.append(network)
    split = SPEED if split == AUTO else split
    by_memory = forecast_boards(model, boards, client)
    runs = (
        exact_split(split, model.expert_bytes, len(boards)) if not isinstance(split, str)
        else [each.layers for each in by_memory.boards] if split == MEMORY
        else split_by_speed(model, boards)
    )  # fmt: skip
    return BoardsPlan(
        str(path), tuple(map(str, workers)), tuple(networks), split, forecast_boards(model, boards, client, runs),
        by_memory, tuple(grow(model, boards[0], client)),
    )  # fmt: skip


def speeds_here(path: str | Path, options: EngineOptions, tell: Callable[[str], None]) -> MachineSpeeds | Unmeasured:
    """This machine's, for the experts of a model: measured once and kept, as `doctor` does."""
    model = Loading(path, options).model
    measured = doctor(probed_file(model.files), n_threads=options.n_threads or n_cores(), tell=tell)
    return machine_speeds(
        measured, main_type((piece.type, piece.nbytes) for piece in model.pieces),
        sum(piece.nbytes for piece in model.pieces) // len(model.pieces),
        disk_bytes_per_second=options.disk_bytes_per_second,
    )  # fmt: skip


def are_measured(path: str | Path, options: EngineOptions) -> bool:
    """Whether speeds_here() would only read what was kept."""
    return is_measured(probed_file(Loading(path, options).model.files), n_threads=options.n_threads)


def _own_speeds(path: str | Path, options: EngineOptions, tell: Callable[[str], None]) -> MachineSpeeds:
    found = speeds_here(path, options, tell)
    if isinstance(found, Unmeasured):
        raise BoardError(f"this machine's speeds cannot be measured: {found.why}")
    return found
