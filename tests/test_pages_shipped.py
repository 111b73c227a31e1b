"""What comes with the package to be read without network: manual pages, the pages of docs/, and the Tab key's files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
from moe_edge.models.errors import MissingFile
from moe_edge.runner.cli import main
from moe_edge.runner.commands.docs import shipped_pages

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native" / "release"))

import man_pages
from man_pages import page, pages, roff

ROOT = Path(__file__).resolve().parents[1]
MAN = ROOT / "docs/share/man/man1"
FORGOTTEN = "an option has changed since the manual pages were written; `make man` writes them again"
START = [sys.executable, "-m", "moe_edge.runner.start"]


def commands() -> Iterator[tuple[str, click.Command]]:
    yield "moe-edge.1", main
    for name, command in main.commands.items():
        yield f"moe-edge-{name}.1", command


def installed(ending: str) -> Path:
    """A file of share/ where pip has put it."""
    (found,) = (each for each in metadata.files("moe-edge") or () if each.as_posix().endswith(f"share/{ending}"))
    return Path(str(found.locate()))


# ---- manual pages


def test_every_command_has_a_page_and_no_page_is_left_over() -> None:
    assert {path.name for path in MAN.glob("*")} == {name for name, _ in commands()}, FORGOTTEN
    text = (MAN / "moe-edge.1").read_text()
    for name in main.commands:
        assert f"\\fBmoe\\-edge\\-{name}\\fR(1)" in text, FORGOTTEN


@pytest.mark.parametrize("name, command", list(commands()))
def test_every_option_is_in_its_page_with_its_words_and_no_other_is(name: str, command: click.Command) -> None:
    text = (MAN / name).read_text()
    assert roff(" ".join((command.help or "").split("\n\n")[0].split())) in text, FORGOTTEN
    heads = " ".join(re.findall(r"^\.TP\n\\fB(.*)\\fR$", text, flags=re.MULTILINE)).replace("\\-", "-")
    named = set(re.findall(r"(?<!\S)(?:-[a-zA-Z]+|--[a-z][a-z0-9-]*)(?=[\s,/]|$)", heads))
    known = {"-h", "--help"}
    for each in command.params:
        if isinstance(each, click.Option) and not each.hidden:
            known |= {*each.opts, *each.secondary_opts}
            assert roff(each.help or "") in text, f"{each.opts}: {FORGOTTEN}"
    assert named == known, FORGOTTEN


def test_what_roff_would_take_for_a_request_is_text() -> None:
    assert roff(".gguf and 'x'\n'y' a-b \\") == "\\&.gguf and 'x'\n\\&'y' a\\-b \\e"

    @click.command(help="First line.\n\n\b\nkept  as\n.it is\n\nLast.")
    @click.option("--what", help=".dotted")
    def command() -> None:
        pass

    made = page(command, click.Context(command, info_name="moe-edge"), {})
    assert ".PP\nFirst line.\n.PP\n.nf\nkept  as\n\\&.it is\n.fi\n.PP\nLast.\n" in made
    assert "\\fB\\-\\-what TEXT\\fR\n\\&.dotted\n" in made


def test_pages_that_are_no_longer_made_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moe-edge-gone.1").touch()
    monkeypatch.setattr(sys, "argv", ["man_pages.py", str(tmp_path)])
    man_pages.main()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == pages()


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
def test_groff_has_nothing_to_complain_of() -> None:
    for path in sorted(MAN.glob("*.1")):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-K", "utf8", path], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), path.name
    assert "Continue a prompt" in subprocess.run(
        ["groff", "-man", "-Tascii", "-c", MAN / "moe-edge-generate.1"], capture_output=True, text=True, check=True
    ).stdout.replace("\b", "")


# ---- the pages


def moe_edge(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*START, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_docs_lists_the_pages_and_where_they_are() -> None:
    done = moe_edge("docs")
    assert (done.returncode, done.stderr) == (0, "")
    *rows, empty, last = done.stdout.splitlines()
    expected = {path.stem.lower() for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"} | {"readme"}
    assert {row.split()[0] for row in rows} == expected and all(len(row.split()) > 1 for row in rows)
    assert empty == "" and Path(last.rsplit(" in ", 1)[1], "README.md").is_file()


def test_docs_shows_a_page_however_it_is_called() -> None:
    wanted = (ROOT / "docs/PULL.md").read_text().rstrip("\n") + "\n"
    for name in ("pull", "PULL", "docs/PULL.md"):
        assert moe_edge("docs", name).stdout == wanted


def test_an_unknown_page_is_a_sentence_with_the_nearest() -> None:
    done = moe_edge("docs", "polices")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moe-edge: there is no page 'polices'; did you mean 'policies'? known: ")
    assert done.stderr.count("\n") == 1


def test_pages_that_are_gone_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(MissingFile, match="--force-reinstall"):
        shipped_pages()


# ---- where other programs look


def test_pages_and_the_tab_keys_files_are_installed() -> None:
    for path in (each for each in (ROOT / "docs/share").rglob("*") if each.is_file()):
        assert installed(path.relative_to(ROOT / "docs/share").as_posix()).read_bytes() == path.read_bytes()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_by_the_installed_file(tmp_path: Path) -> None:
    program = tmp_path / "moe-edge"
    program.write_text(f'#!/bin/sh\nexec {START[0]} -m {START[2]} "$@"\n')
    program.chmod(0o755)
    script = (
        f"source {installed('bash-completion/completions/moe-edge')}; COMP_WORDS=(moe-edge doct); COMP_CWORD=1; "
        '_moe_edge_completion moe-edge; printf "%s\\n" "${COMPREPLY[@]}"; complete -p moe-edge'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.splitlines()
    assert first == "doctor" and "_moe_edge_completion" in last


@pytest.mark.parametrize("shell, name", [("zsh", "zsh/site-functions/_moe-edge"),
                                         ("fish", "fish/vendor_completions.d/moe-edge.fish")])  # fmt: skip
def test_other_shells_read_their_file(shell: str, name: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    done = subprocess.run([shell, "-n", installed(name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
