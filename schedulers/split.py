"""How much of the experts' memory is for packed experts."""

from __future__ import annotations

import re

from moe_edge.models.errors import UsageError
from moe_edge.schedulers.budget import parse_bytes
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.packed import PackedSizes, check_packed_bytes


def asked_packed_bytes(asked: str, arena_bytes: int) -> int | None:
    """`off`, a size like 400MiB or a share of the arena like 50% -> bytes; None for `auto`. Raises UsageError."""
    if asked in ("off", "auto"):
        return 0 if asked == "off" else None
    share = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", asked)
    if share and float(share[1]) <= 100:
        return int(arena_bytes * float(share[1]) / 100)
    if share:
        raise UsageError(f"--packed-cache {asked}: is more than the whole memory of the experts; give 0% to 100%")
    try:
        return parse_bytes(asked)
    except UsageError as e:
        raise UsageError(f"--packed-cache '{asked}' is none of off, auto, a size like 400MiB, a share like 50%") from e


def choose_packed_bytes(asked: str, layout: Layout, sizes: PackedSizes, arena_bytes: int) -> int:
    """Bytes of the packed cache; none when all experts fit whole. Raises UsageError for one that does not fit."""
    nbytes = asked_packed_bytes(asked, arena_bytes)
    if not nbytes:
        return 0
    check_packed_bytes(layout, sizes, layout.total_bytes, 2 * sizes.largest_bytes)  # that there are packed experts
    if arena_bytes >= layout.total_bytes:
        return 0
    check_packed_bytes(layout, sizes, arena_bytes, nbytes)
    return nbytes
