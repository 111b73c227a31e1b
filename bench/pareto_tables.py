"""The rows of bench/pareto.py as tables, CSV and pictures."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pareto_points import Point
from pareto_settings import (
    OURS,
)

# ---- tables and pictures -----------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # heading -> (key, format)
    "pair": ("pair", str),
    "model": ("model", str),
    "what": ("family", str),
    "setting": ("setting", str),
    "bits": ("bits", "{:.3f}".format),
    "KLD source": ("kld_source", "{:.5f}".format),
    "± ": ("kld_source_se", "{:.5f}".format),
    "p99 ": ("kld_source_p99", "{:.4f}".format),
    "top-1 ": ("top1_source", "{:.2%}".format),
    "KLD exact": ("kld_exact", "{:.5f}".format),
    "±": ("kld_exact_se", "{:.5f}".format),
    "top-1": ("top1_exact", "{:.2%}".format),
    "KiB/token": ("bytes_per_token", lambda value: f"{value / 1024:.1f}"),
    "hits": ("hit_rate", "{:.1%}".format),
    "low": ("low_share", "{:.1%}".format),
    "skip": ("skip_share", "{:.1%}".format),
    "wanted high": ("wanted_high_share", "{:.1%}".format),
    "tok/s": ("tok_s", "{:.0f}".format),
    "front": ("front", lambda value: "*" if value else ""),
}
NOT_IN_STATIC = {"pair", "KiB/token", "hits", "low", "skip", "wanted high", "front", "tok/s"}

Row = dict[str, Any]


def points_of(rows: Iterable[Row], family: str, size: str, kld: str) -> list[Point]:
    return [(row[size], row[kld]) for row in rows if row["family"] == family]



def table(rows: Sequence[Row], part: str) -> str:
    """Markdown, with the columns that some row has."""
    shown = {h: c for h, c in COLUMNS.items() if any(c[0] in row for row in rows)}
    if part == "static":
        shown = {h: c for h, c in shown.items() if h not in NOT_IN_STATIC}
    lines = ["| " + " | ".join(h.strip() for h in shown) + " |", "|" + "---|" * len(shown)]
    for row in rows:
        cells = [form(row[key]) if key in row else "" for key, form in shown.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    heads = list(dict.fromkeys(key for row in rows for key in row if key not in ("saving", "kld_tokens")))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, heads, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, part: str, rows: Sequence[Row], title: str) -> bool:
    """A line for each family, and in `dynamic` and `ablation` a panel for each pair. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = list(dict.fromkeys(row.get("pair", "") for row in rows))
    size, kld = ("bits", "kld_source") if part == "static" else ("bytes_per_token", "kld_source")
    kld = "kld_exact" if part == "ablation" else kld
    figure, panels = pyplot.subplots(1, len(pairs), figsize=(9 * len(pairs), 6.5), squeeze=False)
    for pair, axes in zip(pairs, panels[0], strict=True):
        mine = [row for row in rows if row.get("pair", "") == pair and row[kld] > 0]
        for i, family in enumerate(dict.fromkeys(row["family"] for row in mine)):
            scale = 1 if part == "static" else 1024
            points = sorted((x / scale, y) for x, y in points_of(mine, family, size, kld))
            style = "-" if family.startswith(("exact", *OURS, "global", "uniform")) else ":"
            colour = pyplot.get_cmap("tab20")(i % 20)
            axes.plot(*zip(*points, strict=True), style, marker="os^vDP*X<>"[i % 10], label=family, color=colour)
        axes.set(yscale="log", title=f"{title} {pair}".strip(), ylabel=f"mean KLD from {kld[4:]}, nats a token")
        axes.set_xlabel("bits a weight" if part == "static" else "KiB of experts read a token")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return True
