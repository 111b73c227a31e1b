"""The traps of small machines, named before they bite. One file a check; this one only collects them.

Each check reads the tree of a Machine, so that it runs on recorded boards as on the one it is on. None needs root, and
none raises. What a finding costs is a fact of the hardware or of its documentation; where nobody has measured it with
moe-edge, the sentence has no number.
"""

from __future__ import annotations

from moe_edge.models.registry import collect
from moe_edge.runner.measure.boards.finding import Check, Finding
from moe_edge.runner.measure.boards.machine import Machine

CHECKS = collect(__name__, __path__, "CHECK", Check)


def findings(machine: Machine) -> list[Finding]:
    """Everything the checks say of a machine, in their order."""
    return [finding for check in CHECKS.values() for finding in check.run(machine)]
