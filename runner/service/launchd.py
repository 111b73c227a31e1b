"""A launchd agent for a service of macOS, as a property list. launchd knows no memory limit: --ram alone holds."""

from __future__ import annotations

import plistlib
from pathlib import Path
from typing import Any

from moe_edge.runner.service.unit_facts import Service

LABEL_PREFIX = "io.github.moe-edge."
READ_ENVIRONMENT = 'set -a; . "$0"; exec "$@"'


def label(name: str) -> str:
    return LABEL_PREFIX + name


def launchd_agent(service: Service, home: Path) -> str:
    """The text of the agent's file. home: of the user, where its log goes."""
    command = list(service.command)
    if service.env_file is not None:  # keys of a plist can be read by every program of the user
        command = ["/bin/sh", "-c", READ_ENVIRONMENT, str(service.env_file), *command]
    agent: dict[str, Any] = {
        "Label": label(service.name),
        "ProgramArguments": command,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ExitTimeOut": 15,
        "ProcessType": "Interactive",  # Background would have its reads and its clock held down
        "StandardErrorPath": str(home / "Library/Logs" / f"{service.name}.log"),
        "WorkingDirectory": str(home),
    }
    return plistlib.dumps(agent).decode()
