"""Reading one message from a terminal: with line editing where there is some, and pasted lines as one message."""

from __future__ import annotations

import contextlib
import select
import sys

PASTE_GAP = 0.03  # seconds: lines that wait already came with the one before; nobody types as fast


def read_message() -> str:
    """One message; a line of \"\"\" begins a message of several lines, another ends it. Raises EOFError.

    A paste is one message: GNU readline hands it over as one (bracketed paste); elsewhere its lines already wait. A
    command is one line.
    """
    _edit_lines()
    line = input("> ")
    if line.startswith('"""'):
        return _until_quotes(line)
    lines = [line]
    with contextlib.suppress(EOFError):
        while not line.startswith("/") and _more_is_waiting():
            lines.append(input())
    return "\n".join(lines)


def _edit_lines() -> None:
    with contextlib.suppress(ImportError):
        import readline  # line editing and history for input()

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def _until_quotes(line: str) -> str:
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")


def _more_is_waiting() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_GAP)[0])
    except (OSError, ValueError):  # no descriptor to look at
        return False
