"""What this process and this machine hold: resident bytes, free memory, and the limit of the memory cgroup."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from moe_edge.schedulers.budget import MIB, PROGRAM_ALLOWANCE_BYTES


def current_rss_bytes() -> int:
    """Resident bytes of this process now; on systems without /proc, the peak so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
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


def _cgroup_numbers() -> list[tuple[Path, Path]]:
    """(limit, usage) files of the memory cgroups this process is in, innermost first; v2 and v1."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = base / group.lstrip("/")
        for folder in (here, *here.parents):
            found.append((folder / names[0], folder / names[1]))
            if folder == base:
                break
    return found


def cgroup_free_bytes() -> int | None:
    """The least free memory under a cgroup limit around this process; None when there is no limit."""
    free: list[int] = []
    for limit_file, usage_file in _cgroup_numbers():
        try:
            limit = int(limit_file.read_text())
            usage = int(usage_file.read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if limit < 1 << 60:
            free.append(max(0, limit - usage))
    return min(free, default=None)


def available_bytes() -> int:
    """Memory that could be taken without pushing other programs out."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # macOS does not tell in a file what is reclaimable: half of what there is.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2


def auto_budget_bytes() -> int:
    """`--ram auto`: what is free here and under the cgroup limit, less room for the program and for others.

    Leaves the larger of 512 MiB and a tenth of the available memory (a quarter of small limits) to the system.
    """
    available = available_bytes()
    free = available - max(512 * MIB, available // 10) if available > 2048 * MIB else available * 3 // 4
    limited = cgroup_free_bytes()
    if limited is not None:
        free = min(free, limited * 9 // 10)
    return max(0, free - PROGRAM_ALLOWANCE_BYTES)
