"""`moe-edge worker`: compute some layers of a model for a client."""

from __future__ import annotations

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    EVERYDAY,
    MODEL,
    THREADS,
    TUNING,
    Number,
    SectionedCommand,
    Size,
    option,
    parse_disk_speed,
)


@click.command("worker", cls=SectionedCommand)
@click.argument("model", type=MODEL)
@option(EVERYDAY, "--ram", "--budget", "ram", type=Size(), default="auto", show_default=True,
        help="All memory that its part of the model may take: 6GiB, 800MiB, auto.")
@option(EVERYDAY, "--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@option(EVERYDAY, "--port", type=Number(0, 65535, whole=True), default=50052, show_default=True,
        help="The port; 0 chooses a free one.")
@option(EVERYDAY, "--listen-anywhere", is_flag=True,
        help="Allow an address that other machines reach. There is no password: whoever reaches it may use the board.")
@option(EVERYDAY, "-t", "--threads", "n_threads", type=THREADS, default=0, help="Compute threads; 0: each core.")
@option(TUNING, "--pace", metavar="SPEED", help="Read experts as a disk of this speed would, like 440MB/s.")
def command(
    model: str, ram: int | None, host: str, port: int, listen_anywhere: bool, n_threads: int, pace: str | None
) -> int:
    """Compute layers of MODEL for a client, which names this board in --workers."""
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.runner.prove import LOADS
    from moe_edge.runner.workers.serving import serve
    from moe_edge.runner.workers.wire import Address

    options = EngineOptions(
        ram_bytes=ram, n_threads=n_threads, disk_bytes_per_second=parse_disk_speed(pace) if pace else None,
        proof=LOADS, charge_program=True, repack="off",
    )  # fmt: skip
    return serve(model, options, Address(host, port), anywhere=listen_anywhere, tell=terminal.say)
