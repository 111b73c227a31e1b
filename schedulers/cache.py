"""Which units are in the expert arena, and which goes next. Counts bytes; knows nothing of wishes or levels.

The order of eviction is a rule's (rule.py); what is in use or protected goes last under every rule.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from moe_edge.models.errors import BudgetTooSmall
from moe_edge.schedulers.eviction import make_rule
from moe_edge.schedulers.eviction.rule import EvictionRule
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import Usage

# A step of several tokens that asks for more than twice as many experts streams: what was planned so many reads ago
# may go again, though it is the present step's. Enough for the reads in flight and the experts being computed.
STREAM_WINDOW = 8


class ExpertCache:
    """The units in memory; `rule`, one of RULES or a value, says which is evicted first.

    Contract of any rule: the units of the present step's experts go after everything else, oldest use first; before
    them, when nothing else is left, the protected ones. A policy notes a step, renews its hits, then adds its misses in
    plan order: a unit of the step is evicted only for one that comes later in the plan, so by then it was computed.
    A prompt's micro-batch is the exception. It needs nearly every expert of every layer once, so what it has just
    computed is needed again last of all. There, all but the latest STREAM_WINDOW units of the plan compete with the
    other layers' by the rule: a part of each layer stays, and the rest of it streams through a small window. On the
    trained model a prompt of 2,000 tokens then reads 1.02 instead of 1.11 times what Belady's rule would
    (docs/LOG.md, 2026-11-26).

    usage: what earlier runs used, where the rule's scores start. count: where note() counts uses besides.
    streams: whether a prompt's steps do that. A replay that takes a step for one event sets it to False.
    """

    streams = True

    note: Callable[[Step], None]  # a step begins
    renew: Callable[[int], None]  # note a use of a unit in memory; KeyError when absent. Bound anew by reset.

    def __init__(
        self,
        layout: Layout,
        arena_bytes: int,
        rule: str | EvictionRule = "lru",
        *,
        usage: Usage | None = None,
        count: Usage | None = None,
    ) -> None:
        self._layout = layout
        self._unit_bytes = layout.unit_bytes
        self.arena_bytes = arena_bytes
        self.added_bytes = 0  # since it was made
        self._rule = make_rule(rule, layout, arena_bytes, usage) if isinstance(rule, str) else rule
        self._count = count
        self.reset(())

    def reset(self, resident: Iterable[int]) -> None:
        """Start again from these units, the one to evict first coming first. Nothing is in use or protected."""
        self._units = OrderedDict((u, self._unit_bytes[u]) for u in resident)  # oldest use first
        self.renew = self._units.move_to_end  # the C method itself: it is most of what a step without a miss costs
        self.used_bytes = sum(self._units.values())
        self._protected: frozenset[int] = frozenset()
        self._by_recency = self._rule.by_recency  # and nothing protected
        self._step: Step | None = None
        self._kept: frozenset[int] | None = frozenset()  # protected and in use; None: to be worked out
        self._window: deque[int] | None = None  # of a step that streams: its latest units, which may not go
        self._rule.reset(self._units)
        self.note = self._note_and_count if self._count else self._note

    @property
    def resident(self) -> tuple[int, ...]:
        """Units in memory, the one to evict first coming first; protection is not looked at."""
        return tuple(self._rule.order(self._units))

    def oldest_use_first(self) -> tuple[int, ...]:
        """Units in memory, the one used or added last at the end. Safe from any thread: copying the keys is one
        operation of the interpreter, which no step comes between."""
        return tuple(self._units)

    def __contains__(self, unit: int) -> bool:
        return unit in self._units

    def _note(self, step: Step) -> None:
        """A step begins: until the next one its experts are in use."""
        self._step = step
        self._kept = None
        many = step.n_tokens > 1 and len(step.experts) > 2 * STREAM_WINDOW
        self._window = deque() if many and self.streams else None
        self._rule.note(step)

    def _note_and_count(self, step: Step) -> None:
        assert self._count is not None
        self._count.note(step)
        self._note(step)

    def step_done(self) -> None:
        """The present step is over before the next one begins: nothing is in use. For what is fetched in between."""
        self._step = self._window = None
        self._kept = None
        self._rule.release()

    def protect(self, units: Iterable[int]) -> None:
        """From now on these, and no others, are predicted: evicted only when nothing but the step's own is left."""
        self._protected = frozenset(units)
        self._kept = None
        self._by_recency = self._rule.by_recency and not self._protected
        self._rule.release()

    def new_conversation(self) -> None:
        """A text begins that has nothing to do with the last one: a rule that counts by conversation starts again."""
        self._rule.new_conversation()

    @property
    def learns(self) -> bool:
        """Whether learn() wants to be called after a step with a miss, once its reads have started."""
        return self._rule.learns

    def learn(self) -> None:
        self._rule.learn()

    def favour_first_layer(self, weight: float) -> None:
        """Take the first layer's experts for `weight` times as likely as they are; for look-ahead, which hides misses
        in all layers but that one. Heeded by the rule `learned`, which shifts misses to later layers at hardly more of
        them: at weight 2 and 60 % of the experts, 0.27 instead of 0.68 a token in the first of 8 layers, 5.46 instead
        of 5.37 in all (docs/LOG.md, 2026-11-22).
        """
        self._rule.first_layer_weight = weight

    def remove(self, unit: int) -> None:
        """Take out a unit that is in memory."""
        self.used_bytes -= self._units.pop(unit)
        self._rule.removed(unit)

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
        self.added_bytes += size
        self._rule.added(unit, victims)
        if self._window is not None:
            self._stream(self._window, unit)
        return victims

    def add_ahead(self, units: Sequence[int], allowance: float) -> list[tuple[int, list[int]]]:
        """Put in absent units that a later step needs, in this order, as far as free room and then `allowance` bytes
        go; each with its victims. Nothing goes that is in use, protected, or put in here. The present step may not add
        any more."""
        before, self._window = self._protected, None
        in_use = self._in_use()
        self.protect(before | in_use | frozenset(units))
        kept_bytes = sum(self._units[u] for u in before | in_use if u in self._units)
        added: list[tuple[int, list[int]]] = []
        for unit in units:
            size = self._unit_bytes[unit]
            if self.used_bytes + size > self.arena_bytes:
                if size > allowance or kept_bytes + size > self.arena_bytes:
                    break
                allowance -= size
            added.append((unit, self.add(unit)))
            kept_bytes += size
        self.protect(before)
        return added

    def _stream(self, window: deque[int], unit: int) -> None:
        """A unit of a step that streams was planned: those before the window may go."""
        window.append(unit)
        if len(window) > STREAM_WINDOW:
            window.popleft()
            self._kept = self._protected.union(window)
            self._rule.release()

    def _next_victim(self) -> int:
        if self._by_recency:
            unit, size = self._units.popitem(last=False)  # what the step used is the newest
        else:
            if self._kept is None:
                self._kept = self._in_use() | self._protected if self._protected else self._in_use()
            chosen = self._rule.choose(self._units, self._kept)
            unit = self._last_resort() if chosen is None else chosen
            size = self._units.pop(unit)
        self.used_bytes -= size
        return unit

    def _last_resort(self) -> int:
        """Only protected units and the step's own are left: a protected one, or else the oldest."""
        in_use = self._in_use()
        unit = next((unit for unit in self._units if unit not in in_use), next(iter(self._units)))
        self._rule.removed(unit)
        return unit

    def _in_use(self) -> frozenset[int]:
        """All units of the present step's experts."""
        if self._step is None:
            return frozenset()
        n_levels, first = self._layout.n_levels, self._layout.first_unit[self._step.layer]
        if n_levels == 1:
            return frozenset([first + expert for expert in self._step.experts])
        return frozenset(first + e * n_levels + level for e in self._step.experts for level in range(n_levels))
