"""The one error tree of moe-edge; every other module may import it.

MoeEdgeError                 everything moe-edge raises on purpose            exit status
├── UsageError               the call is wrong: fix the command line          2
│   ├── BudgetTooSmall       --ram is below what the model needs              2
│   └── UnknownName          an architecture, type, policy we do not know     2
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
    └── Stopped              the user stopped the reply                       1
"""

from __future__ import annotations


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


class UnknownName(UsageError):
    pass


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


class Stopped(WorkError):
    pass
