"""`moe-edge show`: what a model is and what memory it needs."""

from __future__ import annotations

from pathlib import Path

import click
from moe_edge.runner.commands.parameters import MODEL, THREADS, TOKENS, SectionedCommand, print_result


@click.command("show", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("--json", "as_json", is_flag=True)
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--calibration", is_flag=True, help="Say what was measured when MODEL was converted with --calibrate.")
@click.option("--picture", type=click.Path(path_type=Path),
              help="Draw the calibration, layers x experts, into this file (.png, .svg, .pdf).")
def command(
    model: str | None, as_json: bool, n_ctx: int, n_ubatch: int, n_threads: int, calibration: bool,
    picture: Path | None,
) -> None:  # fmt: skip
    """Say what MODEL is, and how much memory it needs at the least, comfortably, and for everything."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.show import calibration_text, describe, describe_calibration, describe_text

    if calibration or picture is not None:
        facts = describe_calibration(model or tiny_model_path())
        if picture is not None:
            from moe_edge.runner.calibrate.picture import draw_calibration

            draw_calibration(facts, picture)
        print_result(facts if as_json else calibration_text(facts))
        return
    facts = describe(model or tiny_model_path(), n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads)
    print_result(facts if as_json else describe_text(facts))
