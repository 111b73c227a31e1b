"""What is said of several boards: a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.schedulers.budget import format_bytes


def board_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each report of BoardsEngine.board_reports()."""
    return [_line(report) for report in reports]


def _line(r: Mapping[str, Any]) -> str:
    first, last = r["layers"]
    if r["lost"]:
        return str(r["lost"])
    hits = f"{100 * r['expert_hits'] / r['expert_uses']:.0f} %" if r["expert_uses"] else "no"
    return (
        f"board {r['board']}: layers {first} to {last}, {hits} expert hits, "
        f"{format_bytes(r['expert_bytes_read'])} read, "
        f"{r['stall_seconds']:.2f} s stalled of {r['compute_seconds']:.2f} s, network {r['network_seconds']:.2f} s "
        f"({format_bytes(r['bytes_sent'])} there, {format_bytes(r['bytes_received'])} back), memory "
        f"{format_bytes(r['rss_bytes'])}"
    )
