"""Look-ahead rules: which experts the next layers will want. One file a rule; this one only collects them."""

from __future__ import annotations

from moe_edge.models.errors import UnknownName
from moe_edge.models.registry import collect
from moe_edge.schedulers.lookahead.rules.rule import Rule, RuleEntry

ENTRIES = collect(__name__, __path__, "RULE", RuleEntry)
AUTO, BEHIND_AUTO = "auto", "stacked"  # auto: this rule, as far and as wide as controller.py finds to pay
LOOKAHEADS = ("off", *ENTRIES, AUTO)


def make_rule(name: str) -> Rule:
    """The rule of this name; of `auto` the one behind it. Raises UnknownName."""
    entry = ENTRIES.get(BEHIND_AUTO if name == AUTO else name)
    if entry is None:
        raise UnknownName(f"unknown look-ahead '{name}'; known: {', '.join(LOOKAHEADS)}")
    return entry.make()
