"""What the planner of the packed cache says of a model on this machine: for `plan`, and for --packed-cache auto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from moe_edge.models.formats.floats import Float64Array
from moe_edge.models.formats.ggml_types import main_type
from moe_edge.models.store.experts import Piece
from moe_edge.models.store.planes import main_codec
from moe_edge.models.store.store import ExpertModel
from moe_edge.runner.measure.doctor import kept_speeds, n_cores
from moe_edge.runner.measure.probe import unpack_bytes_per_second
from moe_edge.schedulers.budget import format_bytes
from moe_edge.schedulers.estimate import MachineSpeeds, typical_hit_rate
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.packed import PackedSizes
from moe_edge.schedulers.split import Split, SplitCosts, chances_of_hits, plan_split


def typical_chances(n_experts: int, n_used: int) -> Float64Array:
    """[E]: chances by rank of a model that nobody has traced, as plan's typical hit rates have them."""
    shares = [i / n_experts for i in range(n_experts + 1)]
    return chances_of_hits([(x, typical_hit_rate(x, n_used / n_experts).expected) for x in shares], n_experts, n_used)


def split_costs(layout: Layout, stored_share: float, speeds: MachineSpeeds) -> SplitCosts:
    """Of this model's mean expert. stored_share: what it takes in its file over what it takes in memory."""
    unit = float(np.mean(layout.unit_bytes[:: layout.n_levels]))
    return SplitCosts(
        use=unit / min(speeds.compute, speeds.memory), unpack=unit / speeds.unpack,
        read=unit * stored_share / speeds.disk, other=speeds.layer_seconds,
    )  # fmt: skip


def find_split(
    layout: Layout, sizes: PackedSizes, arena_bytes: int, n_used: int, stored_share: float, speeds: MachineSpeeds,
    chances: Float64Array | None = None,
) -> Split:  # fmt: skip
    """The planner's split with these speeds. chances: by rank, of a trace; else those of typical models."""
    if chances is None:
        chances = typical_chances(max(layout.n_experts), n_used)
    return plan_split(layout, sizes, arena_bytes, n_used, chances, split_costs(layout, stored_share, speeds))


def auto_split(
    model: ExpertModel, layout: Layout, sizes: PackedSizes, arena_bytes: int, n_threads: int,
    disk_bytes_per_second: float | None,
) -> tuple[int, str]:  # fmt: skip
    """(bytes of the packed cache, a sentence on why) for --packed-cache auto.

    Measures how fast this machine unpacks, which takes a tenth of a second; what else it takes `doctor` must have
    measured before, and where it has not there is no packed cache.
    """
    expert_type, piece_bytes = _main_type(model.pieces)
    speeds = kept_speeds(model.files[0], expert_type, piece_bytes, disk_bytes_per_second=disk_bytes_per_second)
    if speeds is None:
        return 0, "packed cache auto: none, since this machine's speeds are not known; moe-edge doctor measures them"
    codec = main_codec(model.pieces, expert_type)
    speeds = replace(speeds, unpack=unpack_bytes_per_second(expert_type, codec, n_threads or n_cores()))
    share = model.stored_expert_bytes / model.expert_bytes
    found = find_split(layout, sizes, arena_bytes, model.n_expert_used, share, speeds)
    if found.packed_bytes == 0:
        return 0, "packed cache auto: none, whole experts are as fast on this machine"
    return found.packed_bytes, (
        f"packed cache auto: {format_bytes(found.packed_bytes)}, planned to decode {found.gain:.2f} times as fast"
    )


def _main_type(pieces: Sequence[Piece]) -> tuple[int, int]:
    """(ggml type of most bytes, mean stored bytes of a piece of it)."""
    main = main_type((piece.type, piece.nbytes) for piece in pieces)
    stored = [piece.stored_bytes for piece in pieces if piece.type == main]
    return main, sum(stored) // len(stored)
