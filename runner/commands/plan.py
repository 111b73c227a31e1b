"""`moe-edge plan`: will it run here, and how fast."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    MODEL,
    SOME_TOKENS,
    THREADS,
    TOKENS,
    SectionedCommand,
    Size,
    parse_disk_speed,
    print_result,
    split_option,
)
from moe_edge.schedulers.workers import Split


@click.command("plan", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("--ram", "--budget", "ram", type=Size(), default="auto", show_default=True)
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--prompt-tokens", "n_prompt", type=SOME_TOKENS, default=512, help="Of the first token. Default: 512.")
@click.option("--disk", help="What the disk delivers, like 440MB/s. Default: as `doctor` measured it.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Take the hits from this trace.")
@click.option("--workers", metavar="HOST[:PORT],...", help="Plan for these boards together; see `moe-edge worker`.")
@split_option
@click.option("--json", "as_json", is_flag=True)
def command(
    model: str | None, ram: int | None, n_ctx: int, n_ubatch: int, n_threads: int, n_prompt: int,
    disk: str | None, trace_file: Path | None, workers: str | None,
    split: Split, as_json: bool,
) -> None:  # fmt: skip
    """Say before loading whether MODEL will run, how its memory is split, and how fast it will be.

    Reads headers only. Exit status 1 when it will not run.
    """
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.plan import plan as run
    from moe_edge.runner.measure.record import load_trace

    if workers:
        _plan_boards(str(model or tiny_model_path()), workers, n_ctx, n_ubatch, n_threads, split, as_json)
        return
    result = run(
        model or tiny_model_path(), ram, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads,
        n_prompt=n_prompt, disk_bytes_per_second=parse_disk_speed(disk) if disk else None,
        trace=load_trace(trace_file) if trace_file else None, tell=terminal.say,
    )  # fmt: skip
    print_result(result.to_json() if as_json else result.text())
    sys.exit(0 if result.will_run else 1)


def _plan_boards(
    model: str, workers: str, n_ctx: int, n_ubatch: int, n_threads: int, split: Split, as_json: bool
) -> None:
    from moe_edge.runner.measure.boards_plan import plan_boards
    from moe_edge.runner.workers.wire import parse_addresses

    result = plan_boards(
        model, parse_addresses(workers), n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, split=split,
        tell=terminal.say,
    )
    print_result(result.to_json() if as_json else result.text())
    sys.exit(0 if result.will_run else 1)
