"""A systemd unit for a service. man 5 systemd.exec and systemd.resource-control have every line of it.

MemoryDenyWriteExecute is left out: callbacks from C into Python are written into memory that is then executed.
"""

from __future__ import annotations

from moe_edge.models.errors import UsageError
from moe_edge.runner.service.unit_facts import Service
from moe_edge.schedulers.budget import MIB

START_MINUTES = 15  # a model of 100 GB from an SD card is copied and checked first

# What needs no privileges, so that a user's own service can have it.
SANDBOX = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
UMask=0077
"""
# What the machine's own systemd can do besides. /proc stays whole: --ram auto reads meminfo, the engine cpuinfo.
SYSTEM_SANDBOX = """\
DynamicUser=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=read-only
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
"""
LOCAL_ONLY = """\
IPAddressDeny=any
IPAddressAllow=localhost
"""


def systemd_unit(service: Service) -> str:
    """The text of the unit. Raises UsageError for arguments that a unit cannot hold."""
    parts = [
        "# Written by `moe-edge service`. MemoryHigh is --ram and 64 MiB for the program; MemoryMax has room for what\n"
        "# the kernel keeps for it. Both need the memory controller: `moe-edge doctor` says whether there is one.\n",
        _unit(service), _service(service),
        "[Install]\n" + f"WantedBy={'default' if service.of_user else 'multi-user'}.target\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _unit(service: Service) -> str:
    lines = ["[Unit]", "Description=moe-edge, a language model server"]
    lines += ["StartLimitIntervalSec=300", "StartLimitBurst=4"]
    if not service.is_local and not service.of_user:  # a user's systemd has no such target
        lines += ["Wants=network-online.target", "After=network-online.target"]
    if service.model is not None:
        lines.append(f"RequiresMountsFor={_quoted(str(service.model))}")
    return "\n".join(lines) + "\n"


def _service(service: Service) -> str:
    text = (
        "[Service]\nType=notify\n"
        f"ExecStart={' '.join(_argument(each) for each in service.command)}\n"
        f"TimeoutStartSec={START_MINUTES}min\nTimeoutStopSec=15s\n"
        "Restart=on-failure\nRestartSec=5s\nRestartPreventExitStatus=2\n"
        "CacheDirectory=moe-edge\nEnvironment=MOE_EDGE_CACHE=%C/moe-edge\n"
    )
    if service.env_file is not None:
        text += f"EnvironmentFile={_plain(str(service.env_file)).replace('%', '%%')}\n"
    text += (
        f"MemoryHigh={-(-service.high_bytes // MIB)}M\nMemoryMax={-(-service.most_bytes // MIB)}M\nMemorySwapMax=0\n"
        "OOMScoreAdjust=500\n"
    )
    text += SANDBOX
    if not service.of_user:
        text += SYSTEM_SANDBOX
        if service.is_local:
            text += LOCAL_ONLY
    return text


def _argument(text: str) -> str:
    """One word of ExecStart: no variable of ours is to be replaced in it."""
    return _quoted(text.replace("$", "$$"))


def _quoted(text: str) -> str:
    """As man 5 systemd.syntax has it, `%` doubled; in quotes where there is a character that means something."""
    text = _plain(text).replace("%", "%%")
    if text and not set(text) & set(" \t\"'\\;"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(text: str) -> str:
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text):
        raise UsageError(f"{text!r}: has a control character, or bytes that are no UTF-8; a unit cannot hold them")
    return text
