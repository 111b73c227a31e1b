"""`moe-edge chat`: talk to a model in a terminal, or once through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from moe_edge.models.errors import UsageError
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    EVERYDAY,
    SOME_TOKENS,
    SectionedCommand,
    model_options,
    open_engine,
    option,
    prompt_cache_options,
    sampling_of,
    sampling_options,
)


@click.command("chat", cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, default=512, show_default=True)
@option(EVERYDAY, "--session", metavar="FILE", help="Go on with the conversation in FILE; keep it there.")
@model_options
@prompt_cache_options
@sampling_options
def command(model: str | None, model_option: str | None, n_tokens: int, session: str | None, **o: Any) -> None:
    """Talk to MODEL: a converted model, or a stock GGUF as it is. Without MODEL, the embedded tiny one.

    A pipe on standard input is one shot: its text is the message.
    """
    from moe_edge.runner.chat import Chat

    path = Path(session) if session else None
    before = None
    if path is not None:
        from moe_edge.runner.kv.session import check_session

        before = check_session(path)
        o["prompt_cache"] = "off"  # the session is where this conversation is kept
    with open_engine(model or model_option, o) as engine:
        chat = Chat(engine, n_tokens, sampling_of(o))
        with _kept(path, before, chat):
            if sys.stdin.isatty():
                chat.loop()
                return
            message = terminal.read_stdin().rstrip("\n")
            if not message.strip():
                raise UsageError("nothing on standard input; type a message, or run it in a terminal")
            chat.reply(message)


@contextlib.contextmanager
def _kept(path: Path | None, before: Any, chat: Any) -> Iterator[None]:
    """A session is gone on with at the beginning, and kept however the conversation ends."""
    if path is None:
        yield
        return
    from moe_edge.runner.kv.session import keep, resume

    if before is not None:
        resume(before, chat.engine, chat.conversation, terminal.say)
    try:
        yield
    finally:
        keep(path, chat.engine, chat.conversation)
