"""`moe-edge serve`: answer programs that speak OpenAI's, Anthropic's or Ollama's interface."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import (
    CACHING,
    EVERYDAY,
    MODEL,
    TOKENS,
    Number,
    SectionedCommand,
    Size,
    model_options,
    open_engine,
    option,
    prompt_cache_options,
    sampling_of,
    sampling_options,
    workers_option,
)


@click.command("serve", cls=SectionedCommand)
@click.argument("model", required=False, type=MODEL)
@click.option("-m", "--model", "model_option", type=MODEL, help="The model, as an option.")
@option(EVERYDAY, "--host", default="127.0.0.1", show_default=True,
        help="Address to listen at; one that others can reach needs --api-key.")
@option(EVERYDAY, "--port", type=Number(0, 65535, whole=True), default=8080, show_default=True, help="0: any free one.")
@option(EVERYDAY, "--alias", help="What lists call the model. Default: its file's name.")
@option(EVERYDAY, "-n", "--max-tokens", "n_tokens", type=TOKENS, default=0, show_default=True,
        help="Tokens of a reply whose request names no limit; 0: as many as the context holds.")
@option(EVERYDAY, "--queue", type=Number(0, 10_000, whole=True), default=8, show_default=True,
        help="Requests that may wait; more are told to come again.")
@option(EVERYDAY, "--api-key", envvar="MOE_EDGE_API_KEY", help="Needed as `Authorization: Bearer` or `x-api-key`.")
@option(EVERYDAY, "--no-api-key", is_flag=True, help="Let everybody in who reaches --host.")
@option(EVERYDAY, "--cors", multiple=True, metavar="ORIGIN", help="Pages of this origin may ask; several times, or *.")
@option(EVERYDAY, "--log-json", is_flag=True, help="One JSON object for each request, instead of a line.")
@option(CACHING, "--held-conversations", type=Size(), default="auto", show_default=True,
        help="Memory for conversations of several clients beside the one that runs; 0: none.")
@model_options
@workers_option
@prompt_cache_options("on")
@sampling_options
def command(
    model: str | None, model_option: str | None, host: str, port: int, alias: str | None, n_tokens: int, queue: int,
    api_key: str | None, no_api_key: bool, cors: tuple[str, ...], log_json: bool, **o: Any,
) -> None:  # fmt: skip
    """Serve MODEL to programs: OpenAI's, Anthropic's and Ollama's interfaces. Without MODEL, the embedded tiny one.

    docs/SERVER.md lists the paths and what each client needs.
    """
    # Before the engine is made: what the server takes is memory of the program, and the plan counts it.
    from moe_edge.runner.serve.engine_model import EngineModel
    from moe_edge.runner.serve.server import ServerOptions, serve

    options = ServerOptions(host, port, queue, api_key, no_api_key, cors, log_json)
    path = model or model_option

    def open_model() -> EngineModel:
        engine = open_engine(path, o)
        try:
            engine.load()
            name = alias or Path(path or "tiny-moe").stem.removesuffix(".gguf")
            return EngineModel(engine, name=name, defaults=sampling_of(o), n_tokens=n_tokens)
        except BaseException:
            engine.close()
            raise

    try:
        serve(options, open_model, terminal.say)
    except KeyboardInterrupt:
        return  # asked to end while the model was loaded: that is no failure
    except SystemExit as e:
        if e.code != 128 + signal.SIGTERM:
            raise
