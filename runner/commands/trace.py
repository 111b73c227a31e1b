"""`moe-edge trace`: record which experts a text is routed to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from moe_edge.models.errors import UsageError, printable
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import MODEL, SOME_TOKENS, SectionedCommand, model_options, open_engine


@click.command("trace", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("-f", "--text", type=click.Path(path_type=Path), required=True, help="The text to route.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The trace to write, .npz.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, help="At most so many tokens of the text.")
@click.option("--prefill", is_flag=True, help="In micro-batches, as a prompt is read. Default: one by one.")
@click.option("--lookahead-depth", type=click.IntRange(0, 8),
              help="Keep what the routers of so many later layers predict; 0: nothing. Default: 3, 0 with --prefill.")
@model_options
def command(
    model: str | None, text: Path, output: Path, n_tokens: int | None, prefill: bool, lookahead_depth: int | None,
    **o: Any,
) -> None:  # fmt: skip
    """Write which experts MODEL routes each token of a text to, for `simulate` and `plan`.

    With gate weights, and with the scores that the routers of the next layers give ahead, for `simulate --lookahead`.
    The policy runs while the trace is recorded, without look-ahead of its own.
    """
    from moe_edge.runner.measure.logits import read_text
    from moe_edge.runner.measure.record import prediction_width, record_trace, save_trace

    if prefill and lookahead_depth:
        raise UsageError("look-ahead is recorded one token at a time; leave out --prefill, or --lookahead-depth")
    depth = lookahead_depth if lookahead_depth is not None else 0 if prefill else 3
    o["lookahead"] = "off"
    with open_engine(model, o) as engine:
        recorded = record_trace(
            engine, read_text(text), n_tokens, one_by_one=not prefill, policy=engine.options.policy,
            look_ahead=(depth, prediction_width(engine)) if depth else None,
        )  # fmt: skip
    save_trace(output, recorded)
    ahead = f", look-ahead of {depth} layers" if depth else ""
    terminal.write(
        f"{printable(str(output))}: {recorded.n_tokens} tokens, {recorded.n_steps} layer steps{ahead}, "
        f"{output.stat().st_size} bytes"
    )
