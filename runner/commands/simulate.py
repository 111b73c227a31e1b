"""`moe-edge simulate`: policies and cache rules on a recorded trace."""

from __future__ import annotations

from pathlib import Path

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import SectionedCommand, parse_disk_speed, print_result
from moe_edge.schedulers.budget import parse_bytes


@click.command("simulate", cls=SectionedCommand)
@click.argument("trace_file", type=click.Path(path_type=Path))
@click.option("--ram", "--budget", "ram", help="Budgets, like 1GiB,2GiB. Default: five between floor and resident.")
@click.option("--policy", default="all", show_default=True, help="Policies, like exact,hobbit; all.")
@click.option("--cache",
              help="Cache rules, like lru,learned; all. Default: auto; with --policy all, every rule for exact.")
@click.option("--lookahead", default="off", show_default=True,
              help="Look-aheads, like off,stacked; all. Needs their scores in the trace, and says how good these are.")
@click.option("--packed-cache", default="off", show_default=True,
              help="Packed caches to try, like off,auto,50%; the trace must be of a packed store.")
@click.option("--unpack", default="4GB/s", show_default=True,
              help="What all threads together make of packed experts, in bytes of whole ones.")
@click.option("--atomic", is_flag=True,
              help="Take a prompt's step for one event too: none of its experts makes room for another.")
@click.option("--disk", default="3GB/s", show_default=True, help="What the disk delivers.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table as PNG.")
@click.option("--json", "as_json", is_flag=True)
def command(
    trace_file: Path, ram: str | None, policy: str, cache: str | None, lookahead: str, packed_cache: str,
    unpack: str, atomic: bool, disk: str, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Hits, bytes, stall and speed of every policy and cache rule on a trace, with Belady's bound; no model is needed.

    reads/belady: bytes read, as a multiple of the fewest possible at that budget.
    """
    from moe_edge.runner.measure.record import load_trace
    from moe_edge.runner.measure.simulation import (
        budget_of_ram,
        even_budgets,
        policies_named,
        run_simulations,
    )
    from moe_edge.runner.measure.simulation_plot import need_matplotlib, plot_simulation
    from moe_edge.schedulers.replay.simulate import Costs

    if plot is not None:
        need_matplotlib()
    recorded = load_trace(trace_file)
    budgets = even_budgets(recorded, atomic=atomic)
    if ram:
        budgets = [budget_of_ram(recorded, parse_bytes(each)) for each in ram.split(",")]
    chosen = policies_named(policy, caches=cache, lookaheads=lookahead)
    packed = [each.strip() for each in packed_cache.split(",")]
    costs = Costs(parse_disk_speed(disk), unpack_bytes_per_second=parse_disk_speed(unpack))
    result = run_simulations(recorded, budgets, chosen, costs, packed=packed, atomic=atomic, tell=terminal.say)
    if plot is not None:
        plot_simulation(result, plot)
    print_result(result.to_json() if as_json else result.text())
