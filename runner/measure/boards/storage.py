"""What the model is on: the kind of drive, how it is connected, and the file system."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards import disk
from moe_edge.runner.measure.boards.disk import Drive, Mount
from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

MOVE = "move the model to an NVMe drive or a USB 3 one, on a blue port; `moe-edge doctor PATH` shows what each does"
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "virtiofs")
ON_MEMORY = ("tmpfs", "ramfs")
NOT_DIRECT = ("overlay", "zfs", "ecryptfs")


def _run(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        yield from _mac(machine)
        return
    mount = disk.mount_of(machine)
    drives = disk.drives_of(machine)
    if not drives:
        where = f"on {mount.kind} from {mount.source}, " if mount else ""
        yield Finding("model's drive", UNKNOWN, f"{machine.target}: {where}no drive of this machine is named for it")
    for drive in drives:
        yield _drive(machine, drive)
    if mount is not None:
        yield _file_system(mount)


def _drive(machine: Machine, drive: Drive) -> Finding:
    model = machine.text(drive.folder / "device/model", drive.folder / "device/name")
    said = f"{drive.kind} {drive.name}" + (f", {model}" if model else "")
    if drive.kind == disk.SD:
        return Finding(
            "model's drive", COSTS, said,
            "the bus of an SD card ends at 104 MB/s (SDR104, a Raspberry Pi 5) or at 50 (DDR50, a 4), and every expert "
            "that is not in memory waits for it", MOVE,
        )  # fmt: skip
    if drive.kind == disk.USB:
        return _usb(machine, drive, said)
    if drive.kind == disk.SATA:
        return _sata(machine, drive, said)
    if drive.kind == disk.OTHER and machine.number(drive.folder / "queue/rotational") == 1:
        return Finding("model's drive", NOTE, f"{said}; the kernel takes it for a hard disk, or does not know", "",
                       "see `random` above: a virtual disk may be anything")  # fmt: skip
    return Finding("model's drive", OK, said)


def _usb(machine: Machine, drive: Drive, said: str) -> Finding:
    at = disk.ancestor(machine, drive.folder, "speed")
    speed = machine.number(at / "speed") if at else None  # Mbit/s
    driver = None
    interface = disk.ancestor(machine, drive.folder, "bInterfaceClass")
    if interface is not None and (link := machine.link(interface / "driver")) is not None:
        driver = link.name
    said += f", {speed} Mbit/s" if speed else ""
    if speed is not None and speed <= 480:
        return Finding(
            "model's drive", COSTS, f"{said}: USB 2",
            "USB 2 carries at most 40 MB/s", "plug it into a blue port (USB 3), with a USB 3 cable",
        )  # fmt: skip
    if driver == "usb-storage":
        return Finding(
            "model's drive", COSTS, f"{said}, driver usb-storage",
            "one read at a time: the reads of several experts wait for one another",
            "use a case whose chip speaks UAS; if it does, remove its usb-storage.quirks=...:u from cmdline.txt",
        )  # fmt: skip
    return Finding("model's drive", OK, said + (f", driver {driver}" if driver else ""))


def _sata(machine: Machine, drive: Drive, said: str) -> Finding:
    if machine.number(drive.folder / "queue/rotational") == 1:
        return Finding(
            "model's drive", COSTS, f"{said}, a hard disk",
            "each expert costs a movement of the head, some 10 ms, before its first byte", "move the model to an SSD",
        )  # fmt: skip
    port = next((part for part in drive.folder.parts if part.startswith("ata") and part[3:].isdigit()), "")
    speed = machine.text(f"sys/class/ata_link/link{port[3:]}/sata_spd") if port else None
    if speed is None or not speed.endswith("Gbps"):
        return Finding("model's drive", OK, said)
    if speed.startswith("6"):
        return Finding("model's drive", OK, f"{said}, {speed}")
    limit = {"1.5 Gbps": 150, "3.0 Gbps": 300}.get(speed)
    return Finding(
        "model's drive", COSTS, f"{said}, linked at {speed}",
        f"the link carries at most {limit} MB/s" if limit else "the link is slower than a SATA SSD",
        "use a port of SATA 6 Gb/s (often another colour), another cable, or an NVMe drive on a PCIe card",
    )  # fmt: skip


def _file_system(mount: Mount) -> Finding:
    said = f"{mount.kind} at {mount.point}"
    packed = sorted(each for each in mount.options if each.startswith("compress"))
    if mount.kind in ON_MEMORY:
        return Finding("file system", COSTS, said, "the model's file itself takes memory", "put it on a drive")
    if mount.kind in NETWORK:
        return Finding("file system", COSTS, said, "every expert that is not in memory crosses the network", MOVE)
    if packed or mount.kind in NOT_DIRECT:
        why = f"{said}, {packed[0]}" if packed else said
        return Finding(
            "file system", NOTE, why, "direct reads may fall back to the page cache, which takes memory beside --ram",
            "see `direct reads` above; ext4 or xfs without compression do them",
        )  # fmt: skip
    if mount.kind.startswith("fuse") or mount.kind in ("exfat", "ntfs3", "vfat", "msdos"):
        limit = "; its files end at 4 GiB" if mount.kind in ("vfat", "msdos") else ""
        return Finding(
            "file system", NOTE, said, f"direct reads may be refused, and a read costs more of the processor{limit}",
            "format the drive with ext4",
        )  # fmt: skip
    return Finding("file system", OK, said)


def _mac(machine: Machine) -> Iterator[Finding]:
    found = disk.mac_disk(machine)
    if not found:
        yield Finding("model's drive", UNKNOWN, f"{machine.target}: diskutil does not say what it is on")
        return
    words = [str(found[key]) for key in ("MediaName", "BusProtocol") if found.get(key)]
    inside = found.get("Internal") is True
    said = ", ".join([*words, "internal" if inside else "external"])
    if found.get("SolidState") is False:
        yield Finding("model's drive", COSTS, f"{said}, a hard disk", "each expert costs a movement of the head",
                      "move the model to an SSD")  # fmt: skip
    else:
        yield Finding("model's drive", OK, said)
    kind = str(found.get("FilesystemType") or "")
    if kind in ("apfs", "hfs"):
        yield Finding("file system", OK, kind)
    elif kind:
        yield Finding("file system", NOTE, kind, "reads past the page cache may be refused",
                      "format the drive with APFS")  # fmt: skip


CHECK = Check("storage", 50, _run)
