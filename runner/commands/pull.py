"""`moe-edge pull`: will a model of the hub run here, and if so, bring it."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.core import ParameterSource
from moe_edge.models.errors import UsageError
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import THREADS, TOKENS, SectionedCommand, Size, print_result

THEN = "--then"


class PullCommand(SectionedCommand):
    """What follows `--then convert` is convert's, and not looked at here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if THEN in args:
            at = args.index(THEN)
            if args[at + 1 : at + 2] != ["convert"]:
                raise UsageError("--then knows one thing to do: --then convert -o NAME.gguf ...")
            ctx.meta[THEN], args = args[at + 2 :], args[:at]
        return super().parse_args(ctx, args)


@click.command("pull", cls=PullCommand)
@click.argument("name", metavar="USER/REPO[:QUANT]")
@click.option("--ram", "--budget", "ram", type=Size(), default="auto", show_default=True, help="To plan with.")
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0, help="To plan with.")
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0, help="To plan with.")
@click.option("--plan-only", is_flag=True, help="Fetch headers, say whether it will run, and stop.")
@click.option("--best", is_flag=True, help="Instead of QUANT: the largest of the repository that runs here well.")
@click.option("-y", "--yes", is_flag=True, help="Download even what will not run here.")
@click.option("--json", "as_json", is_flag=True, help="The plan and the paths as JSON.")
@click.option("--check", is_flag=True, help="With --then: read every file once more at the end, for its SHA-256.")
@click.option(THEN, "then", metavar="convert ...",
              help="Convert layer by layer instead, keeping two layers; what follows are convert's options.")
@click.pass_context
def command(
    ctx: click.Context, name: str, ram: int | None, n_ctx: int, n_threads: int, plan_only: bool, best: bool, yes: bool,
    as_json: bool, check: bool, then: str | None,
) -> None:  # fmt: skip
    """Download a model of the hub, after a look at its header: will it run here, how fast, which quant is the best.

    Goes on where an earlier pull stopped. Exit status 1 when it will not run on this machine.
    """
    from moe_edge.runner.hub.client import Hub
    from moe_edge.runner.hub.names import hub_name
    from moe_edge.runner.hub.progress import shown_progress
    from moe_edge.runner.hub.pull import best_choice, fetch, find_choice, missing_bytes, other_choices, plan_choice

    wanted = hub_name(name)
    if wanted is None:
        raise UsageError(f"{name}: is no name of the hub; give one like unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M")
    if THEN in ctx.meta:
        from moe_edge.runner.commands.pulled_conversion import pull_and_convert

        given = [each for each in ctx.params if ctx.get_parameter_source(each) is ParameterSource.COMMANDLINE]
        if unused := sorted(set(given) - {"name", "check", "as_json"}):
            names = ", ".join("--" + {"n_ctx": "ctx-size", "n_threads": "threads"}.get(each, each) for each in unused)
            raise UsageError(f"{names.replace('_', '-')} before --then does nothing: that model is made, not planned")
        pull_and_convert(Hub(), wanted, ctx.meta[THEN], check, as_json)
        return
    if check:
        raise UsageError("--check is for --then convert; a plain pull compares the SHA-256 always")
    hub, options = Hub(), {"ram_bytes": ram, "n_ctx": n_ctx, "n_threads": n_threads}
    choice = find_choice(hub, wanted)
    if best:
        found = best_choice(hub, other_choices(choice), terminal.say, **options)
        if found is None:
            terminal.say(f"nothing in {wanted.repo} runs on this machine")
            sys.exit(1)
        choice, plan = found
    else:
        plan = plan_choice(hub, choice, **options)
    left = missing_bytes(hub, choice)
    size = f"{choice.nbytes / 1e9:.2f} GB, {left / 1e9:.2f} GB to download"
    terminal.say(f"{choice.name}: {len(choice.files)} file(s), {size}")
    result: dict[str, Any] = {"name": choice.name, "bytes": choice.nbytes, "left_bytes": left, "plan": plan.to_json()}
    if not as_json:
        terminal.say(plan.text())
    if not plan.will_run and not best:
        terminal.say(f"another quant may: moe-edge pull {wanted.repo} --best")
    if plan_only or (not plan.will_run and not yes):
        if as_json:
            print_result(result)
        sys.exit(0 if plan.will_run else 1)
    try:
        with shown_progress(left, terminal.say) as progress:
            path = fetch(hub, choice, progress)
    except KeyboardInterrupt:
        terminal.say(f"stopped; what has come stays: moe-edge pull {choice.name} goes on from there")
        raise
    print_result({**result, "path": str(path)} if as_json else str(path))
    terminal.say(f"talk to it: moe-edge chat {choice.name}")
    sys.exit(0 if plan.will_run else 1)
