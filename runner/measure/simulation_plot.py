"""The picture of `moe-edge simulate`: hits, bytes and speed of every row against the memory of the experts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.measure.simulation import BELADY, SimRow, Simulation
from moe_edge.schedulers.budget import MIB


def need_matplotlib() -> Any:
    """The module. Raises UsageError with the command that installs it."""
    try:
        return importlib.import_module("matplotlib")
    except ImportError as e:
        raise UsageError("--plot needs matplotlib; install it: pip install 'moe-edge[bench]'") from e


def curve_label(row: SimRow) -> str:
    """`belady`, `exact, learned`, `exact, learned, stacked`."""
    packed = ["packed cache"] if row.packed_bytes else []
    ahead = [row.lookahead] * (row.lookahead != "off")
    return ", ".join([row.policy, *([row.cache] if row.cache else []), *ahead, *packed])


def plot_simulation(simulation: Simulation, path: str | Path) -> None:
    """A PNG: hit rate, bytes a token and tokens a second against the arena, a line for each curve_label().

    Raises UsageError without matplotlib.
    """
    need_matplotlib().use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    panels: tuple[tuple[str, Callable[[SimRow], float]], ...] = (
        ("hits, %", lambda row: 100 * row.hit_rate),
        ("MB read a token", lambda row: row.bytes_per_token / 1e6),
        ("tokens/s (estimated)", lambda row: row.tok_s),
    )
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4))
    curves: dict[str, list[SimRow]] = {}
    for row in sorted(simulation.rows, key=lambda row: row.arena_bytes):
        curves.setdefault(curve_label(row), []).append(row)
    for axes, (label, value) in zip(all_axes, panels, strict=True):
        for name, rows in curves.items():
            how: dict[str, Any] = {"color": "black", "linestyle": "--"} if name == BELADY else {}
            axes.plot([row.arena_bytes / MIB for row in rows], list(map(value, rows)), marker=".", label=name, **how)
        axes.set(xlabel="expert arena, MiB", ylabel=label, ylim=(0, None))
    all_axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.suptitle(f"{simulation.model}, {simulation.tokens} tokens")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
