"""`moe-edge eval`: perplexity of a text, and KLD from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import MODEL, SectionedCommand, engine_options, model_options, print_result


@click.command("eval", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("-m", "--model", "model_option", type=MODEL, help="The model, as an option.")
@click.option("-f", "--text", type=click.Path(path_type=Path), required=True, help="The text to predict.")
@click.option("--reference", default="exact", show_default=True,
              help="What KLD is measured against: exact, the same model under the exact policy; or another model.")
@click.option("--chunks", "n_chunks", type=click.IntRange(min=1), help="At most so many chunks of the text.")
@click.option("--decode", is_flag=True, help="One token at a time, so that policy and speed are those of decode.")
@click.option("--json", "as_json", is_flag=True)
@model_options
def command(
    model: str | None, model_option: str | None, text: Path, reference: str, n_chunks: int | None, decode: bool,
    as_json: bool, **o: Any,
) -> None:  # fmt: skip
    """Perplexity of MODEL on a text, and its KLD from the exact policy or another model.

    Chunks of -c tokens (512), of which the second half counts, as llama.cpp's perplexity does it.
    """
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.evaluate import evaluate

    result = evaluate(
        model or model_option or tiny_model_path(), text, engine_options(o), reference=reference,
        n_ctx=o["n_ctx"] or 512, n_chunks=n_chunks, one_by_one=decode, verify=o["verify"],
        tell=terminal.say,
    )  # fmt: skip
    print_result(result.to_json() if as_json else result.text())
