"""`moe-edge completion`: the Tab key of a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import SectionedCommand

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_MOE_EDGE_COMPLETE"  # click's name for it: the program's, in capitals
# bash takes a colon for the end of a word, which cuts user/repo:QUANT in two.
COLONS = "COMP_WORDBREAKS=${COMP_WORDBREAKS//:}\n"


@click.command("completion", cls=SectionedCommand)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, and models of the cache at the Tab key.

    \b
    bash  eval "$(moe-edge completion bash)" in ~/.bashrc
    zsh   eval "$(moe-edge completion zsh)" in ~/.zshrc, after compinit
    fish  moe-edge completion fish > ~/.config/fish/completions/moe-edge.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    completion = kind(ctx.find_root().command, {}, "moe-edge", VARIABLE)
    text = completion.source_template % completion.source_vars()
    terminal.write((COLONS if shell == "bash" else "") + text.strip())
