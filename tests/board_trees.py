"""Machines as their kernels describe them: files of /proc and /sys in the formats those kernels write.

Written by hand after the kernels' documentation and drivers; none was copied from a board.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moe_edge.runner.measure.boards.machine import Machine


@dataclass
class Recorded:
    """files: name -> text or bytes. links: name -> where it leads, from the root. says: a program's output."""

    files: dict[str, str | bytes]
    links: dict[str, str] = field(default_factory=dict)
    says: dict[tuple[str, ...], str] = field(default_factory=dict)
    target: str = "/srv/models/model.gguf"
    system: str = "Linux"
    machine: str = "aarch64"
    pointer_bits: int = 64
    page_bytes: int = 4096
    build: frozenset[str] | None = frozenset({"NEON", "ARM_FMA", "FP16_VA", "DOTPROD"})

    def at(self, root: Path) -> Machine:
        """The machine, its tree written below root."""
        for name, data in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if isinstance(data, bytes) else data.encode())
        for name, there in self.links.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (root / there).mkdir(parents=True, exist_ok=True)
            path.symlink_to(root / there)
        return Machine(
            root, Path(self.target), self.system, self.machine, self.pointer_bits, self.page_bytes, self.build,
            lambda arguments: self.says.get(arguments),
        )  # fmt: skip


def swaps(*lines: str) -> str:
    return "\n".join(["Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority", *lines]) + "\n"


def cpuinfo(features: str, n: int, key: str = "Features") -> str:
    core = f"BogoMIPS\t: 108.00\n{key}\t: {features}\nCPU part\t: 0xd0b\n"
    return "\n".join(f"processor\t: {i}\n{core}" for i in range(n))


def policy(number: int, cores: str, governor: str, now: int, most: int, limit: int = 0) -> dict[str, str | bytes]:
    at = f"sys/devices/system/cpu/cpufreq/policy{number}"
    return {
        f"{at}/affected_cpus": f"{cores}\n", f"{at}/scaling_governor": f"{governor}\n",
        f"{at}/scaling_driver": "cpufreq-dt\n", f"{at}/scaling_cur_freq": f"{now}\n",
        f"{at}/scaling_max_freq": f"{limit or most}\n", f"{at}/cpuinfo_max_freq": f"{most}\n",
    }  # fmt: skip


A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
A72 = "fp asimd evtstrm crc32 cpuid"


def pi5() -> Recorded:
    """A Raspberry Pi 5, NVMe without DRAM on its HAT at Gen 2, a 3 A supply, pages of 16 KiB, Pi OS as installed."""
    pcie = "sys/devices/platform/axi/1000110000.pcie/pci0001:00/0001:00:00.0"
    disk = f"{pcie}/0001:01:00.0/nvme/nvme0/nvme0n1"
    files: dict[str, str | bytes] = {
        "proc/device-tree/model": b"Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/device-tree/chosen/power/max_current": (3000).to_bytes(4, "big"),
        "proc/cpuinfo": cpuinfo(A76, 4),
        "proc/cmdline": "reboot=w coherent_pool=1M 8250.nr_uarts=1 pci=pcie_bus_safe cgroup_disable=memory numa_policy="
        "interleave root=PARTUUID=1-02 rootfstype=ext4 rootwait\n",
        "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t0\t60\t1\nmemory\t0\t60\t0\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
        "proc/swaps": swaps("/dev/zram0                              partition\t2097136\t0\t100"),
        "proc/sys/vm/swappiness": "60\n",
        "proc/self/mountinfo": "22 1 259:2 / / rw,noatime shared:1 - ext4 /dev/nvme0n1p2 rw\n"
        "30 22 0:27 / /sys/fs/cgroup rw,nosuid shared:8 - cgroup2 cgroup2 rw\n",
        f"{pcie}/max_link_speed": "5.0 GT/s PCIe\n", f"{pcie}/max_link_width": "1\n",
        f"{pcie}/0001:01:00.0/current_link_speed": "5.0 GT/s PCIe\n",
        f"{pcie}/0001:01:00.0/current_link_width": "1\n",
        f"{pcie}/0001:01:00.0/max_link_speed": "16.0 GT/s PCIe\n",
        f"{pcie}/0001:01:00.0/max_link_width": "4\n",
        f"{pcie}/0001:01:00.0/nvme/nvme0/model": "WD_BLACK SN770M 1TB                     \n",
        f"{pcie}/0001:01:00.0/nvme/nvme0/hmb": "1\n",
        f"{disk}/nvme0n1p2/partition": "2\n", f"{disk}/queue/rotational": "0\n",
        "sys/module/nvme/parameters/max_host_mem_size_mb": "128\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n", "sys/class/thermal/thermal_zone0/temp": "54300\n",
        "sys/class/hwmon/hwmon2/name": "rpi_volt\n", "sys/class/hwmon/hwmon2/in0_lcrit_alarm": "0\n",
        **policy(0, "0 1 2 3", "ondemand", 1500000, 2400000),
    }  # fmt: skip
    links = {
        "sys/dev/block/259:2": f"{disk}/nvme0n1p2",
        f"{disk}/device": f"{pcie}/0001:01:00.0/nvme/nvme0",
        f"{pcie}/0001:01:00.0/nvme/nvme0/device": f"{pcie}/0001:01:00.0",
    }
    says: dict[tuple[str, ...], str] = {("vcgencmd", "get_throttled"): "throttled=0x0\n"}
    return Recorded(files, links, says, page_bytes=16384, build=frozenset({"NEON", "ARM_FMA"}))


def pi4() -> Recorded:
    """A Raspberry Pi 4 with the model on its SD card, a phone's charger and a swap file; no vcgencmd."""
    disk = "sys/devices/platform/emmc2bus/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0"
    files: dict[str, str | bytes] = {
        "sys/firmware/devicetree/base/model": b"Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/cpuinfo": cpuinfo(A72, 4),
        "proc/cmdline": "root=PARTUUID=2-02 rootfstype=ext4 cgroup_disable=memory cgroup_enable=memory\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
        "proc/swaps": swaps("/var/swap                               file\t\t524284\t\t131072\t\t-2"),
        "proc/sys/vm/swappiness": "60\n",
        "proc/self/mountinfo": "21 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw\n",
        f"{disk}/mmcblk0p2/partition": "2\n", f"{disk}/queue/rotational": "0\n",
        "sys/devices/platform/emmc2bus/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa/type": "SD\n",
        "sys/devices/platform/emmc2bus/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa/name": "SD128\n",
        "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
        "sys/class/hwmon/hwmon1/name": "rpi_volt\n", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n", "sys/class/thermal/thermal_zone0/temp": "82277\n",
        **policy(0, "0 1 2 3", "powersave", 600000, 1800000, 1400000),
    }  # fmt: skip
    links = {
        "sys/dev/block/179:2": f"{disk}/mmcblk0p2",
        f"{disk}/device": "sys/devices/platform/emmc2bus/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa",
    }
    return Recorded(files, links, build=frozenset({"NEON", "ARM_FMA"}))


def orange_pi() -> Recorded:
    """An Orange Pi 5 Plus (RK3588): PCIe 3.0 x4 trained to x2, btrfs with compression, zram, HMB switched off."""
    pcie = "sys/devices/platform/a40000000.pcie/pci0000:00/0000:00:00.0"
    disk = f"{pcie}/0000:01:00.0/nvme/nvme0/nvme0n1"
    files: dict[str, str | bytes] = {
        "proc/device-tree/model": b"Xunlong Orange Pi 5 Plus\0",
        "proc/cpuinfo": cpuinfo("fp asimd evtstrm aes fphp asimdhp lrcpc dcpop asimddp", 4) + cpuinfo(A76, 4),
        "proc/cmdline": "root=UUID=9 rootwait rootfstype=btrfs nvme.max_host_mem_size_mb=0 cgroup_enable=memory\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
        "proc/swaps": swaps("/dev/zram0                              partition\t8120316\t1024\t5"),
        "proc/sys/vm/swappiness": "100\n",
        "proc/self/mountinfo": "23 1 0:25 /@ / rw,noatime - btrfs /dev/nvme0n1p1 rw,ssd,subvol=/@\n"
        "40 23 0:25 /@models /srv/my\\040models rw,noatime - btrfs /dev/nvme0n1p1 rw,compress=zstd:3,subvol=/@models\n",
        f"{pcie}/max_link_speed": "8.0 GT/s PCIe\n", f"{pcie}/max_link_width": "4\n",
        f"{pcie}/0000:01:00.0/current_link_speed": "8.0 GT/s PCIe\n",
        f"{pcie}/0000:01:00.0/current_link_width": "2\n",
        f"{pcie}/0000:01:00.0/max_link_speed": "16.0 GT/s PCIe\n",
        f"{pcie}/0000:01:00.0/max_link_width": "4\n",
        f"{pcie}/0000:01:00.0/nvme/nvme0/hmb": "0\n",
        f"{disk}/nvme0n1p1/partition": "1\n",
        "sys/class/thermal/thermal_zone0/type": "soc-thermal\n", "sys/class/thermal/thermal_zone0/temp": "41615\n",
        "sys/class/thermal/thermal_zone1/type": "bigcore0-thermal\n", "sys/class/thermal/thermal_zone1/temp": "43461\n",
        **policy(0, "0 1 2 3", "performance", 1800000, 1800000),
        **policy(4, "4 5", "performance", 2352000, 2352000),
        **policy(6, "6 7", "performance", 2352000, 2352000),
    }  # fmt: skip
    links = {
        "sys/class/block/nvme0n1p1": f"{disk}/nvme0n1p1",
        f"{disk}/device": f"{pcie}/0000:01:00.0/nvme/nvme0",
        f"{pcie}/0000:01:00.0/nvme/nvme0/device": f"{pcie}/0000:01:00.0",
    }
    return Recorded(files, links, target="/srv/my models/m.gguf")


def old_pc() -> Recorded:
    """An x86 PC of 2013, a SATA SSD on an old port below device mapper, a llama.cpp built elsewhere, with AVX-512."""
    ata = "sys/devices/pci0000:00/0000:00:1f.2/ata1"
    disk = f"{ata}/host0/target0:0:0/0:0:0:0/block/sda"
    flags = "fpu vme sse4_1 sse4_2 avx f16c rdrand fma bmi1 avx2 bmi2"
    files: dict[str, str | bytes] = {
        "sys/class/dmi/id/sys_vendor": "Dell Inc.\n", "sys/class/dmi/id/product_name": "OptiPlex 9020\n",
        "proc/cpuinfo": cpuinfo(flags, 4, "flags\t"),
        "proc/cmdline": "BOOT_IMAGE=/vmlinuz-6.1.0-18-amd64 root=/dev/mapper/vg-root ro quiet\n",
        "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t100\t1\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
        "proc/swaps": swaps("/dev/dm-1                               partition\t8388604\t52312\t\t-2"),
        "proc/sys/vm/swappiness": "60\n",
        "proc/self/mountinfo": "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/mapper/vg-root rw,errors=remount-ro\n",
        f"{disk}/sda2/partition": "2\n", f"{disk}/queue/rotational": "0\n",
        f"{disk}/device/model": "Samsung SSD 860 \n",
        "sys/class/ata_link/link1/sata_spd": "3.0 Gbps\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "0\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "37\n",
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n", "sys/class/thermal/thermal_zone0/temp": "47000\n",
    }  # fmt: skip
    for core in range(4):
        files |= policy(core, str(core), "powersave", 800000, 3600000)
        files[f"sys/devices/system/cpu/cpufreq/policy{core}/scaling_driver"] = "intel_pstate\n"
    links = {
        "sys/dev/block/254:0": "sys/devices/virtual/block/dm-0",
        "sys/devices/virtual/block/dm-0/slaves/sda2": f"{disk}/sda2",
    }
    build = frozenset({"SSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2", "AVX512"})
    return Recorded(files, links, machine="x86_64", build=build)


def nothing_readable() -> Recorded:
    """A sandbox without /proc and /sys, and a llama.cpp that does not load."""
    return Recorded({}, build=None)


def mac() -> Recorded:
    """A MacBook with M2, low power mode, the model on an exFAT drive outside; Python for x86 under Rosetta."""
    df = "Filesystem 512-blocks Used Available Capacity Mounted on\n/dev/disk4s1 1953456128 1 1 1% /Volumes/T7\n"
    info = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict><key>BusProtocol</key><string>USB</string>'
        "<key>FilesystemType</key><string>exfat</string><key>Internal</key><false/><key>MediaName</key>"
        "<string>PSSD T7</string><key>SolidState</key><true/></dict></plist>\n"
    )
    sysctl = {
        "hw.model": "Mac14,2", "machdep.cpu.brand_string": "Apple M2", "sysctl.proc_translated": "1",
        "hw.optional.arm.FEAT_DotProd": "1", "hw.optional.arm.FEAT_FP16": "1", "hw.optional.arm.FEAT_I8MM": "1",
        "vm.swapusage": "total = 2048.00M  used = 700.25M  free = 1347.75M  (encrypted)",
    }  # fmt: skip
    says: dict[tuple[str, ...], str] = {}
    says |= {("/usr/sbin/sysctl", "-n", name): f"{value}\n" for name, value in sysctl.items()}
    says |= {
        ("/usr/bin/pmset", "-g"): "Currently in use:\n lowpowermode         1\n standby   1\n",
        ("/usr/bin/pmset", "-g", "therm"): "Note: No thermal warning level\n\tCPU_Speed_Limit \t= 80\n",
        ("/bin/df", "-P", "/Volumes/T7/m.gguf"): df,
        ("/usr/sbin/diskutil", "info", "-plist", "/dev/disk4s1"): info,
    }
    return Recorded(
        {}, {}, says, "/Volumes/T7/m.gguf", "Darwin", "x86_64", page_bytes=16384,
        build=frozenset({"NEON", "DOTPROD", "FP16_VA"}),
    )  # fmt: skip


MACHINES = {
    "Raspberry Pi 5": pi5, "Raspberry Pi 4": pi4, "Orange Pi 5 Plus": orange_pi, "old PC": old_pc,
    "nothing readable": nothing_readable, "Mac": mac,
}  # fmt: skip
