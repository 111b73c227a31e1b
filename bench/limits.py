"""A memory cap and a disk speed for one process, by control groups (v1 and v2), and what it used of them.

The group is made below the root of the hierarchy under a name of ours and removed afterwards. A cap above the limit
this process already lives under is refused, so that nothing escapes a limit somebody else set.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
PREFIX = "moe-edge-bench"

_numbers = itertools.count()


class NotPossible(Exception):
    """This machine cannot limit that; the message says why, for the table's N/A."""


@dataclass(frozen=True)
class Usage:
    """What a memory group saw, in bytes: the most it held (kernel and page cache included), and file pages now."""

    peak_bytes: int | None = None
    cached_bytes: int | None = None


def is_v1() -> bool:
    return (CGROUP / "memory" / "memory.limit_in_bytes").exists()


def own_limit_bytes() -> int | None:
    """The least memory limit above this process; None when there is none."""
    limits: list[int] = []
    for folder in _own_memory_groups():
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int((folder / ("memory.limit_in_bytes" if is_v1() else "memory.max")).read_text()))
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def _own_memory_groups() -> list[Path]:
    base, controller = (CGROUP / "memory", "memory") if is_v1() else (CGROUP, "")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = [line.split(":", 2)[2] for line in lines if controller in line.split(":", 2)[1].split(",")]
    folders = [base / group.lstrip("/") for group in groups]
    return [each for folder in folders for each in (folder, *folder.parents) if each.is_relative_to(base)]


def disk_of(path: Path) -> str:
    """`major:minor` of the whole disk a file is on. Raises NotPossible for a file system without one."""
    device = os.stat(path).st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        raise NotPossible(f"{path} is on no block device that /sys knows (overlay, tmpfs or a network?)")
    entry = entry.resolve()
    if (entry / "partition").exists():
        entry = entry.parent
    return (entry / "dev").read_text().strip()


@dataclass
class Limits:
    """The groups of one process; use in `with`, and let the process write itself into each of `join`.

    cap_bytes None: no cap but the one that is there, only counting. disk_bytes_per_second None: the disk as it is.
    Raises NotPossible on entry.
    """

    cap_bytes: int | None
    disk_bytes_per_second: int | None
    file: Path
    groups: list[Path] = field(default_factory=list)

    @property
    def join(self) -> list[str]:
        return [str(group / "cgroup.procs") for group in self.groups]

    def __enter__(self) -> Limits:
        try:
            self._make()
        except OSError as error:
            self._remove()
            raise NotPossible(f"{error.filename}: {error.strerror}; run as root, on Linux") from error
        except NotPossible:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        name = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        cap = self._allowed_cap()
        if is_v1():
            self._make_v1(name, cap)
        elif (CGROUP / "cgroup.controllers").exists():
            self._make_v2(name, cap)
        elif self.cap_bytes is not None or self.disk_bytes_per_second is not None:
            raise NotPossible(f"no control groups at {CGROUP}")

    def _allowed_cap(self) -> int | None:
        own = own_limit_bytes()
        if own is not None and self.cap_bytes is not None and self.cap_bytes > own:
            raise NotPossible(f"this process is itself limited to {own} bytes")
        return self.cap_bytes or own

    def _make_v1(self, name: str, cap: int | None) -> None:
        try:
            memory = self._new(CGROUP / "memory" / name)
        except OSError:
            if self.cap_bytes is not None:
                raise
        else:
            (memory / "memory.limit_in_bytes").write_text(str(cap or -1))
            with contextlib.suppress(OSError):
                (memory / "memory.swappiness").write_text("0")
        if self.disk_bytes_per_second is not None:
            disk = self._new(CGROUP / "blkio" / name)
            (disk / "blkio.throttle.read_bps_device").write_text(f"{disk_of(self.file)} {self.disk_bytes_per_second}")

    def _make_v2(self, name: str, cap: int | None) -> None:
        wanted = {"memory"} | ({"io"} if self.disk_bytes_per_second is not None else set())
        missing = wanted - set((CGROUP / "cgroup.subtree_control").read_text().split())
        if missing and (self.cap_bytes is None and self.disk_bytes_per_second is None):
            return
        if missing:
            enable = " ".join(f"+{each}" for each in sorted(missing))
            raise NotPossible(f"controllers are off; as root: echo '{enable}' > {CGROUP}/cgroup.subtree_control")
        group = self._new(CGROUP / name)
        (group / "memory.max").write_text(str(cap or "max"))
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
        if self.disk_bytes_per_second is not None:
            (group / "io.max").write_text(f"{disk_of(self.file)} rbps={self.disk_bytes_per_second}")

    def _new(self, group: Path) -> Path:
        group.mkdir()
        self.groups.append(group)
        return group

    def _remove(self) -> None:
        """The processes have ended; the kernel may need a moment to see it."""
        for group in self.groups:
            for _ in range(50):
                try:
                    group.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.1)
        self.groups.clear()


def read_usage(join: list[str]) -> Usage:
    """What the memory group among those joined saw so far."""
    for folder in (Path(each).parent for each in join):
        for peak, cached in (("memory.max_usage_in_bytes", "cache"), ("memory.peak", "file")):
            if (folder / peak).exists():
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                return Usage(int((folder / peak).read_text()), int(stat[cached]))
    return Usage()
