"""The command line: thin. It parses, calls and prints.

What is printed goes through terminal.py; start.py turns what is raised into one sentence and an exit status.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click
from moe_edge.models.errors import UsageError, printable
from moe_edge.runner import terminal
from moe_edge.schedulers.budget import parse_bytes
from moe_edge.schedulers.eviction import ENTRIES as RULE_ENTRIES
from moe_edge.schedulers.lookahead.rules import ENTRIES as LOOKAHEAD_ENTRIES
from moe_edge.schedulers.options import Knob, PolicyOptions
from moe_edge.schedulers.policies import KNOBS, POLICIES, who_listens

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


class Number(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A finite number from least to most; `whole` for one without a fraction."""

    def __init__(self, least: float, most: float, *, whole: bool = False) -> None:
        self.least, self.most, self.whole = least, most, whole
        self.name = "integer" if whole else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        try:
            number = int(value) if self.whole else float(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a {'whole ' if self.whole else ''}number", param, ctx)
        if not self.least <= number <= self.most:
            self.fail(f"{value} is not in the range {self.least:g} to {self.most:g}", param, ctx)
        return number


MOST = 2**31 - 1  # llama.cpp counts tokens in 32 bits
TOKENS = Number(0, MOST, whole=True)
SOME_TOKENS = Number(1, MOST, whole=True)
THREADS = Number(0, 512, whole=True)


def _words(entries: Mapping[str, Any]) -> str:
    """`lru: the one used longest ago; ...` of a registry, for a help text."""
    return "; ".join(f"{name}: {entry.words}" for name, entry in entries.items()) + "."


def _knob_option(knob: Knob) -> Callable[[F], F]:
    """The option of a policy's knob. It gives None when it is not named, so that what was asked for is known."""
    words = f"{', '.join(who_listens(knob))}: {knob.words}."
    if isinstance(knob.default, bool):
        return click.option(knob.option, knob.name, is_flag=True, default=None, help=words)
    default = "" if knob.default is None else f"  [default: {knob.default}]"
    return click.option(knob.option, knob.name, type=str if knob.choices else Number(-1e30, 1e30), help=words + default)


def model_options(f: F) -> F:
    for option in reversed(
        [
            click.option("--ram", "--budget", "ram", type=Size(), default="auto", show_default=True,
                         help="All memory the model may take: 6GiB, 800MiB, auto."),
            click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0,
                         help="Context in tokens; 0: 4096, or what the model was trained for if that is less."),
            click.option("-t", "--threads", "n_threads", type=THREADS, default=0,
                         help="Compute threads; 0: one for each core."),
            click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0,
                         help="Micro-batch of the prefill, in tokens; 0: 512, less for tiny models."),
            click.option("--flash-attn/--no-flash-attn", "flash_attn", default=None,
                         help="Default: on when plain attention would need over 64 MiB."),
            click.option("--policy", default="exact", show_default=True,
                         help=f"How experts are scheduled; all but exact are lossy. {_words(POLICIES)}"),
            *(_knob_option(knob) for knob in KNOBS.values() if not knob.hidden),
            click.option("--cache", default="auto", show_default=True,
                         help=f"Which expert goes when another needs its place. {_words(RULE_ENTRIES)}"),
            click.option("--lookahead", default="off", show_default=True,
                         help=f"Read experts of the next layers early: off, auto. {_words(LOOKAHEAD_ENTRIES)}"),
            click.option("--max-kld", type=Number(-1e30, 1e30),
                         help="The fastest measured setting with at most this KLD (nats a token)."),
            click.option("--warm-start/--no-warm-start", "warm_start", default=False, show_default=True,
                         help="Load the experts that earlier runs used most, and keep the usage of this one."),
            click.option("--verify", is_flag=True, help="Check every tensor of the store against its checksum first."),
        ]
    ):  # fmt: skip
        f = option(f)
    return f


def sampling_options(f: F) -> F:
    for option in reversed(
        [
            click.option("--temp", type=Number(0, 100), default=0.8, show_default=True, help="0 is greedy."),
            click.option("--top-k", type=Number(-1, MOST, whole=True), default=40, show_default=True,
                         help="Only the so many most likely tokens; 0 or -1: all."),
            click.option("--top-p", type=Number(0, 1), default=0.95, show_default=True),
            click.option("--min-p", type=Number(0, 1), default=0.05, show_default=True),
            click.option("--repeat-penalty", type=Number(0.01, 100), default=1.0, show_default=True),
            click.option("--presence-penalty", type=Number(-100, 100), default=0.0, show_default=True),
            click.option("--frequency-penalty", type=Number(-100, 100), default=0.0, show_default=True),
            click.option("-s", "--seed", type=Number(0, 2**32 - 1, whole=True), default=None,
                         help="The same seed, prompt and options give the same text. Default: a new one each time."),
        ]
    ):
        f = option(f)
    return f


def _sampling(o: dict[str, Any]) -> Any:
    from moe_edge.runner.generate import Sampling

    return Sampling(
        o["temp"], o["top_k"], o["top_p"], o["min_p"], o["repeat_penalty"], o["seed"], o["presence_penalty"],
        o["frequency_penalty"],
    )  # fmt: skip


def _policy(o: dict[str, Any]) -> PolicyOptions:
    turned = {name: o[name] for name in KNOBS if o.get(name) is not None}
    return PolicyOptions(o["policy"], cache=o["cache"], lookahead=o["lookahead"], max_kld=o["max_kld"], **turned)


def _engine_options(o: dict[str, Any]) -> Any:
    from moe_edge.runner.engine import EngineOptions

    return EngineOptions(
        ram_bytes=o["ram"], n_ctx=o["n_ctx"], n_ubatch=o["n_ubatch"], n_threads=o["n_threads"], policy=_policy(o),
        seed=o.get("seed"), flash_attn=o["flash_attn"], charge_program=True, warm_start=o["warm_start"],
    )  # fmt: skip


def _engine(model: str | None, o: dict[str, Any]) -> Any:
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.engine import Engine

    engine = Engine(model or tiny_model_path(), _engine_options(o), verify=o["verify"], tell=terminal.say)
    for line in engine.lines():
        terminal.say(line)
    return engine


def _print(result: Any) -> None:
    """Text as it is, anything else as JSON."""
    if isinstance(result, str):
        terminal.write(result)
    else:
        terminal.write_json(result)


class Commands(click.Group):
    """Click catches Ctrl-C and a pipe's lost reader itself, and prints; here they come out as they are."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 1


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MOE_EDGE"})
@click.version_option(metadata.version("moe-edge"), prog_name="moe-edge")
def main() -> None:
    """Run Mixture-of-Experts language models on machines whose memory is too small for them."""


@main.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, default=512, show_default=True)
@model_options
@sampling_options
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
        message = terminal.read_stdin().rstrip("\n")
        if not message.strip():
            raise UsageError("nothing on standard input; type a message, or run it in a terminal")
        session.reply(message)


@main.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-p", "--prompt", required=True, help="The text to continue; - reads standard input.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, default=128, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--special/--no-special", default=True, show_default=True,
              help="Whether names of control tokens in the prompt, like <|im_start|>, are those tokens, or letters.")
@model_options
@sampling_options
def generate(
    model: str | None, model_option: str | None, prompt: str, n_tokens: int, as_json: bool, special: bool, **o: Any
) -> None:
    """Continue a prompt with MODEL and print text and statistics."""
    from moe_edge.runner.generate import generate as run

    if prompt == "-":
        prompt = terminal.read_stdin()

    with _engine(model or model_option, o) as engine:
        result = run(
            engine, prompt, n_tokens, _sampling(o), on_text=None if as_json else terminal.reply, special=special
        )
        if as_json:
            terminal.write_json(result.to_json(engine))
        else:
            terminal.write("")
            terminal.say(result.line())


@main.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True)
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--calibration", is_flag=True, help="Say what was measured when MODEL was converted with --calibrate.")
@click.option("--picture", type=click.Path(path_type=Path),
              help="Draw the calibration, layers x experts, into this file (.png, .svg, .pdf).")
def show(
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
        _print(facts if as_json else calibration_text(facts))
        return
    facts = describe(model or tiny_model_path(), n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads)
    _print(facts if as_json else describe_text(facts))


PROJECTIONS = ("up", "gate", "down")


def type_options(f: F) -> F:
    """--high, --low, and one of each for every projection."""
    for level, meaning in (("low", "a second copy of every expert, for the lossy policies"), ("high", "the experts")):
        for projection in reversed(PROJECTIONS):
            f = click.option(f"--{level}-{projection}", help=f"The same for {projection} alone.")(f)
        names = ("--high", "--type", "high") if level == "high" else ("--low", "low")
        f = click.option(*names, help=f"ggml type of {meaning} (Q4_K, Q2_K, ...).")(f)
    return f


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The skeleton to write; the store goes beside.")
@type_options
@click.option("--bits", type=Number(0.01, 64),
              help="Instead of --high: choose each expert's types so that they take this many bits a weight.")
@click.option("--low-bits", type=Number(0.01, 64), help="The same, instead of --low.")
@click.option("--types", help="What --bits chooses from, like Q2_K,Q3_K,Q4_K.")
@click.option("--calibrate", type=click.Path(path_type=Path), help="A text to measure the experts on.")
@click.option("--calibrate-tokens", type=click.IntRange(min=512), default=16384, show_default=True)
@click.option("--imatrix", type=click.Path(path_type=Path), help="An importance matrix (GGUF) for the quantizer.")
@click.option("--dense-type", help="Type of the dense matrices. Default: Q8_0 if a checkpoint's experts are quantized.")
@click.option("--ram", type=Size(), default="auto", help="Memory for running the model on the text.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
def convert(source: Path, output: Path | None, dry_run: bool, as_json: bool, **o: Any) -> None:
    """Turn SOURCE, a Hugging Face directory or a GGUF, into a skeleton and an expert store."""
    from moe_edge.runner.commands.conversion import ConvertRequest, run_convert

    if output is None and not dry_run:
        raise UsageError("where to? give -o NAME.gguf (or --dry-run to see the plan)")
    overrides = {
        (level, p): o[f"{level}_{p}"] for level in ("high", "low") for p in PROJECTIONS if o[f"{level}_{p}"] is not None
    }
    request = ConvertRequest(
        source, output, high=o["high"], low=o["low"], overrides=overrides, bits=o["bits"], low_bits=o["low_bits"],
        types=o["types"], calibrate=o["calibrate"], calibrate_tokens=o["calibrate_tokens"], imatrix=o["imatrix"],
        dense_type=o["dense_type"], ram_bytes=o["ram"], n_threads=o["n_threads"], dry_run=dry_run, force=o["force"],
    )  # fmt: skip
    report = run_convert(request, tell=terminal.say)
    _print(report.to_json() if as_json else report.text())


@main.command("eval")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", help="The model, as an option.")
@click.option("-f", "--text", type=click.Path(path_type=Path), required=True, help="The text to predict.")
@click.option("--reference", default="exact", show_default=True,
              help="What KLD is measured against: exact, the same model under the exact policy; or another model.")
@click.option("--chunks", "n_chunks", type=click.IntRange(min=1), help="At most so many chunks of the text.")
@click.option("--decode", is_flag=True, help="One token at a time, so that policy and speed are those of decode.")
@click.option("--json", "as_json", is_flag=True)
@model_options
def evaluate_command(
    model: str | None, model_option: str | None, text: Path, reference: str, n_chunks: int | None, decode: bool,
    as_json: bool, **o: Any,
) -> None:  # fmt: skip
    """Perplexity of MODEL on a text, and its KLD from the exact policy or another model.

    Chunks of -c tokens (512), of which the second half counts, as llama.cpp's perplexity does it.
    """
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.evaluate import evaluate

    result = evaluate(
        model or model_option or tiny_model_path(), text, _engine_options(o), reference=reference,
        n_ctx=o["n_ctx"] or 512, n_chunks=n_chunks, one_by_one=decode, verify=o["verify"],
        tell=terminal.say,
    )  # fmt: skip
    _print(result.to_json() if as_json else result.text())


@main.command()
@click.argument("model", required=False)
@click.option("--ram", "--budget", "ram", multiple=True, type=Size(), help="A budget to run at; may be given again. "
              "Default: a quarter of the experts, a half, and all where they fit.")
@click.option("-n", "--max-tokens", "n_tokens", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--disk", help="Read experts as a disk of this speed would, like 440MB/s.")
@click.option("--json", "as_json", is_flag=True)
def bench(
    model: str | None, ram: tuple[int | None, ...], n_tokens: int, n_ctx: int, n_ubatch: int, n_threads: int,
    disk: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure this machine with MODEL and print a block to paste."""
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.bench import bench as run
    from moe_edge.runner.measure.bench import markdown
    from moe_edge.runner.memory import auto_budget_bytes
    from moe_edge.schedulers.budget import format_bytes

    wanted = [auto_budget_bytes() if n is None else n for n in ram]
    result = run(
        model or tiny_model_path(), {f"--ram {format_bytes(n)}": n for n in wanted} or None, n_tokens,
        n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads, tell=terminal.say,
        pace_bytes_per_second=parse_disk_speed(disk) if disk else None,
    )  # fmt: skip
    _print(result if as_json else markdown(result))


@main.command()
@click.argument("model", required=False)
@click.option("-f", "--text", type=click.Path(path_type=Path), required=True, help="The text to route.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The trace to write, .npz.")
@click.option("-n", "--max-tokens", "n_tokens", type=SOME_TOKENS, help="At most so many tokens of the text.")
@click.option("--prefill", is_flag=True, help="In micro-batches, as a prompt is read. Default: one by one.")
@click.option("--lookahead-depth", type=click.IntRange(0, 8),
              help="Keep what the routers of so many later layers predict; 0: nothing. Default: 3, 0 with --prefill.")
@model_options
def trace(
    model: str | None, text: Path, output: Path, n_tokens: int | None, prefill: bool, lookahead_depth: int | None,
    **o: Any,
) -> None:  # fmt: skip
    """Write which experts MODEL routes each token of a text to, for `simulate` and `plan`.

    With gate weights, and with the scores that the routers of the next layers give ahead, for `simulate --lookahead`.
    The policy runs while the trace is recorded, without look-ahead of its own.
    """
    from moe_edge.runner.measure.evaluate import read_text
    from moe_edge.runner.measure.record import prediction_width, record_trace, save_trace

    if prefill and lookahead_depth:
        raise UsageError("look-ahead is recorded one token at a time; leave out --prefill, or --lookahead-depth")
    depth = lookahead_depth if lookahead_depth is not None else 0 if prefill else 3
    o["lookahead"] = "off"
    with _engine(model, o) as engine:
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


def parse_disk_speed(text: str) -> int:
    """'440MB/s' -> bytes a second. Raises UsageError."""
    return parse_bytes(text.removesuffix("/s"))


@main.command()
@click.argument("trace_file", type=click.Path(path_type=Path))
@click.option("--ram", "--budget", "ram", help="Budgets, like 1GiB,2GiB. Default: five between floor and resident.")
@click.option("--policy", default="all", show_default=True, help="Policies, like exact,hobbit; all.")
@click.option("--cache",
              help="Cache rules, like lru,learned; all. Default: auto; with --policy all, every rule for exact.")
@click.option("--lookahead", default="off", show_default=True,
              help="Look-aheads, like off,stacked; all. Needs their scores in the trace, and says how good these are.")
@click.option("--disk", default="3GB/s", show_default=True, help="What the disk delivers.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table as PNG.")
@click.option("--json", "as_json", is_flag=True)
def simulate(
    trace_file: Path, ram: str | None, policy: str, cache: str | None, lookahead: str, disk: str, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Hits, bytes, stall and speed of every policy and cache rule on a trace, with Belady's bound; no model is needed.

    reads/belady: bytes read, as a multiple of the fewest possible at that budget.
    """
    from moe_edge.runner.measure.record import load_trace
    from moe_edge.runner.measure.simulation import (
        budget_of_ram,
        even_budgets,
        need_matplotlib,
        plot_simulation,
        policies_named,
        run_simulations,
    )
    from moe_edge.schedulers.replay.simulate import Costs

    if plot is not None:
        need_matplotlib()
    recorded = load_trace(trace_file)
    budgets = [budget_of_ram(recorded, parse_bytes(each)) for each in ram.split(",")] if ram else even_budgets(recorded)
    chosen = policies_named(policy, caches=cache, lookaheads=lookahead)
    result = run_simulations(
        recorded, budgets, chosen, Costs(parse_disk_speed(disk)), tell=terminal.say
    )
    if plot is not None:
        plot_simulation(result, plot)
    _print(result.to_json() if as_json else result.text())


@main.command()
@click.argument("model", required=False)
@click.option("--ram", "--budget", "ram", type=Size(), default="auto", show_default=True)
@click.option("-c", "--ctx-size", "n_ctx", type=TOKENS, default=0)
@click.option("-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--disk", help="What the disk delivers, like 440MB/s. Default: as `doctor` measured it.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Take the hits from this trace.")
@click.option("--json", "as_json", is_flag=True)
def plan(
    model: str | None, ram: int | None, n_ctx: int, n_ubatch: int, n_threads: int, disk: str | None,
    trace_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Say before loading whether MODEL will run, how its memory is split, and how fast it will be.

    Reads headers only. Exit status 1 when it will not run.
    """
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.measure.plan import plan as run
    from moe_edge.runner.measure.record import load_trace

    result = run(
        model or tiny_model_path(), ram, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=n_threads,
        disk_bytes_per_second=parse_disk_speed(disk) if disk else None,
        trace=load_trace(trace_file) if trace_file else None, tell=terminal.say,
    )  # fmt: skip
    _print(result.to_json() if as_json else result.text())
    sys.exit(0 if result.will_run else 1)


@main.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--json", "as_json", is_flag=True)
def doctor(path: Path | None, n_threads: int, fresh: bool, as_json: bool) -> None:
    """Measure this machine: the storage PATH is on, memory, compute, limits."""
    from moe_edge.runner.measure.doctor import doctor as run
    from moe_edge.runner.measure.doctor import doctor_text

    facts = run(path, n_threads=n_threads, fresh=fresh, tell=terminal.say)
    _print(facts if as_json else doctor_text(facts))


if __name__ == "__main__":
    from moe_edge.runner.start import run

    run(main)
