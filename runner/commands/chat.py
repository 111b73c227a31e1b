"""`moe-edge chat`: talk to a model in a terminal, or once through a pipe."""

from __future__ import annotations

import sys
from typing import Any

import click
from moe_edge.models.errors import UsageError
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    SOME_TOKENS,
    SectionedCommand,
    model_options,
    open_engine,
    prompt_cache_options,
    sampling_of,
    sampling_options,
)


@click.command("chat", cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, default=512, show_default=True)
@model_options
@prompt_cache_options
@sampling_options
def command(model: str | None, model_option: str | None, n_tokens: int, **o: Any) -> None:
    """Talk to MODEL: a converted model, or a stock GGUF as it is. Without MODEL, the embedded tiny one.

    A pipe on standard input is one shot: its text is the message.
    """
    from moe_edge.runner.chat import Chat

    with open_engine(model or model_option, o) as engine:
        session = Chat(engine, n_tokens, sampling_of(o))
        if sys.stdin.isatty():
            session.loop()
            return
        message = terminal.read_stdin().rstrip("\n")
        if not message.strip():
            raise UsageError("nothing on standard input; type a message, or run it in a terminal")
        session.reply(message)
