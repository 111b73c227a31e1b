"""`moe-edge convert`: a checkpoint or a GGUF into a skeleton and an expert store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from moe_edge.models.errors import UsageError
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import THREADS, F, Number, SectionedCommand, Size, print_result

if TYPE_CHECKING:
    from moe_edge.convert.arriving import Arriving
    from moe_edge.runner.commands.conversion import ConvertRequest

PROJECTIONS = ("up", "gate", "down")


def type_options(f: F) -> F:
    """--high, --low, and one of each for every projection."""
    for level, meaning in (("low", "a second copy of every expert, for the lossy policies"), ("high", "the experts")):
        for projection in reversed(PROJECTIONS):
            f = click.option(f"--{level}-{projection}", help=f"The same for {projection} alone.")(f)
        names = ("--high", "--type", "high") if level == "high" else ("--low", "low")
        f = click.option(*names, help=f"ggml type of {meaning} (Q4_K, Q2_K, ...).")(f)
    return f


@click.command("convert", cls=SectionedCommand)
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
@click.option("--allocate", type=click.Choice(["calibrated", "imatrix"]), default="calibrated", show_default=True,
              help="What --bits goes by: a text (--calibrate), or an importance matrix alone.")
@click.option("--core-hours", type=Number(0.01, 1e6), default=6.0, show_default=True,
              help="Of quantizing at the most: --bits takes faster types where the best would need longer.")
@click.option("--dense-type", help="Type of the dense matrices. Default: Q8_0 if a "
              "checkpoint's experts are quantized. Q6_K is smaller, and faster in long prompts on x86.")
@click.option("--pack", type=click.Choice(["none", "auto", "planes", "zstd"]), default="none", show_default=True,
              help="Store experts packed, without loss. auto: BF16 and F16; planes: every type that gets shorter; "
                   "zstd: a little shorter still, and slow to unpack.")
@click.option("--ram", type=Size(), default="auto", help="Memory for running the model on the text.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--json", "as_json", is_flag=True)
@click.option("-t", "--threads", "n_threads", type=THREADS, default=0)
def command(source: Path, output: Path | None, dry_run: bool, as_json: bool, **o: Any) -> None:
    """Turn SOURCE, a Hugging Face directory or a GGUF, into a skeleton and an expert store."""
    from moe_edge.runner.commands.conversion import run_convert

    if output is None and not dry_run:
        raise UsageError("where to? give -o NAME.gguf (or --dry-run to see the plan)")
    report = run_convert(request_of(source, {**o, "output": output, "dry_run": dry_run}), tell=terminal.say)
    print_result(report.to_json() if as_json else report.text())


def request_of(source: Path, o: Mapping[str, Any], arriving: Arriving | None = None) -> ConvertRequest:
    """What the options of this command ask for."""
    from moe_edge.runner.commands.conversion import ConvertRequest

    overrides = {
        (level, p): o[f"{level}_{p}"] for level in ("high", "low") for p in PROJECTIONS if o[f"{level}_{p}"] is not None
    }
    return ConvertRequest(
        source, o["output"], high=o["high"], low=o["low"], overrides=overrides, bits=o["bits"], low_bits=o["low_bits"],
        types=o["types"], calibrate=o["calibrate"], calibrate_tokens=o["calibrate_tokens"], imatrix=o["imatrix"],
        allocate=o["allocate"], core_hours=o["core_hours"], dense_type=o["dense_type"], ram_bytes=o["ram"],
        n_threads=o["n_threads"], dry_run=o["dry_run"],
        force=o["force"], pack=o["pack"], arriving=arriving,
    )  # fmt: skip
