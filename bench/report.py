"""From the passes of all workers to rows, and from rows to a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_edge.models.errors import UsageError

MIB = 1 << 20
COLD, WARM = "cold", "warm"


@dataclass(frozen=True)
class Case:
    """One memory cap and one disk speed; None: none."""

    cap_bytes: int | None
    disk_bytes_per_second: int | None

    @property
    def cap(self) -> str:
        return "none" if self.cap_bytes is None else f"{self.cap_bytes / MIB:.0f} MiB"

    @property
    def disk(self) -> str:
        return "as it is" if self.disk_bytes_per_second is None else f"{self.disk_bytes_per_second / 1e6:.0f} MB/s"


@dataclass(frozen=True)
class Sample:
    """One text decoded by one worker, or the reason why there is none (`missing`)."""

    case: Case
    arm: str
    state: str
    round: int
    text: int
    values: dict[str, Any] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """All samples of a case, arm and state. `numbers`: a metric's name -> its spread, where it was measured."""

    case: Case
    arm: str
    state: str
    n: int
    numbers: dict[str, Spread]
    missing: str = ""


def _engine_share(part: str, whole: str) -> Callable[[dict[str, Any]], float | None]:
    def share(v: dict[str, Any]) -> float | None:
        decode = v["decode"]
        return decode[part] / decode[whole] if decode.get(whole) else None

    return share


def _per_token(counter: str, factor: float, phase: str = "decode") -> Callable[[dict[str, Any]], float | None]:
    def each(v: dict[str, Any]) -> float | None:
        value = v[phase].get(counter)
        return None if value is None else value * factor / (v["n_decoded"] if phase == "decode" else 1)

    return each


METRICS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "tok_s": lambda v: v["tok_s"],
    "tpot_ms": lambda v: 1e3 * v["tpot_median_s"],
    "tpot_p90_ms": lambda v: 1e3 * v["tpot_p90_s"],
    "tpot_mean_ms": lambda v: 1e3 * v["tpot_mean_s"],
    "ttft_s": lambda v: v["ttft_s"],
    "load_s": lambda v: v["load_s"],
    "load_ttft_s": lambda v: v["load_s"] + v["ttft_s"],
    "disk_mib_token": _per_token("disk_bytes", 1 / MIB),
    "disk_mib_prefill": _per_token("disk_bytes", 1 / MIB, "prefill"),
    "expert_mib_token": _per_token("bytes_read", 1 / MIB),
    "major_faults_token": _per_token("major_faults", 1),
    "stall_ms_token": _per_token("stall_seconds", 1e3),
    "compute_ms_token": _per_token("compute_seconds", 1e3),
    "schedule_ms_token": _per_token("schedule_seconds", 1e3),
    "hit_rate": _engine_share("hits", "uses"),
    "peak_rss_mib": lambda v: v["peak_rss_bytes"] / MIB,
    "cgroup_peak_mib": lambda v: None if v["cgroup_peak_bytes"] is None else v["cgroup_peak_bytes"] / MIB,
    "cached_mib": lambda v: None if v["cached_bytes"] is None else v["cached_bytes"] / MIB,
    "nll": lambda v: v["nll"],
    "same_argmax": lambda v: v.get("same_argmax"),
}


def make_rows(samples: Iterable[Sample]) -> list[Row]:
    """Rows in the order in which their first samples come, cold before warm."""
    groups: dict[tuple[Case, str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.case, sample.arm, sample.state), []).append(sample)
    cases = list(dict.fromkeys(case for case, _, _ in groups))
    ordered = sorted(groups.items(), key=lambda item: (cases.index(item[0][0]), item[0][2] != COLD))
    return [_row(case, arm, state, members) for (case, arm, state), members in ordered]


def _row(case: Case, arm: str, state: str, samples: list[Sample]) -> Row:
    measured = [sample.values for sample in samples if not sample.missing]
    numbers = {}
    for name, metric in METRICS.items():
        values = [value for value in map(metric, measured) if value is not None]
        if values:
            numbers[name] = Spread.of(values)
    missing = next((sample.missing for sample in samples if sample.missing), "")
    return Row(case, arm, state, len(measured), numbers, missing)


COLUMNS = {  # heading -> (metric, format)
    "tok/s": ("tok_s", "{:.2f}"),
    "TPOT ms": ("tpot_ms", "{:.1f}"),
    "p90": ("tpot_p90_ms", "{:.1f}"),
    "TTFT s": ("ttft_s", "{:.2f}"),
    "load s": ("load_s", "{:.2f}"),
    "disk MiB/token": ("disk_mib_token", "{:.1f}"),
    "stall ms": ("stall_ms_token", "{:.1f}"),
    "hits": ("hit_rate", "{:.0%}"),
    "RSS MiB": ("peak_rss_mib", "{:.0f}"),
    "file pages MiB": ("cached_mib", "{:.0f}"),
    "same argmax": ("same_argmax", "{:.1%}"),
    "NLL": ("nll", "{:.4f}"),
}
SPREAD = ("tok/s", "TPOT ms", "TTFT s")


def table(rows: Sequence[Row]) -> str:
    """Markdown; the median, and (lowest - highest) where it matters."""
    heads = ["cap", "disk", "arm", "cache", "n", *COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    notes: dict[str, None] = {}
    for row in rows:
        cells = [row.case.cap, row.case.disk, row.arm, row.state, str(row.n)]
        cells += [_cell(row, heading) for heading in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
        if row.missing:
            notes[f"N/A: {row.case.cap}, {row.case.disk}, {row.arm}: {row.missing}"] = None
    return "\n".join([*lines, "", *notes]).rstrip()


def _cell(row: Row, heading: str) -> str:
    metric, form = COLUMNS[heading]
    spread = row.numbers.get(metric)
    if spread is None:
        return "N/A"
    text = form.format(spread.median)
    if heading in SPREAD and row.n > 1:
        text += f" ({form.format(spread.low)}-{form.format(spread.high)})"
    return text


def ratios(rows: Sequence[Row], arm: str = "moe-edge") -> list[str]:
    """One line for each case, state and other arm: how `arm` compares."""
    lines = []
    found = {(row.case, row.state, row.arm): row for row in rows if row.numbers}
    for (case, state, other), theirs in found.items():
        ours = found.get((case, state, arm))
        if other == arm or ours is None:
            continue
        text = f"cap {case.cap}, disk {case.disk}, {state}: {arm} against {other}: "
        text += f"{_ratio(ours, theirs, 'tok_s'):.2f}x tok/s, {_ratio(theirs, ours, 'ttft_s'):.2f}x TTFT"
        if state == COLD:
            text += f", {_ratio(theirs, ours, 'load_ttft_s'):.2f}x load + TTFT"
        lines.append(text)
    return lines


def _ratio(above: Row, below: Row, metric: str) -> float:
    divisor = below.numbers[metric].median
    return above.numbers[metric].median / divisor if divisor else float("inf")


def engine_lines(rows: Sequence[Row], disk_speed: dict[Case, float | None]) -> list[str]:
    """Where moe-edge's token time goes, and how near it is to what disk and compute allow."""
    lines = []
    for row in rows:
        n = {name: spread.median for name, spread in row.numbers.items()}
        if "stall_ms_token" not in n or "tpot_mean_ms" not in n:
            continue
        text = (
            f"moe-edge, cap {row.case.cap}, disk {row.case.disk}, {row.state}: of {n['tpot_mean_ms']:.1f} ms a token "
            f"{n['compute_ms_token']:.1f} compute, {n['stall_ms_token']:.1f} stall, "
            f"{n['schedule_ms_token']:.2f} schedule ({n['schedule_ms_token'] / n['tpot_mean_ms']:.1%})"
        )
        speed = disk_speed.get(row.case)
        if speed and n["expert_mib_token"] > 0 and n["stall_ms_token"] > 0:
            disk_ms = n["expert_mib_token"] * MIB / speed * 1e3
            floor_ms = max(n["tpot_mean_ms"] - n["stall_ms_token"], disk_ms)
            text += (
                f"; bytes over stall: {disk_ms / n['stall_ms_token']:.0%} of the disk's speed"
                f" (above 100 %: reads overlap computing)"
                f"; token time {n['tpot_mean_ms'] / floor_ms:.2f}x the larger of computing and reading alone"
            )
        lines.append(text)
    return lines


def write_csv(path: Path, rows: Sequence[Row], facts: dict[str, str]) -> None:
    """Append the rows; a new file gets a header. Each metric has its median, lowest and highest value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    heads = [*facts, "cap", "disk", "arm", "cache", "n", "missing", *names]
    if path.exists() and path.read_text().split("\n", 1)[0].split(",") != heads:
        raise UsageError(f"{path}: has other columns than this version writes; move it away")
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow({**facts, **_csv_cells(row)})


def _csv_cells(row: Row) -> dict[str, object]:
    cells: dict[str, object] = {"cap": row.case.cap, "disk": row.case.disk, "arm": row.arm, "cache": row.state}
    cells |= {"n": row.n, "missing": row.missing}
    for name, spread in row.numbers.items():
        values = {"": spread.median, "_low": spread.low, "_high": spread.high}
        cells |= {f"{name}{end}": f"{value:.6g}" for end, value in values.items()}
    return cells


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def need_matplotlib() -> None:
    """Raises UsageError with the command that installs it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib; install it: pip install matplotlib") from error


def plot(path: Path, rows: Sequence[Row], title: str, n_bytes_resident: int) -> None:
    """tok/s against the cap: a line for each arm, cold (dashed) and warm; bars from the lowest to the highest.

    Rows without a cap are drawn at the right end.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    no_cap = 1.15 * max([n_bytes_resident, *(row.case.cap_bytes or 0 for row in rows)]) / MIB
    series: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "tok_s" in row.numbers:
            series.setdefault((row.arm, row.case.disk, row.state), []).append(row)
    colours = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(arm for arm, _, _ in series))}
    for (arm, disk, state), members in series.items():
        at = [row.case.cap_bytes / MIB if row.case.cap_bytes else no_cap for row in members]
        points = sorted(zip(at, (row.numbers["tok_s"] for row in members), strict=True), key=lambda point: point[0])
        middle = [spread.median for _, spread in points]
        below = [spread.median - spread.low for _, spread in points]
        above = [spread.high - spread.median for _, spread in points]
        style = "--" if state == COLD else "-"
        axes.errorbar(
            [cap for cap, _ in points], middle, yerr=[below, above], label=f"{arm}, {state}, disk {disk}",
            color=colours[arm], linestyle=style, marker="o", capsize=3,
        )  # fmt: skip
    axes.axvline(n_bytes_resident / MIB, color="grey", linewidth=0.8)
    if any(row.case.cap_bytes is None for row in rows):
        axes.text(no_cap, 0, "no cap", ha="center", va="bottom", color="grey")
    axes.set(xlabel="memory cap, MiB (grey line: the model file)", ylabel="tokens/s", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
