"""`moe-edge rm`: remove a model from the cache."""

from __future__ import annotations

import sys

import click
from moe_edge.models.errors import UsageError
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import SectionedCommand


@click.command("rm", cls=SectionedCommand)
@click.argument("name", metavar="USER/REPO[:QUANT]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(name: str, yes: bool) -> None:
    """Remove a pulled model; without QUANT, all of the repository. Bytes that another file shares stay."""
    from moe_edge.runner.hub.hub_cache import find_removable, remove
    from moe_edge.runner.hub.names import hub_name

    wanted = hub_name(name)
    if wanted is None:
        raise UsageError(f"{name}: is no name of the hub; `moe-edge ls` lists them")
    models = find_removable(wanted)
    total = sum(each.nbytes for each in models)
    files = ", ".join(each.files[0].name for each in models)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{name}: would remove {files}; say --yes to do it")
        if not click.confirm(f"Remove {files}, {total / 1e9:.2f} GB?", default=False, err=True):
            sys.exit(1)
    freed = sum(remove(each) for each in models)
    terminal.say(f"removed {files}: {freed / 1e9:.2f} GB freed")
