"""Whether the kernel can limit memory at all, which services and containers rely on."""

from __future__ import annotations

from collections.abc import Iterator

from moe_edge.runner.measure.boards.board import is_raspberry
from moe_edge.runner.measure.boards.finding import COSTS, OK, UNKNOWN, Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

NAME = "memory limits"
COST = "MemoryMax of a service and the memory limit of a container do nothing, and `--ram auto` cannot see one"


def _run(machine: Machine) -> Iterator[Finding]:
    if machine.is_mac:
        return
    words = (machine.text("proc/cmdline") or "").split()
    disabled = "cgroup_disable=memory" in words
    has = _has_controller(machine)
    if has or (has is None and "cgroup_enable=memory" in words):
        late = "; cgroup_disable=memory on the command line is overruled" if disabled else ""
        yield Finding(NAME, OK, f"the kernel can limit the memory of services{late}")
    elif disabled or has is False:
        why = "cgroup_disable=memory is on the kernel's command line"
        if not disabled:
            why = "the kernel offers no memory controller"
        if is_raspberry(machine):
            mend = "append cgroup_enable=memory to the one line of /boot/firmware/cmdline.txt and reboot"
        elif disabled:
            mend = "remove cgroup_disable=memory from the boot loader's kernel arguments and reboot"
        else:
            mend = "append cgroup_enable=memory to the boot loader's kernel arguments and reboot"
        yield Finding(NAME, COSTS, why, COST, mend)
    else:
        yield Finding(NAME, UNKNOWN, "/sys/fs/cgroup and /proc/cgroups cannot be read")


def _has_controller(machine: Machine) -> bool | None:
    """Of version 2 the list at the mount; else the table of all, `name hierarchy groups enabled`."""
    unified = machine.text("sys/fs/cgroup/cgroup.controllers")
    if unified is not None and "memory" in unified.split():
        return True
    for line in (machine.text("proc/cgroups") or "").splitlines():
        words = line.split()
        if len(words) == 4 and words[0] == "memory":
            return words[3] == "1"
    return None if unified is None else False


CHECK = Check("memory limits", 70, _run)
