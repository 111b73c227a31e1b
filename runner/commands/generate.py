"""`moe-edge generate`: continue a text."""

from __future__ import annotations

from typing import Any

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    MODEL,
    SOME_TOKENS,
    SectionedCommand,
    model_options,
    open_engine,
    prompt_cache_options,
    sampling_of,
    sampling_options,
    workers_option,
)


@click.command("generate", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("-m", "--model", "model_option", type=MODEL, help="The model, as an option.")
@click.option("-p", "--prompt", required=True, help="The text to continue; - reads standard input.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, default=128, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--special/--no-special", default=True, show_default=True,
              help="Whether names of control tokens in the prompt, like <|im_start|>, are those tokens, or letters.")
@model_options
@workers_option
@prompt_cache_options("off")
@sampling_options
def command(
    model: str | None, model_option: str | None, prompt: str, n_tokens: int, as_json: bool, special: bool, **o: Any
) -> None:
    """Continue a prompt with MODEL and print text and statistics."""
    from moe_edge.runner.generate import generate as run

    if prompt == "-":
        prompt = terminal.read_stdin()

    with open_engine(model or model_option, o) as engine:
        result = run(
            engine, prompt, n_tokens, sampling_of(o), on_text=None if as_json else terminal.reply, special=special
        )
        if as_json:
            terminal.write_json(result.to_json(engine))
        else:
            terminal.write("")
            terminal.say(result.line())
            for line in engine.board_lines():
                terminal.say(line)
