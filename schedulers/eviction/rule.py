"""What an eviction rule is: it names the unit in memory that goes next. Bytes are counted in cache.py.

A rule is one file of this folder that ends with its RULE; eviction/__init__.py finds it there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import Usage

Units = OrderedDict[int, int]  # unit in memory -> its bytes, the one used longest ago first


class EvictionRule(Protocol):
    """What the cache asks. Shared checks of every rule: tests/test_eviction.py."""

    by_recency: bool  # whether the victim is always the oldest of Units, so that nobody has to ask
    learns: bool  # whether learn() does anything
    first_layer_weight: float  # see ExpertCache.favour_first_layer

    def reset(self, resident: Iterable[int]) -> None:
        """Start again; of equal units the one named first goes first."""

    def note(self, step: Step) -> None:
        """A step begins: its experts are in use until the next one."""

    def added(self, unit: int, victims: Sequence[int]) -> None:
        """A unit was put in, and these were evicted for it."""

    def removed(self, unit: int) -> None:
        """A unit was taken out, and not by choose()."""

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        """The unit to evict; None when only `kept` ones are in memory. It is no longer in memory afterwards."""

    def release(self) -> None:
        """`kept` is another set from now on."""

    def learn(self) -> None:
        """The reads of a step that missed have started: time for what can wait."""

    def order(self, units: Units) -> list[int]:
        """Units in memory, the one to evict first coming first."""

    def new_conversation(self) -> None:
        """A text begins that has nothing to do with the last one."""


@dataclass(frozen=True)
class RuleEntry:
    """A rule as the command line and the reports know it.

    words: one phrase for `--help` and the tables. order: where it stands in lists, lowest first.
    make: (layout, arena bytes, what earlier runs used) -> the rule; rules that do not count take no notice of the last.
    """

    name: str
    order: int
    words: str
    make: Callable[[Layout, int, Usage | None], EvictionRule]
