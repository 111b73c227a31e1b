"""The command line: this file only registers the commands, which are one file each in runner/commands.

What is printed goes through terminal.py; start.py turns what is raised into one sentence and an exit status.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands import (
    bench,
    chat,
    completion,
    convert,
    docs,
    doctor,
    evaluate,
    generate,
    ls,
    plan,
    pull,
    rm,
    serve,
    service,
    show,
    simulate,
    trace,
    worker,
)
from moe_edge.runner.commands.first_steps import first_steps


class Commands(click.Group):
    """Click catches Ctrl-C and a pipe's lost reader itself, and prints; here they come out as they are."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 1


@click.group(
    cls=Commands, invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOE_EDGE"},
)  # fmt: skip
@click.version_option(metadata.version("moe-edge"), prog_name="moe-edge")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run Mixture-of-Experts language models on machines whose memory is too small for them."""
    if ctx.invoked_subcommand is None:
        terminal.write(first_steps())


for module in (
    chat, generate, serve, worker, service, pull, ls, rm, convert, show, plan, doctor, bench, evaluate, trace, simulate,
    docs, completion,
):  # fmt: skip
    main.add_command(module.command)
