"""What a service is, whichever program starts it: a command line, a memory limit, who may read what it needs."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from moe_edge.schedulers.budget import MIB, PROGRAM_ALLOWANCE_BYTES

KERNEL_BYTES = 32 * MIB  # sockets, open files and the like, which the kernel charges to the group
PAGE_TABLE_SHARE = 512  # 8 bytes of page table for each page of 4 KiB; larger pages take less


@dataclass(frozen=True)
class Service:
    """program: the command and its first arguments, absolute. arguments: what follows, as serve takes it.

    model: the file or folder the service reads, None for the embedded one. ram_bytes: its budget. is_local: whether it
    only listens at this machine. env_file: with MOE_EDGE_API_KEY and the like. of_user: of one user instead of the
    machine.
    """

    name: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    model: Path | None
    ram_bytes: int
    is_local: bool
    env_file: Path | None = None
    of_user: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        return (*self.program, *self.arguments)

    @property
    def high_bytes(self) -> int:
        """From here on the kernel takes back pages of files: the budget, and the allowance for the program."""
        return self.ram_bytes + PROGRAM_ALLOWANCE_BYTES

    @property
    def most_bytes(self) -> int:
        """More than this and the service is ended: what the kernel keeps for it counts, too."""
        return self.high_bytes + self.ram_bytes // PAGE_TABLE_SHARE + KERNEL_BYTES


def closed_to_others(path: Path) -> Path | None:
    """The folder or file on the way to `path` that another user may not enter or read; None when all are open.

    A service of the machine runs as a user of its own. Permissions only: access lists are not looked at.
    """
    try:
        path = path.resolve(strict=True)
        for each in reversed(path.parents):
            if not each.stat().st_mode & stat.S_IXOTH:
                return each
        wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
        return None if path.stat().st_mode & wanted == wanted else path
    except OSError:
        return path
