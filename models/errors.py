"""The one error tree of moe-edge; every other module may import it.

MoeEdgeError                 everything moe-edge raises on purpose            exit status
├── UsageError               the call is wrong: fix the command line          2
│   ├── BudgetTooSmall       --ram is below what the model needs              2
│   ├── ContextFull          a prompt is longer than the context               2
│   └── UnknownName          an architecture, type, policy we do not know     2
│       └── UnknownArchitecture                                               2
└── WorkError                the call is right, the work failed               1
    ├── BadFile              a file is cut, altered, or not what it claims    1
    │   ├── BadMagic         not a GGUF / safetensors file at all             1
    │   ├── CutFile          ends before the bytes its header promises        1
    │   ├── BadChecksum      a tensor's bytes differ from its checksum        1
    │   └── WrongStore       store and skeleton do not belong together        1
    ├── MissingFile          not there, or not readable                       1
    ├── NotMoE               the model has no experts                         1
    ├── DiskFull             no room left while writing                       1
    ├── WrongLibrary         llama.cpp of a version we were not built for     1
    ├── EngineError          the native engine failed during a decode         1
    │   ├── CannotRun        llama.cpp refuses the model, or dies of it       1
    │   └── BoardError       a board of several is lost, or refuses           1
    ├── CannotWrite          standard output does not take what we print      1
    └── Stopped              the user stopped the reply                       1

Messages carry names and values out of files, and a file may hold anything. Whoever shows a message to people passes it
through `sentence` first, and text of several lines through `printable`.
"""

from __future__ import annotations

import re

MAX_SENTENCE = 2000  # characters; the way out is in the last TAIL of them
TAIL = 700

# What a terminal acts on instead of showing it: C0, DEL and C1 controls, separators of lines, marks and overrides of
# writing direction. Surrogates are here too, since no encoding takes them; a low one is a byte that was not UTF-8.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, keep: str = "") -> str:
    """`text` with all that a terminal would act on written as escapes like \\x1b, but for the characters in `keep`."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else escaped(found[0]), text)


def escaped(character: str) -> str:
    """One character as an escape: \\n, \\x1b, \\u202e; a byte that was not UTF-8 (a low surrogate) as \\xff."""
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def sentence(message: object) -> str:
    """A message as one line for people: printable, and not endless. Its beginning and its way out stay."""
    text = printable(str(message))
    if len(text) <= MAX_SENTENCE:
        return text
    head = MAX_SENTENCE - TAIL
    return f"{text[:head]} ... ({len(text) - MAX_SENTENCE} characters left out) ... {text[-TAIL:]}"


class MoeEdgeError(Exception):
    """Base of all: the message is one sentence a user can act on."""

    exit_status = 1


class UsageError(MoeEdgeError):
    exit_status = 2


class BudgetTooSmall(UsageError):
    """The byte budget cannot hold the model's floor; `needed_bytes` is what would work."""

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class ContextFull(UsageError):
    """The prompt does not fit; prompt_tokens is None where it is so long that nobody counted."""

    def __init__(self, message: str, prompt_tokens: int | None, n_ctx: int) -> None:
        super().__init__(message)
        self.prompt_tokens, self.n_ctx = prompt_tokens, n_ctx


class UnknownName(UsageError):
    pass


class UnknownArchitecture(UnknownName):
    """architecture: its name, as the file has it. Whether llama.cpp knows it is for the runner to add."""

    def __init__(self, message: str, architecture: str) -> None:
        super().__init__(message)
        self.architecture = architecture


class WorkError(MoeEdgeError):
    pass


class BadFile(WorkError):
    pass


class BadMagic(BadFile):
    pass


class CutFile(BadFile):
    pass


class BadChecksum(BadFile):
    pass


class WrongStore(BadFile):
    pass


class MissingFile(WorkError):
    pass


class NotMoE(WorkError):
    pass


class DiskFull(WorkError):
    pass


class WrongLibrary(WorkError):
    pass


class EngineError(WorkError):
    pass


class CannotRun(EngineError):
    pass


class BoardError(EngineError):
    """One of several boards is lost, or does not take its part; the message names it."""


class CannotWrite(WorkError):
    pass


class Stopped(WorkError):
    pass
