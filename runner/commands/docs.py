"""`moe-edge docs`: the pages that came with the package, for a machine without network."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import click
from moe_edge.models.errors import MissingFile, UnknownName
from moe_edge.models.suggest import did_you_mean
from moe_edge.runner import terminal
from moe_edge.runner.commands.parameters import SectionedCommand

FOLDER = "share/doc/moe-edge/"


def shipped_pages() -> dict[str, Path]:
    """Each page by its name in small letters, where pip has put it. Raises MissingFile when there is none."""
    found = {}
    for each in metadata.files("moe-edge") or ():
        path = Path(str(each.locate()))
        if FOLDER in each.as_posix() and path.suffix == ".md" and path.is_file():
            found[path.stem.lower()] = path.resolve()
    if not found:
        raise MissingFile("the pages of moe-edge are not where pip put them; pip install --force-reinstall moe-edge")
    return dict(sorted(found.items()))


def title(page: Path) -> str:
    """The first heading of a page, or nothing."""
    with page.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").strip() for line in lines if line.startswith("# ")), "")


@click.command("docs", cls=SectionedCommand)
@click.argument("page", required=False)
def command(page: str | None) -> None:
    """Show PAGE of the documentation, which is in the package; without PAGE, list what there is."""
    found = shipped_pages()
    if page is None:
        rows = [f"{name:15} {title(path)}" for name, path in found.items()]
        terminal.write("\n".join([*rows, "", f"moe-edge docs PAGE shows one; they are in {found['readme'].parent}"]))
        return
    name = Path(page).name.lower().removesuffix(".md")
    if name not in found:
        raise UnknownName(f"there is no page '{page}'{did_you_mean(name, found)}")
    text = found[name].read_text(encoding="utf-8")
    if sys.stdout.isatty():
        click.echo_via_pager(text)
    else:
        terminal.write(text.rstrip("\n"))
