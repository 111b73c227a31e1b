"""Eviction rules: which of the units in memory goes next. One file a rule; this one only collects them.

A layer's experts below one token's working set LRU never hits, and up to it seldom (tests/test_counts.py). The
frequency rules keep what is used most, and do. Nothing made for that case alone did better: pinning by counts, random
and most-recent-first read 3 to 20 % more (docs/LOG.md, 2026-11-22), so there is no second rule to switch to.
"""

from __future__ import annotations

from moe_edge.models.errors import UnknownName
from moe_edge.models.registry import collect
from moe_edge.schedulers.eviction.learned import LARGEST_TABLE_BYTES, table_bytes
from moe_edge.schedulers.eviction.rule import EvictionRule, RuleEntry
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.usage import Usage

ENTRIES = collect(__name__, __path__, "RULE", RuleEntry)
RULES = ("auto", *ENTRIES)


def named_rule(name: str, layout: Layout) -> str:
    """The name itself; for auto the rule it stands for: learned, next-use where learned's table would be large."""
    if name != "auto":
        return name
    return "learned" if table_bytes(layout) <= LARGEST_TABLE_BYTES else "next-use"


def make_rule(name: str, layout: Layout, arena_bytes: int, usage: Usage | None = None) -> EvictionRule:
    """The rule of this name.

    usage: what earlier runs used, where the scores of learned, next-use and decayed start; the other rules, which rank
    by recency or by the conversation, take no notice. Raises UnknownName.
    """
    entry = ENTRIES.get(named_rule(name, layout))
    if entry is None:
        raise UnknownName(f"unknown eviction rule '{name}'; known: {', '.join(RULES)}")
    return entry.make(layout, arena_bytes, usage)
