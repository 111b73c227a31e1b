"""Heat and supply: what the firmware of a Raspberry Pi says, its voltage sensor, and the throttle counts of a PC."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards.board import DEVICE_TREE, DEVICE_TREE_BASE, is_raspberry
from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine, to_int

# Bits of get_throttled, and 16 higher the same since the boot (the Raspberry Pi's documentation of vcgencmd).
UNDER_VOLTAGE, CAPPED, THROTTLED, SOFT_LIMIT = 1, 2, 4, 8
SINCE_BOOT = 16
WORDS = {
    UNDER_VOLTAGE: "under-voltage", CAPPED: "frequency capped", THROTTLED: "throttled",
    SOFT_LIMIT: "soft temperature limit",
}  # fmt: skip
FIRMWARE = "sys/devices/platform/soc*/*firmware/get_throttled"
HOT_DEGREES = 80
CPU_ZONES = ("cpu", "soc", "x86_pkg_temp", "bigcore", "littlecore", "package")
WANTED_MILLIAMPERES = 5000  # of a Raspberry Pi 5; with less it gives USB 600 mA in all

SUPPLY = "the firmware lowers the clock, and drives on USB or PCIe may drop off the bus"
MEND_SUPPLY = "use the board's own supply (27 W for a Raspberry Pi 5, 15 W for a 4) with a short cable"
MEND_HEAT = "fit a fan or a heat sink: vcgencmd measure_temp under load should stay below 80"


def throttled_bits(machine: Machine) -> int | None:
    """vcgencmd's answer, or the kernel's copy of it; None where there is no such firmware."""
    said = machine.run(("vcgencmd", "get_throttled"))
    if said is not None and "=" in said:
        bits = to_int(said.split("=", 1)[1].strip(), 16)
        if bits is not None:
            return bits
    for path in machine.glob(FIRMWARE):
        bits = to_int(machine.text(path), 16)
        if bits is not None:
            return bits
    return None


def _run(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        yield from _mac(machine)
        return
    yield from _firmware(machine)
    yield from _supply(machine)
    yield from _counts(machine)
    yield from _temperature(machine)


def _firmware(machine: Machine) -> Iterator[Finding]:
    bits = throttled_bits(machine)
    if bits is None:
        yield from _sensor(machine)
        return
    now = [word for bit, word in WORDS.items() if bits & bit]
    before = [word for bit, word in WORDS.items() if bits & bit << SINCE_BOOT and not bits & bit]
    if not now and not before:
        yield Finding("throttling", OK, f"none since the boot (get_throttled={bits:#x})")
        return
    parts = (("now", now), ("since the boot", before))
    said = "; ".join(f"{when}: {', '.join(words)}" for when, words in parts if words)
    low = bool(bits & (UNDER_VOLTAGE | UNDER_VOLTAGE << SINCE_BOOT))
    hot = bool(bits & ((THROTTLED | SOFT_LIMIT) | (THROTTLED | SOFT_LIMIT) << SINCE_BOOT))
    heat = "the firmware lowers the clock until it is cooler"
    cost = "; ".join(text for text, on in ((SUPPLY, low), (heat, hot and not low)) if on) or "the clock was held down"
    mend = "; ".join(text for text, on in ((MEND_SUPPLY, low), (MEND_HEAT, hot)) if on) or MEND_HEAT
    yield Finding("throttling", COSTS, f"{said} (get_throttled={bits:#x})", cost, mend)


def _sensor(machine: Machine) -> Iterator[Finding]:
    """Without vcgencmd the kernel's own driver of the voltage says whether it is too low."""
    for folder in machine.glob("sys/class/hwmon/hwmon*"):
        if machine.text(folder / "name") != "rpi_volt":
            continue
        alarm = machine.number(folder / "in0_lcrit_alarm")
        if alarm is None:
            continue
        if alarm:
            yield Finding("throttling", COSTS, "under-voltage (rpi_volt in0_lcrit_alarm=1)", SUPPLY, MEND_SUPPLY)
        else:
            yield Finding("throttling", OK, "no under-voltage (rpi_volt in0_lcrit_alarm=0)")
        return
    if is_raspberry(machine):
        yield Finding(
            "throttling", UNKNOWN, "neither vcgencmd nor the voltage sensor can be read", "",
            "sudo usermod -aG video $USER, log in again, and apt install raspi-utils",
        )  # fmt: skip


def _supply(machine: Machine) -> Iterator[Finding]:
    name = "chosen/power/max_current"
    data = machine.data(f"{DEVICE_TREE}/{name}", f"{DEVICE_TREE_BASE}/{name}")
    if data is None or len(data) != 4:
        return
    current = int.from_bytes(data, "big")
    if current >= WANTED_MILLIAMPERES:
        yield Finding("supply", OK, f"{current} mA")
        return
    yield Finding(
        "supply", COSTS, f"{current} mA, of the {WANTED_MILLIAMPERES} the board asks for",
        "the firmware gives all USB ports 600 mA together: a drive there, or an NVMe drive beside one, may drop off",
        f"{MEND_SUPPLY}; or, if the supply is known to give it, PSU_MAX_CURRENT={WANTED_MILLIAMPERES} in "
        "`sudo rpi-eeprom-config --edit`",
    )  # fmt: skip


def _counts(machine: Machine) -> Iterator[Finding]:
    files = machine.glob("sys/devices/system/cpu/cpu*/thermal_throttle/package_throttle_count")
    files += machine.glob("sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    counts = [n for n in map(machine.number, files) if n is not None]
    if not counts:
        return
    if max(counts) == 0:
        yield Finding("throttling", OK, "never since the boot")
    else:
        yield Finding(
            "throttling", NOTE, f"{max(counts)} times since the boot, for heat",
            "the clock falls while the processor is hot", "clean the fan, renew the thermal paste",
        )  # fmt: skip


def _temperature(machine: Machine) -> Iterator[Finding]:
    hottest = None
    for zone in machine.glob("sys/class/thermal/thermal_zone*"):
        kind, millidegrees = machine.text(zone / "type") or "", machine.number(zone / "temp")
        if millidegrees is not None and kind.startswith(CPU_ZONES):
            hottest = max(hottest or millidegrees, millidegrees)
    if hottest is None:
        return
    if hottest < HOT_DEGREES * 1000:
        yield Finding("temperature", OK, f"{hottest / 1000:.0f} C")
    else:
        yield Finding(
            "temperature", COSTS, f"{hottest / 1000:.0f} C", "from 80 C on most boards lower their clock", MEND_HEAT
        )


def _mac(machine: Machine) -> Iterator[Finding]:
    for line in (machine.run(("/usr/bin/pmset", "-g", "therm")) or "").splitlines():
        name, _, value = line.partition("=")
        limit = to_int(value.strip())
        if name.strip() == "CPU_Speed_Limit" and limit is not None:
            if limit >= 100:
                yield Finding("throttling", OK, "none")
            else:
                yield Finding("throttling", COSTS, f"held to {limit} %", "the processor is too hot", "let air reach it")


CHECK = Check("throttling", 40, _run)
