"""The doctor on recorded boards: each trap is found, with its cost and what mends it, and nothing raises."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from board_trees import MACHINES, Recorded, mac, nothing_readable, old_pc, orange_pi, pi4, pi5, policy
from moe_edge.runner.measure.boards import CHECKS, findings
from moe_edge.runner.measure.boards.disk import drives_of, mount_of
from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Finding
from moe_edge.runner.measure.boards.machine import Machine, run_program
from moe_edge.runner.measure.boards.nvme import Link
from moe_edge.runner.measure.doctor_text import _board_rows


def found(recorded: Recorded, root: Path) -> dict[str, Finding]:
    return {each.name: each for each in findings(recorded.at(root))}


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {name: each.state for name, each in found.items()}


def test_a_pi_5_with_nvme(tmp_path: Path) -> None:
    said = found(pi5(), tmp_path)
    assert states(said) == {
        "board": OK, "userland": OK, "page size": OK, "cpu features": COSTS, "governor": NOTE, "frequency": OK,
        "throttling": OK, "supply": COSTS, "temperature": OK, "model's drive": OK, "file system": OK,
        "NVMe link": COSTS, "NVMe memory": OK, "memory limits": COSTS, "swap": NOTE,
    }  # fmt: skip
    assert said["board"].found == "Raspberry Pi 5 Model B Rev 1.0"
    assert "16 KiB" in said["page size"].found
    assert "DOTPROD, FP16_VA" in said["cpu features"].found
    assert "--no-binary llama-cpp-python" in said["cpu features"].mend
    assert said["supply"].found == "3000 mA, of the 5000 the board asks for"
    assert said["model's drive"].found == "NVMe nvme0n1, WD_BLACK SN770M 1TB"
    assert said["NVMe link"].found == "nvme0n1: 5 GT/s x1, at most 500 MB/s"
    assert "8 GT/s x1 too, 985 MB/s" in said["NVMe link"].cost
    assert "dtparam=pciex1_gen=3" in said["NVMe link"].mend
    assert "at most 128 MiB" in said["NVMe memory"].found
    assert "cmdline.txt" in said["memory limits"].mend
    assert "zram0 2.00 GiB, 0.0 MiB used; swappiness 60" in said["swap"].found


def test_a_pi_4_with_an_sd_card_and_a_weak_supply(tmp_path: Path) -> None:
    said = found(pi4(), tmp_path)
    assert states(said) == {
        "board": OK, "userland": OK, "page size": OK, "cpu features": OK, "governor": COSTS, "frequency": COSTS,
        "throttling": COSTS, "temperature": COSTS, "model's drive": COSTS, "file system": OK, "memory limits": OK,
        "swap": COSTS,
    }  # fmt: skip
    assert "under-voltage" in said["throttling"].found
    assert "held to 1.40 GHz" in said["frequency"].found
    assert "78 % of their speed" in said["frequency"].cost
    assert said["model's drive"].found == "SD card mmcblk0, SD128"
    assert "overruled" in said["memory limits"].found
    assert "wears it" in said["swap"].cost


def test_an_orange_pi_with_a_badly_seated_drive(tmp_path: Path) -> None:
    said = found(orange_pi(), tmp_path)
    assert states(said) == {
        "board": OK, "userland": OK, "page size": OK, "cpu features": OK, "governor": OK, "frequency": OK,
        "temperature": OK, "model's drive": OK, "file system": NOTE, "NVMe link": COSTS, "NVMe memory": COSTS,
        "memory limits": OK, "swap": NOTE,
    }  # fmt: skip
    assert said["frequency"].found == "1.80 of 1.80 GHz, 2.35 of 2.35 GHz (2 groups of cores) now"
    assert said["file system"].found == "btrfs at /srv/my models, compress=zstd:3"
    assert "8 GT/s x2" in said["NVMe link"].found
    assert "both do 8 GT/s x4, 3938 MB/s" in said["NVMe link"].cost
    assert said["NVMe memory"].mend == "remove nvme.max_host_mem_size_mb=0 from the kernel's command line"
    assert said["temperature"].found == "43 C"


def test_an_old_pc_with_a_sata_drive_below_device_mapper(tmp_path: Path) -> None:
    said = found(old_pc(), tmp_path)
    assert states(said) == {
        "board": OK, "userland": OK, "page size": OK, "cpu features": COSTS, "governor": OK, "frequency": OK,
        "throttling": NOTE, "temperature": OK, "model's drive": COSTS, "file system": OK, "memory limits": OK,
        "swap": NOTE,
    }  # fmt: skip
    assert said["board"].found == "Dell Inc., OptiPlex 9020"
    assert "built with AVX512, which this processor lacks" in said["cpu features"].found
    assert said["model's drive"].found == "SATA sda, Samsung SSD 860, linked at 3.0 Gbps"
    assert "37 times since the boot" in said["throttling"].found


def test_a_machine_that_shows_nothing_has_unknowns_and_no_advice_that_was_made_up(tmp_path: Path) -> None:
    said = found(nothing_readable(), tmp_path)
    assert states(said) == {
        "board": UNKNOWN, "userland": OK, "page size": OK, "cpu features": UNKNOWN, "governor": UNKNOWN,
        "model's drive": UNKNOWN, "memory limits": UNKNOWN, "swap": UNKNOWN,
    }  # fmt: skip
    assert not [each for each in said.values() if each.cost or each.mend]


def test_a_mac_is_asked_by_its_own_programs(tmp_path: Path) -> None:
    said = found(mac(), tmp_path)
    assert states(said) == {
        "board": OK, "userland": COSTS, "page size": OK, "cpu features": COSTS, "governor": COSTS, "throttling": COSTS,
        "model's drive": OK, "file system": NOTE, "swap": NOTE,
    }  # fmt: skip
    assert said["board"].found == "Mac14,2, Apple M2"
    assert "Rosetta" in said["userland"].found
    assert "MATMUL_INT8" in said["cpu features"].found
    assert said["model's drive"].found == "PSSD T7, USB, external"


@pytest.mark.parametrize("name", MACHINES)
def test_what_costs_says_what_and_how_to_mend_it(name: str, tmp_path: Path) -> None:
    for each in findings(MACHINES[name]().at(tmp_path)):
        assert each.found
        assert "\n" not in each.found + each.cost + each.mend
        if each.state == COSTS:
            assert each.cost and each.mend, each


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (0x1, "now: under-voltage (get_throttled=0x1)"),
        (0x50005, "now: under-voltage, throttled (get_throttled=0x50005)"),
        (0x80002, "now: frequency capped; since the boot: soft temperature limit (get_throttled=0x80002)"),
        (0x20000, "since the boot: frequency capped (get_throttled=0x20000)"),
    ],
)
def test_bits_of_the_firmware(bits: int, text: str, tmp_path: Path) -> None:
    recorded = pi5()
    recorded.says[("vcgencmd", "get_throttled")] = f"throttled={bits:#x}\n"
    said = found(recorded, tmp_path)["throttling"]
    assert (said.state, said.found) == (COSTS, text)
    assert ("supply" in said.mend) == bool(bits & 0x10001)
    recorded.says.clear()
    recorded.files["sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"] = f"{bits:x}\n"
    assert found(recorded, tmp_path / "again")["throttling"] == said


def test_a_pi_without_vcgencmd_and_sensor_says_how_to_get_one(tmp_path: Path) -> None:
    recorded = pi5()
    recorded.says.clear()
    recorded.files = {name: data for name, data in recorded.files.items() if "hwmon" not in name}
    said = found(recorded, tmp_path)["throttling"]
    assert (said.state, said.mend[:21]) == (UNKNOWN, "sudo usermod -aG vide")


def test_a_link_that_is_all_the_slot_has_costs_nothing(tmp_path: Path) -> None:
    recorded = pi5()
    for name in recorded.files:
        if name.endswith(("0/max_link_speed", "0/current_link_speed")) and "0001:01" not in name[-40:]:
            recorded.files[name] = "8.0 GT/s PCIe\n"
        elif name.endswith("current_link_speed"):
            recorded.files[name] = "8.0 GT/s PCIe\n"
    said = found(recorded, tmp_path)["NVMe link"]
    assert said == Finding(
        "NVMe link", OK,
        "nvme0n1: 8 GT/s x1, at most 985 MB/s, which is all this slot has; the drive could do 16 GT/s x4",
    )


def test_speed_of_a_link_is_by_its_code() -> None:
    assert [round(Link(gt, 1).bytes_per_second / 1e6) for gt in (2.5, 5, 8, 16)] == [250, 500, 985, 1969]


@pytest.mark.parametrize(
    ("speed", "driver", "state"),
    [("480", "uas", COSTS), ("5000", "usb-storage", COSTS), ("5000", "uas", OK), ("10000", "uas", OK)],
)
def test_drives_on_usb(speed: str, driver: str, state: str, tmp_path: Path) -> None:
    recorded = pi4()
    usb = "sys/devices/platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb2/2-1"
    disk = f"{usb}/2-1:1.0/host0/target0:0:0/0:0:0:0/block/sda"
    recorded.files |= {
        "proc/self/mountinfo": "21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n", f"{usb}/speed": f"{speed}\n",
        f"{usb}/2-1:1.0/bInterfaceClass": "08\n", f"{disk}/sda1/partition": "1\n", f"{disk}/device/model": "Extreme\n",
    }  # fmt: skip
    recorded.links = {"sys/dev/block/8:1": f"{disk}/sda1", f"{usb}/2-1:1.0/driver": f"sys/bus/usb/drivers/{driver}"}
    said = found(recorded, tmp_path)["model's drive"]
    assert (said.state, said.found[:25]) == (state, f"USB sda, Extreme, {speed} Mbit/s"[:25])


def test_every_drive_of_a_raid_is_looked_at(tmp_path: Path) -> None:
    recorded = old_pc()
    other = "sys/devices/pci0000:00/0000:00:1f.2/ata2/host1/target1:0:0/1:0:0:0/block/sdb"
    recorded.files |= {f"{other}/queue/rotational": "1\n"}
    recorded.links["sys/devices/virtual/block/dm-0/slaves/sdb"] = other
    said = [each for each in findings(recorded.at(tmp_path)) if each.name == "model's drive"]
    assert [each.found.split(",")[0] for each in said] == ["SATA sda", "SATA sdb"]
    assert "a hard disk" in said[1].found


@pytest.mark.parametrize(
    ("kind", "options", "state"),
    [("ext4", "rw", OK), ("tmpfs", "rw", COSTS), ("nfs4", "rw", COSTS), ("overlay", "rw", NOTE), ("vfat", "rw", NOTE),
     ("fuseblk", "rw", NOTE), ("f2fs", "rw,compress_algorithm=lz4", NOTE), ("xfs", "rw", OK)],
)  # fmt: skip
def test_file_systems(kind: str, options: str, state: str, tmp_path: Path) -> None:
    recorded = pi4()
    recorded.files["proc/self/mountinfo"] = f"21 1 179:2 / / rw - {kind} /dev/mmcblk0p2 {options}\n"
    assert found(recorded, tmp_path)["file system"].state == state


def test_the_last_mount_at_the_nearest_point_counts(tmp_path: Path) -> None:
    recorded = pi4()
    recorded.files["proc/self/mountinfo"] = (
        "1 1 179:2 / / rw - ext4 /dev/mmcblk0p2 rw\n2 1 8:1 / /srv rw - ext4 /dev/sda1 rw\n"
        "3 1 8:2 / /srv rw - xfs /dev/sdb1 rw\n4 1 8:3 / /srv/mod rw - ext4 /dev/sdc1 rw\nnonsense\n"
    )
    mount = mount_of(recorded.at(tmp_path))
    assert mount is not None
    assert (mount.device, mount.kind) == ("8:2", "xfs")


def test_32_bit_programs_on_a_64_bit_kernel(tmp_path: Path) -> None:
    said = found(replace(pi4(), pointer_bits=32), tmp_path)["userland"]
    assert (said.state, said.found) == (COSTS, "a 64-bit kernel with 32-bit programs")


def test_clocks_that_only_some_cores_may_use(tmp_path: Path) -> None:
    recorded = orange_pi()
    recorded.files |= policy(6, "6 7", "performance", 1200000, 2352000, 1200000)
    said = found(recorded, tmp_path)["frequency"]
    assert (said.state, said.cost) == (COSTS, "they compute at 51 % of their speed")
    assert "cores 6 7 held to 1.20 GHz" in said.found


def test_the_doctor_prints_the_cost_and_the_mend_below_what_costs(tmp_path: Path) -> None:
    rows = _board_rows([asdict(each) for each in findings(pi4().at(tmp_path))])
    at = next(i for i, (name, _) in enumerate(rows) if name == "model's drive")
    assert rows[at][1].startswith("COSTS: SD card")
    assert [(name, text.split(":")[0]) for name, text in rows[at + 1 : at + 3]] == [("", "cost"), ("", "mend")]
    assert rows[at + 3][0]


# ---- nothing raises ----------------------------------------------------------------------------------------


def damaged(recorded: Recorded, turn: random.Random) -> Recorded:
    """The same machine with a few of its files cut, emptied, filled with noise or missing, and programs that rave."""

    def spoil(data: bytes) -> bytes:
        how = turn.randrange(5)
        at = turn.randrange(len(data) + 1)
        return (data[:at], b"", bytes(turn.randrange(256) for _ in range(30)), data[at:], b"-1\n")[how]

    files = {
        name: spoil(data if isinstance(data, bytes) else data.encode()) if turn.random() < 0.4 else data
        for name, data in recorded.files.items()
        if turn.random() < 0.9
    }
    links = {name: there for name, there in recorded.links.items() if turn.random() < 0.8}
    says = {
        name: spoil(text.encode()).decode(errors="replace") if turn.random() < 0.5 else text
        for name, text in recorded.says.items()
    }
    return replace(recorded, files=files, links=links, says=says)


@pytest.mark.parametrize("name", MACHINES)
def test_damaged_trees_raise_nothing(name: str, tmp_path: Path) -> None:
    turn = random.Random(name)
    for n in range(25):
        for each in findings(damaged(MACHINES[name](), turn).at(tmp_path / str(n))):
            assert each.found


def test_folders_and_refused_files_in_the_place_of_files(tmp_path: Path) -> None:
    recorded = pi5()
    machine = recorded.at(tmp_path)
    for name in recorded.files:
        path = tmp_path / name
        path.unlink()
        path.mkdir()
    assert len(findings(machine)) >= len(CHECKS) - 2


def test_a_circle_of_devices_ends(tmp_path: Path) -> None:
    recorded = old_pc()
    recorded.links["sys/devices/virtual/block/dm-0/slaves/dm-0"] = "sys/devices/virtual/block/dm-0"
    assert {drive.name for drive in drives_of(recorded.at(tmp_path))} >= {"sda"}


def test_programs_that_are_not_there_or_fail_say_nothing() -> None:
    assert run_program(("/nonexistent/vcgencmd", "get_throttled")) is None
    assert run_program((sys.executable, "-c", "raise SystemExit(3)")) is None
    assert run_program((sys.executable, "-c", "print(7)")) == "7\n"


@pytest.mark.parametrize("make", [pi5, mac])
def test_this_machine_is_looked_at_without_an_error(make: Callable[[], Recorded], tmp_path: Path) -> None:
    said = findings(Machine(target=tmp_path, system=make().system))
    assert {each.name for each in said} >= {"board", "userland", "page size"}
