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
    MODEL,
    SOME_TOKENS,
    SectionedCommand,
    ask,
    can_ask,
    model_options,
    open_engine,
    option,
    prompt_cache_options,
    sampling_of,
    sampling_options,
    workers_option,
)


@click.command("chat", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("-m", "--model", "model_option", type=MODEL, help="The model, as an option.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, default=512, show_default=True)
@click.option("--think", type=click.Choice(["on", "off", "auto"]), default="auto", show_default=True,
              help="Whether a model that can is to think before it answers; auto: as it is used to.")
@click.option("--reasoning-effort", type=click.Choice(["low", "medium", "high"]),
              help="How hard, where the model has degrees.")
@click.option("--chat-template-kwargs", metavar="JSON", help="More for the chat template, as a JSON object.")
@click.option("--system", "system_text", help="What the model is told before all.")
@option(EVERYDAY, "--session", metavar="FILE", help="Go on with the conversation in FILE; keep it there.")
@model_options
@workers_option
@prompt_cache_options("on")
@sampling_options
def command(
    model: str | None, model_option: str | None, n_tokens: int, think: str, reasoning_effort: str | None,
    chat_template_kwargs: str | None, system_text: str | None, session: str | None, **o: Any,
) -> None:  # fmt: skip
    """Talk to MODEL: a converted model, or a stock GGUF as it is. Without MODEL, one of the cache or of the hub
    is offered on a terminal; else it is the embedded tiny one.

    A pipe on standard input is one shot: its text is the message.
    """
    from moe_edge.runner.chat import Chat
    from moe_edge.runner.chat_commands import THINK, run_command
    from moe_edge.runner.hub.offer import offer_model
    from moe_edge.runner.thinking import parse_settings, thinking_settings

    told = thinking_settings(THINK[think], reasoning_effort)
    if chat_template_kwargs is not None:
        told |= parse_settings(chat_template_kwargs, "--chat-template-kwargs")
    path = Path(session) if session else None
    before = None
    if path is not None:
        from moe_edge.runner.kv.session import check_session

        before = check_session(path)
        o["prompt_cache"] = "off"  # the session is where this conversation is kept
    chosen: str | Path | None = model or model_option
    if chosen is None and can_ask():
        chosen = offer_model(ask, terminal.say)
    with open_engine(chosen, o) as engine:
        if chosen is None and not can_ask():
            offer_model(None, terminal.say)
        chat = Chat(engine, n_tokens, sampling_of(o), template_kwargs=told)
        with _kept(path, before, chat):
            if system_text:
                run_command(chat, f"/system {system_text}")
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
