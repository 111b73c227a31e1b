"""Which units are in the expert arena, and which goes next. Counts bytes; knows nothing of layers, wishes or levels.

An eviction rule is `renew`, `add`, `remove` and `_next_victim`; the bytes are counted here. This one is LRU, which is
within 0-11 % of the best on-line rule on nine models (PAPERS.md, section 8).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from moe_edge.models.errors import BudgetTooSmall
from moe_edge.schedulers.layout import Layout


class ExpertCache:
    """The units in memory, the one used longest ago evicted first.

    Contract of any rule: what this step renewed or added goes after everything else, in that same order. A policy
    renews a step's hits, then adds its misses in plan order, so a unit of the step is evicted only when nothing else is
    left, and only for one that comes later in the plan: by then it has been computed.
    """

    renew: Callable[[int], None]  # note a use; KeyError when absent. Bound anew by reset.

    def __init__(self, layout: Layout, arena_bytes: int) -> None:
        self._unit_bytes = layout.unit_bytes
        self.arena_bytes = arena_bytes
        self.reset(())

    def reset(self, resident: Iterable[int]) -> None:
        """Start again from these units, the one to evict first coming first."""
        self._units = OrderedDict((u, self._unit_bytes[u]) for u in resident)  # oldest use first
        self.renew = self._units.move_to_end  # the C method itself: it is most of what a step without a miss costs
        self.used_bytes = sum(self._units.values())

    @property
    def resident(self) -> tuple[int, ...]:
        """Units in memory, the one used longest ago first."""
        return tuple(self._units)

    def __contains__(self, unit: int) -> bool:
        return unit in self._units

    def remove(self, unit: int) -> None:
        """Take out a unit that is in memory."""
        self.used_bytes -= self._units.pop(unit)

    def make_room(self, need_bytes: int) -> list[int]:
        """Take out units until need_bytes fit; the units taken, in order: no more than the bytes require.

        Raises BudgetTooSmall when the whole arena is smaller.
        """
        if need_bytes > self.arena_bytes:
            raise BudgetTooSmall(
                f"one expert needs {need_bytes} bytes but the expert arena has {self.arena_bytes}", need_bytes
            )
        victims: list[int] = []
        while self.used_bytes + need_bytes > self.arena_bytes:
            victims.append(self._next_victim())
        return victims

    def add(self, unit: int) -> list[int]:
        """Put in an absent unit; the victims its bytes require. Raises BudgetTooSmall."""
        size = self._unit_bytes[unit]
        victims = self.make_room(size)
        self._units[unit] = size
        self.used_bytes += size
        return victims

    def _next_victim(self) -> int:
        unit, size = self._units.popitem(last=False)
        self.used_bytes -= size
        return unit
