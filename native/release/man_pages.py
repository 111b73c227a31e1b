"""The manual pages, moe-edge(1) and one for each command, written from the commands themselves.

    python native/release/man_pages.py docs/share/man/man1

`make man` runs it after an option has changed; tests/test_pages_shipped.py says when it was forgotten. The pages are in
git since a wheel is built where the command line cannot be imported. click-man of the registry was read: it leaves out
the sections of our help, cuts the line under NAME after 45 letters, and loses lines that begin with a period.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from moe_edge.runner.cli import main as moe_edge
from moe_edge.runner.commands.parameters import EVERYDAY, SECTIONS

PROGRAM = "moe-edge"
VERBATIM = "\b"  # click's mark of a paragraph whose lines stay as they are


def roff(text: str) -> str:
    """Text in which roff sees letters only: no escape, no hyphen to set as it likes, no request at a line's start."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    """The lines of a help text, a paragraph each; those after click's mark keep their own lines."""
    for each in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in each.split("\n")]
        yield ".PP"
        if lines[0] == VERBATIM:
            yield from (".nf", *map(roff, lines[1:]), ".fi")
        else:
            yield roff(" ".join(lines))


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """The lines of the options, section by section as the help has them."""
    found: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for each in command.get_params(context):
        record = each.get_help_record(context) if isinstance(each, click.Option) else None
        if record is not None:
            found[getattr(each, "section", EVERYDAY)] += [".TP", f"\\fB{roff(record[0])}\\fR", roff(record[1])]
    for section, lines in found.items():
        if lines:
            yield from (f".SH {section.upper()}", *lines)


def page(command: click.Command, context: click.Context, others: Mapping[str, click.Command]) -> str:
    """One page. others: the commands of this one, which get a line each."""
    name = context.command_path.replace(" ", "-")
    text = (command.help or "").strip()
    short = re.split(r"(?<=[.:])\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".:")
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {roff(name.upper())} 1 "" "{PROGRAM}" "{PROGRAM} manual"',
        ".SH NAME", f"{roff(name)} \\- {roff(short)}",
        ".SH SYNOPSIS", f"\\fB{roff(context.command_path)}\\fR {roff(usage)}",
        ".SH DESCRIPTION", *paragraphs(text), *options(command, context),
    ]  # fmt: skip
    if others:
        lines.append(".SH COMMANDS")
        for each, of in sorted(others.items()):
            lines += [".TP", f"\\fB{roff(PROGRAM)}\\-{roff(each)}\\fR(1)", roff(of.get_short_help_str(200))]
    lines += [
        ".SH ENVIRONMENT",
        roff("Each option of a command can be given as a variable: MOE_EDGE_, the command, the option's longest name, "
             "as in MOE_EDGE_CHAT_RAM=6GiB."),
        ".SH EXIT STATUS",
        "0 when all went well, 1 when the work failed, 2 for a wrong call. Each error is one sentence.",
        ".SH SEE ALSO",
        roff(f"{PROGRAM}(1), and the pages that `{PROGRAM} docs` lists." if not others else
             f"`{PROGRAM} docs` lists pages about models, memory, serving and boards."),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def pages(group: click.Group = moe_edge) -> dict[str, str]:
    """The name of each page's file, and the page."""
    top = click.Context(group, info_name=PROGRAM, **group.context_settings)
    made = {f"{PROGRAM}.1": page(group, top, group.commands)}
    for name, command in group.commands.items():
        made[f"{PROGRAM}-{name}.1"] = page(command, click.Context(command, info_name=name, parent=top), {})
    return made


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in folder.glob("*.1"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{folder}: {len(made)} pages")


if __name__ == "__main__":
    main()
