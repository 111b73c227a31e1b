"""What this process and this machine hold: resident bytes, free memory, limits of memory cgroups; `--ram auto`.

Files are read below a root folder that tests replace: `root / "proc/meminfo"` and so on.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_edge.schedulers.budget import MIB, PROGRAM_ALLOWANCE_BYTES, format_bytes

ROOT = Path("/")
NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes its largest page count, a little under 2^63, for "none"

LEAST_ROOM_BYTES = 512 * MIB
SMALL_MACHINE_BYTES = 2048 * MIB


def page_bytes() -> int:
    """Bytes of a page of memory here: 4096, or 16384 on Apple silicon and the Raspberry Pi 5.

    Everything that rounds to pages takes it from here; the native library gets it with a model's description.
    """
    return os.sysconf("SC_PAGESIZE")


def current_rss_bytes() -> int:
    """Resident bytes of this process now; on systems without /proc, the peak so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page_bytes()
    except OSError:
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most this process has held resident, file-backed pages included.

    VmHWM, not ru_maxrss, where there is one: the latter is inherited from the parent across exec.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@dataclass(frozen=True)
class CgroupLimit:
    """A memory cgroup with a limit: its folder, the limit, and what it holds that cannot be dropped, in bytes."""

    folder: Path
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class _CgroupFiles:
    limits: tuple[str, ...]
    usage: str
    stat_prefix: str  # of the keys of memory.stat that count children too
    unwritten: tuple[str, ...]  # keys of pages that must be written before they can be dropped


_V1 = _CgroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_", ("dirty", "writeback"))
_V2 = _CgroupFiles(("memory.max", "memory.high"), "memory.current", "", ("file_dirty", "file_writeback"))


def cgroup_limits(root: Path = ROOT) -> list[CgroupLimit]:
    """The limited memory cgroups around this process, v1 and v2, innermost first.

    A group's limit holds for all inside it, so every folder on the path up to the mount counts. In a container whose
    /proc names the host's path, the folders that are not there are skipped and the mount itself is the container's.
    """
    found = []
    for base, group, files in _memory_groups(root):
        here = base.joinpath(*(part for part in group.split("/") if part not in ("", "..")))
        for folder in (here, *here.parents):
            limit = _limit_of(folder, files)
            if limit is not None:
                found.append(limit)
            if folder == base:
                break
    return found


def _memory_groups(root: Path) -> list[tuple[Path, str, _CgroupFiles]]:
    """(mount, group path, file names) of each hierarchy that may limit memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount = root / "sys/fs/cgroup"
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            found.append((mount, group, _V2))
        elif "memory" in controllers.split(","):
            found.append((mount / "memory", group, _V1))
    return found


def _limit_of(folder: Path, files: _CgroupFiles) -> CgroupLimit | None:
    limits = [n for n in (_read_int(folder / name) for name in files.limits) if n is not None and n < NO_LIMIT_BYTES]
    usage = _read_int(folder / files.usage)
    if not limits or usage is None:
        return None
    return CgroupLimit(folder, min(limits), max(0, usage - _droppable_bytes(folder, files)))


def _read_int(path: Path) -> int | None:
    """None when it is not there, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _droppable_bytes(folder: Path, files: _CgroupFiles) -> int:
    """Clean file pages, which the kernel takes back on demand, used twice ("active") or once.

    A tenth of the active ones is left out: they are the working set of whoever else is in the group.
    """
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.isdigit()}
    inactive, active, *unwritten = (
        stat.get(files.stat_prefix + key, 0) for key in ("inactive_file", "active_file", *files.unwritten)
    )
    return max(0, inactive + active - active // 10 - sum(unwritten))


def tightest_cgroup(root: Path = ROOT) -> CgroupLimit | None:
    """The limit that leaves the least free around this process; None when there is none."""
    return min(cgroup_limits(root), key=lambda limit: limit.free_bytes, default=None)


def cgroup_free_bytes(root: Path = ROOT) -> int | None:
    """The least free memory under a cgroup limit around this process; None when there is no limit."""
    tightest = tightest_cgroup(root)
    return None if tightest is None else tightest.free_bytes


def total_bytes(root: Path = ROOT) -> int:
    """The machine's memory."""
    return _meminfo("MemTotal", root) or os.sysconf("SC_PHYS_PAGES") * page_bytes()


def usable_bytes(root: Path = ROOT) -> int:
    """The most this process could ever hold: the machine's memory, or the lowest cgroup limit around it."""
    return min([total_bytes(root), *(limit.limit_bytes for limit in cgroup_limits(root))])


def available_bytes(root: Path = ROOT) -> int:
    """Memory that could be taken without pushing other programs out: MemAvailable; on macOS, what vm_stat says."""
    available = _meminfo("MemAvailable", root)
    if available is None and sys.platform == "darwin":
        available = _macos_available()
    return total_bytes(root) // 2 if available is None else available


def _meminfo(key: str, root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _macos_available() -> int | None:
    try:
        said = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_vm_stat(said)


def parse_vm_stat(text: str) -> int | None:
    """Bytes that macOS can hand out at once: free, inactive, speculative, purgeable pages; None for other text."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text, re.MULTILINE)
    return int(page[1]) * sum(map(int, pages)) if page and pages else None


@dataclass(frozen=True)
class AutoBudget:
    """What `--ram auto` comes to, and one sentence that says why."""

    bytes: int
    reason: str


def auto_budget(root: Path = ROOT) -> AutoBudget:
    """`--ram auto`: what is free here and under every cgroup limit, less room for the program and for others.

    Of the available memory the larger of 512 MiB and a tenth stays free for others (of 2 GiB and less, a quarter); of
    what a cgroup limit leaves, a tenth. The smaller rest, less PROGRAM_ALLOWANCE_BYTES, is the budget.
    """
    available, group = available_bytes(root), tightest_cgroup(root)
    if available > SMALL_MACHINE_BYTES:
        room = max(LEAST_ROOM_BYTES, available // 10)
    else:
        room = available - available * 3 // 4
    free = available - room
    why = (
        f"{format_bytes(available)} of {format_bytes(total_bytes(root))} memory is available, {format_bytes(room)} of "
        "it stays free for other programs"
    )
    if group is not None and group.free_bytes * 9 // 10 < free:
        free = group.free_bytes * 9 // 10
        why = (
            f"the memory cgroup {group.folder} is limited to {format_bytes(group.limit_bytes)} and has "
            f"{format_bytes(group.free_bytes)} free, a tenth of it stays free"
        )
    budget = max(0, free - PROGRAM_ALLOWANCE_BYTES)
    own = f"{format_bytes(PROGRAM_ALLOWANCE_BYTES)} is for the program itself"
    return AutoBudget(budget, f"--ram auto is {format_bytes(budget)}: {why}, and {own}")


def auto_budget_bytes() -> int:
    """The bytes of auto_budget(), for callers that print nothing."""
    return auto_budget().bytes
