"""What several commands share: types of options, the options of a model and of sampling, and how help groups them.

An option belongs to a section of the help text: what everybody uses comes first, then precision, then caching and
reading ahead.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from moe_edge.models.errors import UsageError
from moe_edge.runner import terminal
from moe_edge.schedulers.budget import parse_bytes
from moe_edge.schedulers.eviction import ENTRIES as RULE_ENTRIES
from moe_edge.schedulers.lookahead.rules import ENTRIES as LOOKAHEAD_ENTRIES
from moe_edge.schedulers.options import Knob, PolicyOptions
from moe_edge.schedulers.policies import KNOBS, POLICIES, who_listens
from moe_edge.schedulers.workers import Split, parse_split

F = TypeVar("F", bound=Callable[..., Any])

EVERYDAY, SAMPLING, PRECISION = "Options", "Sampling", "Precision (every policy but exact is lossy)"
CACHING, TUNING = "Caching and reading ahead", "Tuning and checks"
SECTIONS = (EVERYDAY, SAMPLING, PRECISION, CACHING, TUNING)


class SectionOption(click.Option):
    """An option with the section of the help text that it stands in."""

    def __init__(self, *args: Any, section: str = EVERYDAY, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help text lists its options section by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                found[getattr(param, "section", EVERYDAY)].append(record)
        for section, records in found.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


def option(section: str, *args: Any, **kwargs: Any) -> Callable[[F], F]:
    """click.option, in a section of the help text."""
    return click.option(*args, cls=SectionOption, section=section, **kwargs)


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


class SplitType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """auto, speed, memory, or the layers of each board: 20,14,14."""

    name = "HOW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Split:
        try:
            return parse_split(value) if isinstance(value, str) else tuple(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


class ModelName(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A path, or `user/repo[:QUANT]` of the hub, which becomes its path in the cache: downloaded after a yes."""

    name = "MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moe_edge.runner.hub.names import hub_name

        if hub_name(str(value)) is None or (ctx is not None and ctx.resilient_parsing):  # the Tab key only looks
            return str(value)
        from moe_edge.runner.hub.pull import resolve_model

        return resolve_model(str(value), ask if can_ask() else None, terminal.say)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Models of the cache by name, and files.

        Files come first: bash then falls back to them only where no name matches, so GGUF files are listed as names.
        """
        from moe_edge.runner.hub.offer import in_cache, stored_name

        names = [stored_name(each) for each in in_cache()]
        found = [CompletionItem(name, help="in the cache") for name in names if name.startswith(incomplete)]
        found += [CompletionItem(path) for path in sorted(glob.glob(glob.escape(incomplete) + "*.gguf"))]
        return [CompletionItem(incomplete, type="file"), *found]


def can_ask() -> bool:
    """Whether somebody reads our questions and can answer."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str, default: bool = True) -> bool:
    return click.confirm(question, default=default, err=True)


MODEL = ModelName()


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


PROMPT_CACHE_BYTES = 2 << 30
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
        return option(PRECISION, knob.option, knob.name, is_flag=True, default=None, help=words)
    default = "" if knob.default is None else f"  [default: {knob.default}]"
    kind = str if knob.choices else Number(-1e30, 1e30)
    return option(PRECISION, knob.option, knob.name, type=kind, help=words + default)


def model_options(f: F) -> F:
    for each in reversed(
        [
            option(EVERYDAY, "--ram", "--budget", "ram", type=Size(), default="auto", show_default=True,
                   help="All memory the model may take: 6GiB, 800MiB, auto."),
            option(EVERYDAY, "-c", "--ctx-size", "n_ctx", type=TOKENS, default=0,
                   help="Context in tokens; 0: 4096, or what the model was trained for if that is less."),
            option(EVERYDAY, "-t", "--threads", "n_threads", type=THREADS, default=0,
                   help="Compute threads; 0: one for each core."),
            option(TUNING, "-ub", "--ubatch-size", "n_ubatch", type=TOKENS, default=0,
                   help="Micro-batch of the prefill, in tokens; 0: 512, less for tiny models."),
            option(TUNING, "--flash-attn/--no-flash-attn", "flash_attn", default=None,
                   help="Default: on when plain attention would need over 64 MiB."),
            option(TUNING, "--repack", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                   help="Keep dense weights in the order this processor's kernels like, as llama.cpp does on ARM; it "
                        "rounds otherwise. auto: on ARM."),
            option(PRECISION, "--policy", default="exact", show_default=True,
                   help=f"How experts are scheduled; all but exact are lossy. {_words(POLICIES)}"),
            *(_knob_option(knob) for knob in KNOBS.values() if not knob.hidden),
            option(CACHING, "--cache", default="auto", show_default=True,
                   help=f"Which expert goes when another needs its place. {_words(RULE_ENTRIES)}"),
            option(CACHING, "--lookahead", default="off", show_default=True,
                   help=f"Read experts of the next layers early: off, auto. {_words(LOOKAHEAD_ENTRIES)}"),
            option(CACHING, "--packed-cache", default="auto", show_default=True,
                   help="How much of the experts' memory keeps packed experts (convert --pack): off, auto, 400MiB, "
                        "50%. More of them fit; each use unpacks them."),
            *(option(PRECISION, f"--cache-type-{part}", type=click.Choice(["f16", "q8_0", "q4_0"]), default="f16",
                     show_default=True, help=f"How the {what} of the KV cache are kept; q8_0 and q4_0 are lossy.")
              for part, what in (("k", "keys"), ("v", "values"))),
            option(PRECISION, "--max-kld", type=Number(-1e30, 1e30),
                   help="The fastest measured setting with at most this KLD (nats a token)."),
            option(CACHING, "--warm-start/--no-warm-start", "warm_start", default=False, show_default=True,
                   help="Load the experts that earlier runs used most, and keep the usage of this one."),
            option(TUNING, "--verify", is_flag=True,
                   help="Check every tensor of the store against its checksum first."),
        ]
    ):  # fmt: skip
        f = each(f)
    return f


def workers_option(f: F) -> F:
    """Of the commands that can have their layers computed by other boards."""
    f = split_option(f)
    return option(EVERYDAY, "--workers", metavar="HOST[:PORT],...",
                  help="Boards that run `moe-edge worker` with the same model; each computes some of the layers.")(f)


def split_option(f: F) -> F:
    return option(TUNING, "--split", type=SplitType(), default="auto", show_default=True, metavar="HOW",
                  help="Which layers the boards of --workers get: speed, memory, or so many each (20,14,14). auto: by "
                       "speed where all were measured.")(f)


def prompt_cache_options(default: str) -> Callable[[F], F]:
    """Of the commands that answer; those that measure begin every text anew. default: on or off.

    Off where a command answers once: what an earlier run left behind would decide how a prompt is split, and with it
    the last bits of its logits.
    """

    def add(f: F) -> F:
        for each in reversed(
            [
                option(PRECISION, "--context-shift", is_flag=True,
                       help="A full context forgets its older half and the reply goes on. Lossy."),
                option(CACHING, "--prompt-cache", type=click.Choice(["on", "off"]), default=default, show_default=True,
                       help="Keep long conversations on disk, and start a prompt that an earlier run knew from there."),
                option(CACHING, "--prompt-cache-size", type=Size(), default="2GiB", show_default=True,
                       help="Disk space for them; the one used longest ago goes first."),
            ]
        ):  # fmt: skip
            f = each(f)
        return f

    return add


def sampling_options(f: F) -> F:
    for each in reversed(
        [
            option(SAMPLING, "--temp", type=Number(0, 100), default=0.8, show_default=True, help="0 is greedy."),
            option(SAMPLING, "--top-k", type=Number(-1, MOST, whole=True), default=40, show_default=True,
                   help="Only the so many most likely tokens; 0 or -1: all."),
            option(SAMPLING, "--top-p", type=Number(0, 1), default=0.95, show_default=True),
            option(SAMPLING, "--min-p", type=Number(0, 1), default=0.05, show_default=True),
            option(SAMPLING, "--repeat-penalty", type=Number(0.01, 100), default=1.0, show_default=True),
            option(SAMPLING, "--presence-penalty", type=Number(-100, 100), default=0.0, show_default=True),
            option(SAMPLING, "--frequency-penalty", type=Number(-100, 100), default=0.0, show_default=True),
            option(SAMPLING, "-s", "--seed", type=Number(0, 2**32 - 1, whole=True), default=None,
                   help="The same seed, prompt and options give the same text. Default: a new one each time."),
        ]
    ):
        f = each(f)
    return f


def sampling_of(o: dict[str, Any]) -> Any:
    from moe_edge.runner.generate import Sampling

    return Sampling(
        o["temp"], o["top_k"], o["top_p"], o["min_p"], o["repeat_penalty"], o["seed"], o["presence_penalty"],
        o["frequency_penalty"],
    )  # fmt: skip


def policy_of(o: dict[str, Any]) -> PolicyOptions:
    turned = {name: o[name] for name in KNOBS if o.get(name) is not None}
    return PolicyOptions(o["policy"], cache=o["cache"], lookahead=o["lookahead"], max_kld=o["max_kld"], **turned)


def _prompt_cache_bytes(o: dict[str, Any]) -> int:
    if o.get("prompt_cache", "off") == "off":
        return 0
    size = o["prompt_cache_size"]
    return int(PROMPT_CACHE_BYTES if size is None else size)


def engine_options(o: dict[str, Any]) -> Any:
    from moe_edge.runner.engine_options import EngineOptions
    from moe_edge.runner.measure.packed_split import auto_split

    return EngineOptions(
        ram_bytes=o["ram"], n_ctx=o["n_ctx"], n_ubatch=o["n_ubatch"], n_threads=o["n_threads"], policy=policy_of(o),
        seed=o.get("seed"), flash_attn=o["flash_attn"], charge_program=True, warm_start=o["warm_start"],
        prompt_cache_bytes=_prompt_cache_bytes(o), cache_type_k=o["cache_type_k"], cache_type_v=o["cache_type_v"],
        context_shift=o.get("context_shift", False), held_bytes=o.get("held_conversations", 0),
        packed_cache=o["packed_cache"], packed_planner=auto_split, repack=o["repack"],
    )  # fmt: skip


def open_engine(model: str | Path | None, o: dict[str, Any]) -> Any:
    from moe_edge.models.embedded import tiny_model_path
    from moe_edge.runner.engine import Engine

    path = model or tiny_model_path()
    if o.get("workers"):
        return _open_boards(path, o)
    engine = Engine(path, engine_options(o), verify=o["verify"], tell=terminal.say)
    for line in engine.lines():
        terminal.say(line)
    return engine


def _open_boards(path: Any, o: dict[str, Any]) -> Any:
    """An engine on several boards. What it says of the memory is known once everything is there."""
    from dataclasses import replace

    from moe_edge.runner.prove import LOADS
    from moe_edge.runner.workers.boards_engine import BoardsEngine
    from moe_edge.runner.workers.wire import parse_addresses

    options = replace(engine_options(o), proof=LOADS)
    engine = BoardsEngine(path, options, parse_addresses(o["workers"]), split=o["split"], verify=o["verify"],
                          tell=terminal.say)  # fmt: skip
    try:
        engine.load()
    except BaseException:
        engine.close()
        raise
    for line in engine.lines():
        terminal.say(line)
    return engine


def print_result(result: Any) -> None:
    """Text as it is, anything else as JSON."""
    if isinstance(result, str):
        terminal.write(result)
    else:
        terminal.write_json(result)


def parse_disk_speed(text: str) -> int:
    """'440MB/s' -> bytes a second. Raises UsageError."""
    return parse_bytes(text.removesuffix("/s"))
