"""Swap: pages of the arena that the kernel writes away are read back when an expert is used, or were compressed."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine, to_int
from moe_edge.schedulers.budget import format_bytes

MEND = "`moe-edge service install` sets MemorySwapMax=0; by hand: sudo sysctl vm.swappiness=1"


def _run(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        yield from _mac(machine)
        return
    text = machine.text("proc/swaps")
    if text is None:
        yield Finding("swap", UNKNOWN, "/proc/swaps cannot be read")
        return
    areas = []
    for line in text.splitlines()[1:]:  # Filename Type Size Used Priority, in KiB
        words = line.split()
        size, used = (to_int(words[2]), to_int(words[3])) if len(words) >= 5 else (None, None)
        if size is not None and used is not None:
            areas.append((words[0], size * 1024, used * 1024))
    if not areas:
        yield Finding("swap", OK, "none")
        return
    said = ", ".join(f"{name} {format_bytes(size)}, {format_bytes(used)} used" for name, size, used in areas)
    swappiness = machine.number("proc/sys/vm/swappiness")
    said += "" if swappiness is None else f"; swappiness {swappiness}"
    names = [name for name, _, _ in areas]
    if swappiness is not None and swappiness <= 1:
        yield Finding("swap", OK, said)
    elif any("mmcblk" in name or (name in ("/var/swap", "/swapfile") and _on_card(machine)) for name in names):
        yield Finding("swap", COSTS, said, "what is swapped goes to the card, slowly, and wears it", MEND)
    elif all("zram" in name for name in names):
        yield Finding(
            "swap", NOTE, said, "experts that were not used for a while are compressed in memory, which gains nothing: "
            "weights hardly compress", MEND,
        )  # fmt: skip
    else:
        yield Finding(
            "swap", NOTE, said, "experts not used for a while may be written away, and come back page by page",
            MEND,
        )  # fmt: skip


def _on_card(machine: Machine) -> bool:
    """Whether the root file system is on an SD card."""
    return any(
        line.split(" - ")[0].split()[4:5] == ["/"] and "/dev/mmcblk" in line
        for line in (machine.text("proc/self/mountinfo") or "").splitlines()
    )


def _mac(machine: Machine) -> Iterator[Finding]:
    said = machine.sysctl("vm.swapusage")  # total = 2048.00M  used = 700.25M  free = 1347.75M  (encrypted)
    words = (said or "").split()
    used = words[words.index("used") + 2] if "used" in words and len(words) > words.index("used") + 2 else None
    if said is None or used is None:
        yield Finding("swap", UNKNOWN, "sysctl vm.swapusage cannot be read")
    elif used.startswith("0.00"):
        yield Finding("swap", OK, said)
    else:
        yield Finding("swap", NOTE, said, "memory is short already: macOS has written pages away or compressed them",
                      "close other programs, or give a smaller --ram")  # fmt: skip


CHECK = Check("swap", 80, _run)
