"""`moe-edge simulate`: policies and budgets tried on a recorded trace, beside Belady's bound; table, JSON and picture.

No model, no disk: schedulers/simulate.py says what is exact (the counts) and what is estimated (the times).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BudgetTooSmall, UnknownName, UsageError
from moe_edge.schedulers.belady import has_one_size, simulate_belady
from moe_edge.schedulers.budget import MIB, arena_floor_bytes, format_arg, format_bytes, plan_memory
from moe_edge.schedulers.calibration import Calibration
from moe_edge.schedulers.options import POLICY_NAMES, PolicyOptions
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.simulate import Costs, SimResult, simulate_policy
from moe_edge.schedulers.trace import Trace

BELADY = "belady"


@dataclass(frozen=True)
class SimBudget:
    """Bytes of the expert arena, and the --ram they were worked out from, if any."""

    arena_bytes: int
    ram_bytes: int | None = None


@dataclass(frozen=True)
class SimRow:
    """One policy at one budget. policy: the name, then the options that are not the default ones.

    arena_share: of all experts at the high level. bytes_per_token: read from disk. low_share, skipped_share: of the
    expert uses, skipped ones included. reads_to_belady: loads over those of the row `belady` at this budget.
    """

    policy: str
    ram_bytes: int | None
    arena_bytes: int
    arena_share: float
    hit_rate: float
    low_share: float
    skipped_share: float
    loads: int
    evictions: int
    bytes_per_token: float
    stall_ms_per_token: float
    tok_s: float
    reads_to_belady: float | None


@dataclass(frozen=True)
class Simulation:
    """All rows, budget by budget, and what was left out, one sentence each. tokens: of the trace.

    belady_exact: experts have one size; else the rows `belady` are a heuristic (schedulers/belady.py).
    """

    model: str
    tokens: int
    decode_only: bool
    costs: Costs
    belady_exact: bool
    rows: tuple[SimRow, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """A table for people."""
        kind = "one token at a time" if self.decode_only else "with micro-batches of several tokens"
        lines = [
            f"{self.model}: {self.tokens} tokens, {kind}; disk {self.costs.disk_bytes_per_second / 1e6:.0f} MB/s; "
            "counts are exact, times estimated",
            "",
        ]
        table = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(_HEAD))]
        for cells in table:
            first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  ".join([cells[0].ljust(widths[0]), *others]).rstrip() if first else "")
        if not self.belady_exact:
            lines += ["", "experts differ in size: the belady rows are a heuristic, not a bound"]
        return "\n".join([*lines, *(f"left out: {sentence}" for sentence in self.left_out)])


_HEAD = (
    "policy", "--ram", "experts", "share", "hits", "low", "skipped", "MB/token", "stall ms", "tok/s", "reads/belady",
)  # fmt: skip


def _cells(row: SimRow) -> tuple[str, ...]:
    return (
        row.policy,
        "-" if row.ram_bytes is None else format_bytes(row.ram_bytes),
        format_bytes(row.arena_bytes),
        f"{row.arena_share:.1%}",
        f"{row.hit_rate:.1%}",
        f"{row.low_share:.1%}",
        f"{row.skipped_share:.1%}",
        f"{row.bytes_per_token / 1e6:.2f}",
        f"{row.stall_ms_per_token:.2f}",
        f"{row.tok_s:.2f}",
        "-" if row.reads_to_belady is None else f"{row.reads_to_belady:.3f}",
    )


def run_simulations(
    trace: Trace,
    budgets: Sequence[SimBudget],
    policies: Sequence[PolicyOptions],
    costs: Costs | None = None,
    *,
    calibration: Calibration | None = None,
    belady: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Simulation:
    """Every policy at every budget, from an empty arena, with Belady's bound first at each.

    A policy that this model or its calibration cannot serve is left out, and `left_out` says why; so is one at a budget
    that is below what it needs. tell: called with a line of progress before each run.
    Raises BudgetTooSmall for an arena below the floor, UsageError when nothing is left to run.
    """
    costs = costs or Costs()
    floor = arena_floor_bytes(trace.layout())
    for budget in budgets:
        if budget.arena_bytes < floor:
            raise BudgetTooSmall(
                f"an expert arena of {format_arg(budget.arena_bytes)} is too small: {trace.model} needs "
                f"{format_arg(floor)}, one expert for each MoE layer", floor,
            )  # fmt: skip
    usable, left_out = _usable(trace, policies, calibration)
    if not budgets or not (usable or belady):
        raise UsageError("nothing to simulate: " + ("; ".join(left_out) or "no budget or no policy was given"))
    rows: list[SimRow] = []
    for budget in budgets:
        best = None
        if belady:
            tell(f"{BELADY}, experts {format_bytes(budget.arena_bytes)}")
            best = simulate_belady(trace, budget.arena_bytes, costs)
            rows.append(_row(trace, BELADY, budget, best, best))
        for options in usable:
            tell(f"{policy_label(options)}, experts {format_bytes(budget.arena_bytes)}")
            try:
                result = simulate_policy(trace, options, budget.arena_bytes, costs, calibration)
            except BudgetTooSmall as e:
                left_out.append(f"{policy_label(options)} at experts {format_bytes(budget.arena_bytes)}: {e}")
                continue
            rows.append(_row(trace, policy_label(options), budget, result, best))
    return Simulation(
        model=trace.model,
        tokens=trace.n_tokens,
        decode_only=trace.decode_only,
        costs=costs,
        belady_exact=has_one_size(trace),
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


def _usable(
    trace: Trace, policies: Sequence[PolicyOptions], calibration: Calibration | None
) -> tuple[list[PolicyOptions], list[str]]:
    layout = trace.layout()
    usable, left_out = [], []
    for options in policies:
        try:
            make_policy(options, layout, layout.total_bytes, calibration)
        except UnknownName:
            raise
        except UsageError as e:
            left_out.append(f"{policy_label(options)}: {e}")
        else:
            usable.append(options)
    return usable, left_out


def _row(trace: Trace, name: str, budget: SimBudget, result: SimResult, best: SimResult | None) -> SimRow:
    asked = result.uses + result.skipped_uses or 1
    return SimRow(
        policy=name,
        ram_bytes=budget.ram_bytes,
        arena_bytes=budget.arena_bytes,
        arena_share=budget.arena_bytes / trace.layout().total_bytes,
        hit_rate=result.hit_rate,
        low_share=result.low_uses / asked,
        skipped_share=result.skipped_uses / asked,
        loads=result.loads,
        evictions=result.evictions,
        bytes_per_token=result.bytes_per_token,
        stall_ms_per_token=1e3 * result.stall_seconds / result.tokens,
        tok_s=result.tok_s,
        reads_to_belady=result.loads / best.loads if best and best.loads else None,
    )


def policy_label(options: PolicyOptions) -> str:
    """`dymoe`, or `dymoe retention=0.75` where options differ from the default ones."""
    default = PolicyOptions(options.name)
    changed = [
        f"{field.name}={getattr(options, field.name)}"
        for field in fields(options)
        if getattr(options, field.name) != getattr(default, field.name)
    ]
    return " ".join([options.name, *changed])


def policies_named(names: str, options: PolicyOptions | None = None) -> list[PolicyOptions]:
    """'exact,dymoe' -> their options; 'all': every known policy with its default options.

    options: knobs for the named ones; its own name is not looked at. Raises UnknownName.
    """
    if names.strip() == "all":
        return [PolicyOptions(name) for name in POLICY_NAMES]
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in POLICY_NAMES:
            raise UnknownName(f"unknown policy '{name}'; known: all, {', '.join(POLICY_NAMES)}")
    return [replace(options or PolicyOptions(), name=name) for name in chosen]


def budget_of_ram(trace: Trace, ram_bytes: int) -> SimBudget:
    """What --ram leaves for the experts, as the engine that recorded the trace would split it.

    Raises BudgetTooSmall with the number that would work, UsageError for a trace without the model's fixed sizes.
    """
    if trace.fixed is None:
        raise UsageError(f"the trace of {trace.model} does not say what the model needs besides its experts; "
                         "give the bytes of the expert arena instead")  # fmt: skip
    plan = plan_memory(ram_bytes, trace.fixed, trace.layout(), trace.n_used)
    return SimBudget(plan.arena_bytes, ram_bytes)


def even_budgets(trace: Trace, n: int = 5) -> list[SimBudget]:
    """n arenas from the floor to all experts in memory, in equal steps of whole bytes."""
    layout = trace.layout()
    floor = arena_floor_bytes(layout)
    top = max(floor, layout.total_bytes)
    return [SimBudget(floor + (top - floor) * i // max(1, n - 1)) for i in range(n)]


# ---- picture -----------------------------------------------------------------------------------------------


def need_matplotlib() -> Any:
    """The module. Raises UsageError with the command that installs it."""
    try:
        return importlib.import_module("matplotlib")
    except ImportError as e:
        raise UsageError("--plot needs matplotlib; install it: pip install 'moe-edge[bench]'") from e


def plot_simulation(simulation: Simulation, path: str | Path) -> None:
    """A PNG: hit rate, bytes a token and tokens a second against the arena, a line for each policy.

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
    names = dict.fromkeys(row.policy for row in simulation.rows)
    for axes, (label, value) in zip(all_axes, panels, strict=True):
        for name in names:
            rows = sorted((row for row in simulation.rows if row.policy == name), key=lambda row: row.arena_bytes)
            at, style = [row.arena_bytes / MIB for row in rows], "--" if name == BELADY else "-"
            axes.plot(at, [value(row) for row in rows], style, marker="o", label=name)
        axes.set(xlabel="expert arena, MiB", ylabel=label, ylim=(0, None))
    all_axes[0].legend()
    figure.suptitle(f"{simulation.model}, {simulation.tokens} tokens")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
