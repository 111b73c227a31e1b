"""A machine as its kernel describes it: files below one root, a few programs, and what this process knows of itself.

Tests put recorded trees in the place of the root. What is not there, or may not be read, is None, and never an
exception: on a strange machine every question has no answer.
"""

from __future__ import annotations

import os
import platform
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moe_edge.runner import memory

COMMAND_SECONDS = 5
MOST_BYTES = 1 << 20  # of one file of a kernel

Run = Callable[[tuple[str, ...]], "str | None"]


def run_program(arguments: tuple[str, ...]) -> str | None:
    """What a program prints; None where there is no such program, or it fails."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@dataclass(frozen=True)
class Machine:
    """What the checks look at.

    root: where /proc and /sys are. target: the model's file or folder, as the machine itself names it. system,
    machine: as platform.system() and platform.machine() say. pointer_bits: of this program. build_features: what
    llama.cpp says it was compiled with, None when it does not load. run: starts a program.
    """

    root: Path = Path("/")
    target: Path = Path("/")
    system: str = field(default_factory=platform.system)
    machine: str = field(default_factory=platform.machine)
    pointer_bits: int = 8 * struct.calcsize("P")
    page_bytes: int = field(default_factory=memory.page_bytes)
    build_features: frozenset[str] | None = None
    run: Run = run_program

    @property
    def is_mac(self) -> bool:
        return self.system == "Darwin"

    def data(self, *names: str | Path) -> bytes | None:
        """The bytes of the first of these files that can be read."""
        for name in names:
            try:
                with open(self.path(name), "rb") as file:
                    return file.read(MOST_BYTES)
            except (OSError, ValueError):
                continue
        return None

    def text(self, *names: str | Path) -> str | None:
        """As data(), as text without the white space and NULs at its ends; None where that is nothing."""
        data = self.data(*names)
        return None if data is None else data.decode(errors="replace").strip(" \t\r\n\0") or None

    def number(self, *names: str | Path) -> int | None:
        """A decimal number, as most files of /sys are."""
        return to_int(self.text(*names))

    def path(self, name: str | Path) -> Path:
        """A path of the machine below the root. Paths that glob() and link() give are below it already."""
        path = Path(name)
        return path if path.is_relative_to(self.root) and self.root != Path("/") else self.root / str(name).lstrip("/")

    def glob(self, pattern: str) -> list[Path]:
        """Sorted paths, like glob("sys/class/hwmon/hwmon*"). Numbers sort as text."""
        try:
            return sorted(self.root.glob(pattern))
        except (OSError, ValueError):
            return []

    def link(self, name: str | Path) -> Path | None:
        """Where a symbolic link of /sys leads; None where nothing is."""
        try:
            found = Path(os.path.realpath(self.path(name)))
            return found if found.exists() else None
        except (OSError, ValueError):
            return None

    def exists(self, name: str | Path) -> bool:
        try:
            return self.path(name).exists()
        except (OSError, ValueError):
            return False

    def sysctl(self, name: str) -> str | None:
        """A value of macOS."""
        found = self.run(("/usr/sbin/sysctl", "-n", name))
        return None if found is None else found.strip() or None


def to_int(text: str | None, base: int = 10) -> int | None:
    try:
        return None if text is None else int(text, base)
    except ValueError:
        return None


def first_word(lines: Iterable[str], key: str) -> str | None:
    """What follows `key :` in lines like those of /proc/cpuinfo and /proc/meminfo."""
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None
