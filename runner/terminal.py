"""The streams of the command line: what is printed reaches them whole and harmless, whatever they are.

Standard output may be ASCII, closed, full, or a pipe whose reader left; names from files may hold control characters.
Text of a model goes to a pipe exactly as it is; a terminal is shown its control characters as escapes.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import sys
from typing import Any, TextIO

from moe_edge.models.errors import CannotWrite, MissingFile, escaped, printable, sentence

LINES = "\n\t"  # what text of several lines may hold
_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")  # C0 json.dumps escapes itself
_IN_REPLY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # marks of direction are text here


def _as_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """For what an encoding cannot say: an escape; a byte that came in as not UTF-8 goes out as it came."""
    assert isinstance(error, UnicodeEncodeError)
    bad = error.object[error.start : error.end]
    if codecs.lookup(error.encoding).name == "utf-8" and all(0xDC80 <= ord(c) <= 0xDCFF for c in bad):
        return bytes(ord(c) - 0xDC00 for c in bad), error.end
    return "".join(map(escaped, bad)), error.end


class Output(io.TextIOWrapper):
    """Standard output. What it does not take is our own error, whoever prints; a reader that left, BrokenPipeError."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _cannot_write(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _cannot_write(error) from error


def _cannot_write(error: OSError) -> CannotWrite:
    return CannotWrite(f"standard output: cannot be written: {error.strerror or error}")


def open_streams() -> None:
    """Make all three standard streams usable: sys.stdin, stdout, stderr exist, and no write of a character fails.

    A stream that was closed becomes one that reads nothing, refuses what is written (standard output), or swallows it
    (standard error). Otherwise the next file opened would get its number, and llama.cpp's complaints.
    """
    codecs.register_error("moe_edge.escape", _as_escape)
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        if _is_closed(fd):
            opened = os.open(os.devnull, flags)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    binary = open(1, "wb", closefd=False)  # not sys.stdout's own, which would end with it
    sys.stdout = Output(binary, encoding, "moe_edge.escape", line_buffering=os.isatty(1))
    err: Any = sys.stderr
    err.reconfigure(errors="moe_edge.escape")


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def read_stdin() -> str:
    """All of standard input, whatever its bytes: what is not UTF-8 reaches the tokenizer as it came."""
    try:
        return sys.stdin.buffer.read().decode(errors="surrogateescape")
    except OSError as error:
        raise MissingFile(f"standard input: cannot be read: {error.strerror or error}") from error


def write(text: str, end: str = "\n") -> None:
    """A result on standard output: our own text, with names from files in it. Lines and tabs stay."""
    put(sys.stdout, printable(text, LINES) + end)


def write_json(value: Any) -> None:
    """One line of JSON on standard output: letters as they are where the stream can say them, controls as escapes."""
    encoding = codecs.lookup(sys.stdout.encoding or "ascii").name
    text = json.dumps(value, ensure_ascii=encoding != "utf-8")
    # a half of a surrogate pair is a byte that was not UTF-8: as json.dumps(ensure_ascii=True) writes it
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    put(sys.stdout, _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def reply(text: str) -> None:
    """A piece of a model's reply on standard output."""
    put(sys.stdout, shown(text, sys.stdout))


def shown(text: str, stream: TextIO) -> str:
    """Text of a model as `stream` gets it: exact, but on a terminal with its control characters as escapes."""
    return _IN_REPLY.sub(lambda found: escaped(found[0]), text) if stream.isatty() else text


def say(line: str) -> None:
    """Progress, warnings and statistics, on standard error. That it cannot be written is no reason to fail."""
    try:
        put(sys.stderr, printable(line, LINES) + "\n")
    except (OSError, ValueError):
        pass


def complain(error: object) -> None:
    """The sentence of a failure, on standard error."""
    say(f"moe-edge: {sentence(error)}")


def drop_output() -> None:
    """What standard output did not take is given up, so that the end of the process does not try again."""
    try:
        sys.stdout.flush()
    except (CannotWrite, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def put(stream: TextIO, text: str) -> None:
    """Write, and see it out."""
    stream.write(text)
    stream.flush()
