"""`moe-edge doctor`: measure this machine."""

from __future__ import annotations

from pathlib import Path

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import THREADS, SectionedCommand, print_result


@click.command("doctor", cls=SectionedCommand)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--json", "as_json", is_flag=True)
def command(path: Path | None, n_threads: int, fresh: bool, as_json: bool) -> None:
    """Measure this machine: the storage PATH is on, memory, compute, limits; and name its traps.

    A line that begins with COSTS has what it costs and what mends it below it.
    """
    from moe_edge.runner.measure.doctor import doctor as run
    from moe_edge.runner.measure.doctor_text import doctor_text

    facts = run(path, n_threads=n_threads, fresh=fresh, tell=terminal.say)
    print_result(facts if as_json else doctor_text(facts))
