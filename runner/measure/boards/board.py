"""Which machine this is, and whether its programs are of 64 bits."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards.finding import COSTS, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

DEVICE_TREE = "proc/device-tree"
DEVICE_TREE_BASE = "sys/firmware/devicetree/base"  # where the link above leads


def board_name(machine: Machine) -> str | None:
    """The device tree's name of a board, or the vendor's of a PC; None where neither says."""
    if machine.is_mac:
        parts = [machine.sysctl("hw.model"), machine.sysctl("machdep.cpu.brand_string")]
    else:
        tree = machine.text(f"{DEVICE_TREE}/model", f"{DEVICE_TREE_BASE}/model")
        if tree:
            return tree
        dmi = "sys/class/dmi/id"
        parts = [machine.text(f"{dmi}/sys_vendor"), machine.text(f"{dmi}/product_name")]
    return ", ".join(part for part in parts if part) or None


def is_raspberry(machine: Machine) -> bool:
    return "Raspberry Pi" in (board_name(machine) or "")


def _run(machine: Machine) -> Iterator[Finding]:
    name = board_name(machine)
    yield Finding("board", OK if name else UNKNOWN, name or "this machine does not say what it is")
    yield _userland(machine)


def _userland(machine: Machine) -> Finding:
    bits = machine.pointer_bits
    if bits == 64 and machine.is_mac and machine.sysctl("sysctl.proc_translated") == "1":
        return Finding(
            "userland", COSTS, "x86-64 programs, which Rosetta translates",
            "every product is computed by translated instructions, without those of the ARM processor",
            "install Python for arm64 and moe-edge with it: `arch` in a terminal must say arm64",
        )  # fmt: skip
    if bits == 64:
        return Finding("userland", OK, f"64-bit, {machine.machine}")
    kernel = "a 64-bit kernel with " if machine.machine in ("aarch64", "arm64", "x86_64") else ""
    return Finding(
        "userland", COSTS, f"{kernel}{bits}-bit programs",
        "a process can address at most 3 to 4 GiB, which holds neither the arena nor the model's file",
        "install the 64-bit image of the system; a 64-bit kernel alone does not help",
    )  # fmt: skip


CHECK = Check("board", 0, _run)
