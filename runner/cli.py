"""The command line: thin. It parses, calls, prints, and turns our errors into one sentence and an exit status."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click
from moe_edge.models.errors import MoeEdgeError, UsageError
from moe_edge.schedulers.budget import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes, or `auto` (None)."""

    name = "SIZE|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if not isinstance(value, str):
            return int(value)
        if value == "auto":
            return None
        try:
            return parse_bytes(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


def reports_errors(f: F) -> F:
    """Our errors leave as `moe-edge: <sentence>` on stderr with their exit status; Ctrl-C as 130."""

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return f(*args, **kwargs)
        except MoeEdgeError as e:
            click.echo(f"moe-edge: {e}", err=True)
            sys.exit(e.exit_status)
        except KeyboardInterrupt:
            click.echo("moe-edge: interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:  # who read our output has gone; the flush at exit must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return run  # type: ignore[return-value]


def read_stdin() -> str:
    """All of standard input, whatever its bytes: what is not UTF-8 reaches the tokenizer as it came."""
    return sys.stdin.buffer.read().decode(errors="surrogateescape")


def model_options(f: F) -> F:
    for option in reversed(
        [
            click.option("--ram", "--budget", "ram", type=Size(), default="auto", show_default=True,
                         help="All memory the model may take: 6GiB, 800MiB, auto."),
            click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=0), default=0,
                         help="Context in tokens; 0: 4096, or what the model was trained for if that is less."),
            click.option("-t", "--threads", "n_threads", type=click.IntRange(min=0), default=0,
                         help="Compute threads; 0: one for each core."),
            click.option("-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(min=0), default=0,
                         help="Micro-batch of the prefill, in tokens; 0: 512, less for tiny models."),
            click.option("--flash-attn/--no-flash-attn", "flash_attn", default=None,
                         help="Default: on when plain attention would need over 64 MiB."),
            click.option("--policy", default="exact", show_default=True, help="How experts are scheduled."),
            click.option("--verify", is_flag=True, help="Check every tensor of the store against its checksum first."),
        ]
    ):  # fmt: skip
        f = option(f)
    return f


def sampling_options(f: F) -> F:
    for option in reversed(
        [
            click.option("--temp", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 is greedy."),
            click.option("--top-k", type=int, default=40, show_default=True),
            click.option("--top-p", type=float, default=0.95, show_default=True),
            click.option("--min-p", type=float, default=0.05, show_default=True),
            click.option("--repeat-penalty", type=float, default=1.0, show_default=True),
            click.option("-s", "--seed", type=int, default=None),
        ]
    ):
        f = option(f)
    return f


def _sampling(o: dict[str, Any]) -> Any:
    from moe_edge.runner.generate import Sampling

    return Sampling(o["temp"], o["top_k"], o["top_p"], o["min_p"], o["repeat_penalty"], o["seed"])


def _engine(model: str | None, o: dict[str, Any]) -> Any:
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.engine import Engine, EngineOptions

    options = EngineOptions(
        ram_bytes=o["ram"], n_ctx=o["n_ctx"], n_ubatch=o["n_ubatch"], n_threads=o["n_threads"], policy=o["policy"],
        seed=o.get("seed"), flash_attn=o["flash_attn"], charge_program=True,
    )  # fmt: skip
    engine = Engine(model or tiny_model_path(), options, verify=o["verify"])
    for line in engine.plan.lines():
        click.echo(line, err=True)
    return engine


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOE_EDGE"})
@click.version_option(metadata.version("moe-edge"), prog_name="moe-edge")
def main() -> None:
    """Run Mixture-of-Experts language models on machines whose memory is too small for them."""


@main.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-n", "--max-tokens", "n_tokens", type=click.IntRange(min=1), default=512, show_default=True)
@model_options
@sampling_options
@reports_errors
def chat(model: str | None, model_option: str | None, n_tokens: int, **o: Any) -> None:
    """Talk to MODEL: a converted model, or a stock GGUF as it is. Without MODEL, the embedded tiny one.

    A pipe on standard input is one shot: its text is the message.
    """
    from moe_edge.runner.chat import Chat

    with _engine(model or model_option, o) as engine:
        session = Chat(engine, n_tokens, _sampling(o))
        if sys.stdin.isatty():
            session.loop()
            return
        message = read_stdin().rstrip("\n")
        if not message.strip():
            raise UsageError("nothing on standard input; type a message, or run it in a terminal")
        session.reply(message)


@main.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-p", "--prompt", required=True, help="The text to continue; - reads standard input.")
@click.option("-n", "--max-tokens", "n_tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@model_options
@sampling_options
@reports_errors
def generate(
    model: str | None, model_option: str | None, prompt: str, n_tokens: int, as_json: bool, **o: Any
) -> None:
    """Continue a prompt with MODEL and print text and statistics."""
    from moe_edge.runner.generate import generate as run

    if prompt == "-":
        prompt = read_stdin()

    def show(text: str) -> None:
        click.echo(text, nl=False)

    with _engine(model or model_option, o) as engine:
        result = run(engine, prompt, n_tokens, _sampling(o), on_text=None if as_json else show)
        if as_json:
            click.echo(json.dumps(result.to_json(engine), ensure_ascii=False))
        else:
            click.echo()
            click.echo(result.line(), err=True)


@main.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True)
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=0), default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(min=0), default=0)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=0), default=0)
@reports_errors
def show(model: str | None, as_json: bool, n_ctx: int, n_ubatch: int, n_threads: int) -> None:
    """Say what MODEL is, and how much memory it needs at the least, comfortably, and for everything."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.show import describe, describe_text

    facts = describe(model or tiny_model_path(), n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads)
    click.echo(json.dumps(facts) if as_json else describe_text(facts))


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The skeleton to write; the store goes beside.")
@click.option("--type", "type_", help="Quantize the experts to this ggml type (Q4_K, Q8_0, ...). Default: keep.")
@click.option("--dense-type", help="Type of the dense matrices. Default: Q8_0 when --type quantizes a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=0), default=0)
@reports_errors
def convert(
    source: Path, output: Path | None, type_: str | None, dense_type: str | None, dry_run: bool, force: bool,
    as_json: bool, n_threads: int,
) -> None:  # fmt: skip
    """Turn SOURCE, a Hugging Face directory or a GGUF, into a skeleton and an expert store."""
    from moe_edge.runner.convert import convert_and_prove

    if output is None and not dry_run:
        raise UsageError("where to? give -o NAME.gguf (or --dry-run to see the plan)")
    report = convert_and_prove(
        source, output, type=type_, dense_type=dense_type, dry_run=dry_run, overwrite=force, threads=n_threads or None
    )
    click.echo(json.dumps(report.to_json()) if as_json else report.text())


@main.command()
@click.argument("model", required=False)
@click.option("--ram", "--budget", "ram", multiple=True, type=Size(), help="A budget to run at; may be given again. "
              "Default: a quarter of the experts, a half, and all where they fit.")
@click.option("-n", "--max-tokens", "n_tokens", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=0), default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(min=0), default=0)
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=0), default=0)
@click.option("--json", "as_json", is_flag=True)
@reports_errors
def bench(
    model: str | None, ram: tuple[int | None, ...], n_tokens: int, n_ctx: int, n_ubatch: int, n_threads: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure this machine with MODEL and print a block to paste."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.bench import bench as run
    from moe_edge.runner.bench import markdown
    from moe_edge.runner.memory import auto_budget_bytes
    from moe_edge.schedulers.budget import format_bytes

    wanted = [auto_budget_bytes() if n is None else n for n in ram]
    result = run(
        model or tiny_model_path(), {f"--ram {format_bytes(n)}": n for n in wanted} or None, n_tokens,
        n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, tell=lambda text: click.echo(text, err=True),
    )  # fmt: skip
    click.echo(json.dumps(result) if as_json else markdown(result))


if __name__ == "__main__":
    main()
