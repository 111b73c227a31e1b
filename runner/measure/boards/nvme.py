"""The PCIe link of an NVMe drive, and the memory it borrows from the machine (HMB, host memory buffer)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_edge.runner.measure.boards import disk
from moe_edge.runner.measure.boards.board import is_raspberry
from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine, to_int

OLD_CODE, NEW_CODE = 8 / 10, 128 / 130  # bits that carry data: up to PCIe 2.x, and from 3.0 on
HMB_OPTION = "nvme.max_host_mem_size_mb"


@dataclass(frozen=True)
class Link:
    """transfers: GT/s. width: lanes."""

    transfers: float
    width: int

    @property
    def bytes_per_second(self) -> float:
        """What the link carries before the packets' own headers, which take another tenth or so."""
        code = OLD_CODE if self.transfers <= 5 else NEW_CODE
        return self.transfers * 1e9 * code / 8 * self.width

    def __str__(self) -> str:
        return f"{self.transfers:g} GT/s x{self.width}"


def link_at(machine: Machine, folder: Path, which: str) -> Link | None:
    """The `current` or `max` link of a PCI device; `8.0 GT/s PCIe` and `8 GT/s` are both what kernels write."""
    speed = re.match(r"(\d+(?:\.\d+)?) GT/s", machine.text(folder / f"{which}_link_speed") or "")
    width = machine.number(folder / f"{which}_link_width")
    return Link(float(speed[1]), width) if speed and width and width < 64 else None


def controller(machine: Machine, drive: disk.Drive) -> Path | None:
    """The PCI device of an NVMe drive. With multipath the drive hangs at a subsystem, so the class is asked too."""
    number = re.match(r"nvme(\d+)", drive.name)
    folders = [drive.folder / "device/device", Path(f"sys/class/nvme/nvme{number[1]}/device") if number else None]
    for each in folders:
        found = machine.link(each) if each else None
        if found is not None and machine.exists(found / "current_link_speed"):
            return found
    return None


def _run(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        return
    for drive in disk.drives_of(machine):
        if drive.kind == disk.NVME:
            yield _link(machine, drive)
            yield from _borrowed(machine, drive)


def _link(machine: Machine, drive: disk.Drive) -> Finding:
    device = controller(machine, drive)
    now = link_at(machine, device, "current") if device else None
    if device is None or now is None:
        return Finding("NVMe link", UNKNOWN, f"{drive.name}: the kernel does not say how it is linked")
    most, port = link_at(machine, device, "max"), link_at(machine, device.parent, "max")
    said = f"{drive.name}: {now}, at most {now.bytes_per_second / 1e6:.0f} MB/s"
    if is_raspberry(machine) and now.transfers <= 5:
        twice = Link(8, now.width)
        return Finding(
            "NVMe link", COSTS, said,
            f"the same slot runs at {twice} too, {twice.bytes_per_second / 1e6:.0f} MB/s, though uncertified",
            "add dtparam=pciex1_gen=3 to /boot/firmware/config.txt and reboot",
        )  # fmt: skip
    if most is None:
        return Finding("NVMe link", OK, said)
    reach = most if port is None else Link(min(most.transfers, port.transfers), min(most.width, port.width))
    if now.bytes_per_second < 0.9 * reach.bytes_per_second:
        return Finding(
            "NVMe link", COSTS, said, f"drive and slot could both do {reach}, {reach.bytes_per_second / 1e6:.0f} MB/s",
            "seat the drive anew, use another adapter or cable; `dmesg | grep -i pcie` may name errors",
        )  # fmt: skip
    if now.bytes_per_second < 0.9 * most.bytes_per_second:
        return Finding("NVMe link", OK, f"{said}, which is all this slot has; the drive could do {most}")
    return Finding("NVMe link", OK, said)


def _borrowed(machine: Machine, drive: disk.Drive) -> Iterator[Finding]:
    """The kernel shows `hmb` only for a drive that asks for memory, as those without DRAM of their own do."""
    number = re.match(r"nvme(\d+)", drive.name)
    name = f"sys/class/nvme/nvme{number[1]}/hmb" if number else ""
    on = machine.number(drive.folder / "device/hmb", name) if name else None
    option = re.search(rf"(?:^|\s){re.escape(HMB_OPTION)}=(\S+)", machine.text("proc/cmdline") or "")
    limit = to_int(option[1]) if option else machine.number("sys/module/nvme/parameters/max_host_mem_size_mb")
    if on == 1:
        most = f", at most {limit} MiB" if limit else ""
        yield Finding("NVMe memory", OK, f"{drive.name} borrows memory for its tables (HMB){most}, beside --ram")
    elif on == 0 or (option and limit == 0):
        why = f" ({HMB_OPTION}=0 on the kernel's command line)" if option and limit == 0 else ""
        yield Finding(
            "NVMe memory", COSTS if on == 0 else NOTE, f"{drive.name} gets no memory for its tables: HMB is off{why}",
            "a drive without DRAM of its own reads its tables from flash before a random read; some drop off the bus",
            f"remove {HMB_OPTION}=0 from the kernel's command line" if why
            else f"echo 1 | sudo tee /sys/class/nvme/{drive.name.split('n1')[0]}/hmb",
        )  # fmt: skip


CHECK = Check("NVMe", 60, _run)
