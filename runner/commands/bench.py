"""`moe-edge bench`: measure this machine with a model."""

from __future__ import annotations

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    MODEL,
    THREADS,
    TOKENS,
    SectionedCommand,
    Size,
    parse_disk_speed,
    print_result,
)


@click.command("bench", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("--ram", "--budget", "ram", multiple=True, type=Size(), help="A budget to run at; may be given again. "
              "Default: a quarter of the experts, a half, and all where they fit.")
@click.option("-n", "--max-tokens", "n_tokens", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--disk", help="Read experts as a disk of this speed would, like 440MB/s.")
@click.option("--json", "as_json", is_flag=True)
def command(
    model: str | None, ram: tuple[int | None, ...], n_tokens: int, n_ctx: int, n_ubatch: int, n_threads: int,
    disk: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure this machine with MODEL and print a block to paste."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.bench import bench as run
    from moe_edge.runner.measure.bench import markdown
    from moe_edge.runner.memory import auto_budget_bytes
    from moe_edge.schedulers.budget import format_bytes

    wanted = [auto_budget_bytes() if n is None else n for n in ram]
    result = run(
        model or tiny_model_path(), {f"--ram {format_bytes(n)}": n for n in wanted} or None, n_tokens,
        n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, tell=terminal.say,
        pace_bytes_per_second=parse_disk_speed(disk) if disk else None,
    )  # fmt: skip
    print_result(result if as_json else markdown(result))
