"""The policies: which experts of a step are computed at which level. One file a policy; this one only collects them."""

from __future__ import annotations

from typing import Any

from moe_edge.models.errors import UnknownName
from moe_edge.models.registry import collect
from moe_edge.schedulers.options import Knob
from moe_edge.schedulers.policies.entry import PolicyEntry

POLICIES = collect(__name__, __path__, "POLICY", PolicyEntry)
POLICY_NAMES = tuple(POLICIES)
# every knob once, in the order of the policies
KNOBS: dict[str, Knob] = {knob.name: knob for policy in POLICIES.values() for knob in policy.knobs}
DEFAULTS: dict[str, Any] = {name: knob.default for name, knob in KNOBS.items()}


def find_policy(name: str) -> PolicyEntry:
    """The policy of this name. Raises UnknownName."""
    if name not in POLICIES:
        raise UnknownName(f"unknown policy '{name}'; known: {', '.join(POLICY_NAMES)}")
    return POLICIES[name]


def who_listens(knob: Knob) -> tuple[str, ...]:
    """Names of the policies that have this knob."""
    return tuple(name for name, policy in POLICIES.items() if knob in policy.knobs)
