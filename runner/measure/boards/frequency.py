"""How fast the cores may run, and who decides: governors, capped clocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moe_edge.runner.measure.boards.finding import COSTS, NOTE, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

POLICIES = "sys/devices/system/cpu/cpufreq/policy*"
PERFORMANCE = "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
OWN_GOVERNOR = ("intel_pstate", "amd-pstate-epp")  # their "powersave" does go to the full clock under load
CAPPED = 0.97


@dataclass(frozen=True)
class Policy:
    """Cores with one clock. kHz, as the kernel counts; None where it does not say."""

    cores: str
    governor: str | None
    driver: str | None
    now: int | None
    limit: int | None
    most: int | None


def policies(machine: Machine) -> list[Policy]:
    return [
        Policy(
            machine.text(at / "affected_cpus") or at.name.removeprefix("policy"),
            machine.text(at / "scaling_governor"),
            machine.text(at / "scaling_driver"),
            machine.number(at / "scaling_cur_freq", at / "cpuinfo_cur_freq"),
            machine.number(at / "scaling_max_freq"),
            machine.number(at / "cpuinfo_max_freq"),
        )
        for at in machine.glob(POLICIES)
    ]


def _run(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        yield from _mac(machine)
        return
    found = policies(machine)
    if not found:
        yield Finding("governor", UNKNOWN, "the kernel offers no choice of clocks here, as in most virtual machines")
        return
    yield from _governor(found)
    yield from _clock(found)


def _governor(found: list[Policy]) -> Iterator[Finding]:
    names = sorted({each.governor for each in found if each.governor})
    if not names:
        yield Finding("governor", UNKNOWN, "the governor cannot be read")
        return
    said = ", ".join(names)
    slow = [each for each in found if each.governor == "powersave" and each.driver not in OWN_GOVERNOR]
    if slow or "userspace" in names:
        yield Finding(
            "governor", COSTS, said, "the cores stay at a low clock however much there is to compute", PERFORMANCE
        )
    elif set(names) <= {"performance"} or all(each.driver in OWN_GOVERNOR for each in found):
        yield Finding("governor", OK, said)
    else:
        yield Finding(
            "governor", NOTE, said,
            "while the cores wait for the disk their clock falls, and it rises only after the next expert has begun",
            PERFORMANCE,
        )  # fmt: skip


def _clock(found: list[Policy]) -> Iterator[Finding]:
    speeds = Counter(
        f"{_ghz(each.now)} of {_ghz(each.most)}" for each in found if each.now is not None and each.most is not None
    )
    if not speeds:
        yield Finding("frequency", UNKNOWN, "the clock cannot be read")
        return
    said = ", ".join(f"{text} GHz" + (f" ({n} groups of cores)" if n > 1 else "") for text, n in speeds.items())
    capped = [each for each in found if each.limit and each.most and each.limit < CAPPED * each.most]
    if not capped:
        yield Finding("frequency", OK, f"{said} now")
        return
    worst = min(capped, key=lambda each: (each.limit or 0) / (each.most or 1))
    limit, most = worst.limit or 0, worst.most or 1
    yield Finding(
        "frequency", COSTS, f"{said} now, cores {worst.cores} held to {_ghz(limit)} GHz",
        f"they compute at {100 * limit / most:.0f} % of their speed",
        f"echo {most} | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_max_freq, "
        "unless heat or supply hold it down",
    )  # fmt: skip


def _mac(machine: Machine) -> Iterator[Finding]:
    said = machine.run(("/usr/bin/pmset", "-g")) or ""
    words = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) >= 2}
    mode = words.get("lowpowermode", words.get("powermode"))
    if mode is None:
        yield Finding("governor", UNKNOWN, "pmset does not say whether low power mode is on")
    elif mode == "1":
        yield Finding(
            "governor", COSTS, "low power mode", "the cores stay at a lower clock", "sudo pmset -a lowpowermode 0"
        )
    else:
        yield Finding("governor", OK, "low power mode is off")


def _ghz(khz: int | None) -> str:
    return "?" if khz is None else f"{khz / 1e6:.2f}"


CHECK = Check("frequency", 30, _run)
