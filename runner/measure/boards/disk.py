"""The drive a file is on: from its mount to the block device, and to the controller behind that."""

from __future__ import annotations

import plistlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.parsers.expat import ExpatError

from moe_edge.runner.measure.boards.machine import Machine

NVME, SD, EMMC, USB, SATA, OTHER = "NVMe", "SD card", "eMMC", "USB", "SATA", "other"
MOST_LAYERS = 8  # of device mapper and RAID below one file system


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo. options: of the mount and of the file system."""

    point: str
    kind: str
    source: str
    device: str
    options: frozenset[str]


@dataclass(frozen=True)
class Drive:
    """A whole drive. folder: its folder of /sys, links followed."""

    name: str
    kind: str
    folder: Path


def mount_of(machine: Machine) -> Mount | None:
    """The mount the target is on: the longest mount point above it, the last of those."""
    best = None
    for line in (machine.text("proc/self/mountinfo") or "").splitlines():
        mount = _parse(line)
        if mount is None or not PurePosixPath(str(machine.target)).is_relative_to(mount.point):
            continue
        if best is None or len(mount.point) >= len(best.point):
            best = mount
    return best


def _parse(line: str) -> Mount | None:
    """`36 35 259:2 / /srv rw,noatime shared:1 - ext4 /dev/nvme0n1p2 rw`: man 5 proc_pid_mountinfo."""
    left, dash, right = line.partition(" - ")
    words, after = left.split(" "), right.split(" ")
    if not dash or len(words) < 6 or len(after) < 3:
        return None
    options = frozenset(words[5].split(",")) | frozenset(after[2].split(","))
    return Mount(_plain(words[4]), after[0], _plain(after[1]), words[2], options)


def _plain(text: str) -> str:
    """mountinfo writes spaces, tabs and the like in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def drives_of(machine: Machine) -> list[Drive]:
    """The whole drives below the target's file system, several for a RAID; none where the kernel does not say."""
    mount = mount_of(machine)
    if mount is None:
        return []
    start = machine.link(f"sys/dev/block/{mount.device}") if re.fullmatch(r"\d+:\d+", mount.device) else None
    if start is None and mount.source.startswith("/dev/"):  # btrfs numbers its file systems without a device
        start = machine.link(f"sys/class/block/{PurePosixPath(mount.source).name}")
    return [] if start is None else _whole(machine, start, MOST_LAYERS)


def _whole(machine: Machine, folder: Path, left: int) -> list[Drive]:
    slaves = [found for found in map(machine.link, machine.glob(_below(machine, folder / "slaves/*"))) if found]
    if slaves and left:
        return [drive for each in slaves for drive in _whole(machine, each, left - 1)]
    if machine.exists(folder / "partition"):
        folder = folder.parent
    return [Drive(folder.name, _kind(machine, folder), folder)]


def _below(machine: Machine, path: Path) -> str:
    """As a pattern for glob()."""
    root = Path(machine.root).resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path).lstrip("/")


def _kind(machine: Machine, folder: Path) -> str:
    if folder.name.startswith("nvme"):
        return NVME
    if folder.name.startswith("mmcblk"):
        return SD if machine.text(folder / "device/type") == "SD" else EMMC
    parts = folder.parts
    if any(re.fullmatch(r"usb\d+", part) for part in parts):
        return USB
    return SATA if any(re.fullmatch(r"ata\d+", part) for part in parts) else OTHER


def ancestor(machine: Machine, folder: Path, name: str) -> Path | None:
    """The nearest folder above (or at) `folder` that has a file of this name."""
    root = Path(machine.root).resolve()
    for each in (folder, *folder.parents):
        if machine.exists(each / name):
            return each
        if each == root:
            break
    return None


def mac_disk(machine: Machine) -> dict[str, Any]:
    """What diskutil says of the volume the target is on; nothing where it does not."""
    said = machine.run(("/bin/df", "-P", str(machine.target))) or ""
    lines = said.splitlines()
    if len(lines) < 2 or not lines[-1].startswith("/dev/"):
        return {}
    found = machine.run(("/usr/sbin/diskutil", "info", "-plist", lines[-1].split()[0])) or ""
    try:
        value = plistlib.loads(found.encode())
    except (ExpatError, ValueError, LookupError, TypeError, AttributeError, OverflowError):  # plistlib passes all on
        return {}
    return value if isinstance(value, dict) else {}
