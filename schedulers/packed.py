"""The packed cache: experts kept in memory as they are stored, whole or in one of their two parts (ZipMoE, PAPERS.md).

A packed expert takes 70 % of its bytes (BF16), so more of them fit; each use must unpack it, which costs the
processor but not the disk. So the memory of the experts is split: the most used ones are kept whole, in the arena, and
the next ones packed. What is used is unpacked into the arena in any case, where it passes through a small window.

A packed expert has two parts: its exponents, packed, and its signs and mantissas (docs/FORMAT.md). An expert of which
one part is in memory needs only the other read. What a part saves a byte of memory is the same for both and for the
whole, so one order of eviction for all parts is right, and which experts are there in part is what fits at its end.

The admission is ZipMoE's, by rank of use; its pools are one order here, and its whole experts have a count to beat.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from moe_edge.models.errors import UsageError
from moe_edge.schedulers.block import block_schedule
from moe_edge.schedulers.budget import arena_floor_bytes, format_bytes
from moe_edge.schedulers.cache import STREAM_WINDOW, ExpertCache
from moe_edge.schedulers.eviction.rule import Units
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import Usage

EXPONENTS, MANTISSAS, BOTH = 1, 2, 3  # bits of a mask, as in native/parts.h
N_PARTS = 2
HALVE_AFTER = 256  # tokens: counts of uses then lose half of their weight; 64 reads as much (docs/LOG.md)
CLEARLY_MORE = 1.5  # times the uses of the least used whole expert, before another takes its place: that costs a read


@dataclass(frozen=True)
class PackedSizes:
    """What units take packed, in bytes.

    part_bytes [units][2]: of the exponents, of the signs and mantissas, in memory; 0 for a part that a unit does not
    have. saved_bytes [units][4]: what need not be read when the parts of that mask are in memory.
    """

    part_bytes: tuple[tuple[int, int], ...]
    saved_bytes: tuple[tuple[int, int, int, int], ...]

    def parts(self, layout: Layout) -> Layout:
        """Every part as a unit: those of a unit lie beside each other, as levels of an expert do."""
        return Layout(layout.n_experts, N_PARTS * layout.n_levels, tuple(n for both in self.part_bytes for n in both))

    def all_parts(self, unit: int) -> int:
        """The mask of all that the unit has."""
        exponents, mantissas = self.part_bytes[unit]
        return (EXPONENTS if exponents else 0) | (MANTISSAS if mantissas else 0)

    @property
    def largest_bytes(self) -> int:
        """Of the largest unit, packed."""
        return max(map(sum, self.part_bytes), default=0)


@dataclass(frozen=True)
class PackedSplit:
    """How much of the memory of the experts is for packed ones, and what these take."""

    sizes: PackedSizes
    nbytes: int


def window_bytes(layout: Layout) -> int:
    """What of the arena must stay for experts that are only being used: the floor, and a prompt's window."""
    return max(arena_floor_bytes(layout), (STREAM_WINDOW + 2) * max(layout.unit_bytes))


def most_packed_bytes(layout: Layout, arena_bytes: int) -> int:
    """The largest packed cache in so much memory for experts; 0: there is no room for one."""
    return max(0, arena_bytes - window_bytes(layout))


def check_packed_bytes(layout: Layout, sizes: PackedSizes, arena_bytes: int, packed_bytes: int) -> None:
    """Raises UsageError, with the numbers that would work, for a packed cache that does not fit or holds nothing."""
    most, least = most_packed_bytes(layout, arena_bytes), N_PARTS * sizes.largest_bytes
    if sizes.largest_bytes == 0:
        raise UsageError("a packed cache needs packed experts; convert the model with --pack planes")
    if not least <= packed_bytes <= most:
        room = f"it can have {format_bytes(least)} to {format_bytes(most)}" if least <= most else "there is no room"
        raise UsageError(
            f"a packed cache of {format_bytes(packed_bytes)} does not fit: of {format_bytes(arena_bytes)} for experts "
            f"{format_bytes(window_bytes(layout))} stay for those in use, so {room}; try --packed-cache auto"
        )


class PackedCache:
    """Which experts are kept packed, and, as the arena's eviction rule, which are kept whole.

    arena_bytes: of the arena, the packed cache not among them. rule: by which packed experts are evicted.
    What is used is in the arena first of all. There the most used experts are whole, as far as the window leaves room,
    and not packed as well. The others pass through: they stay packed, and leave the arena in the order they came.
    """

    by_recency, first_layer_weight = False, 1.0

    def __init__(
        self, layout: Layout, arena_bytes: int, split: PackedSplit, rule: str, usage: Usage | None = None
    ) -> None:
        sizes, packed_bytes = split.sizes, split.nbytes
        check_packed_bytes(layout, sizes, arena_bytes + packed_bytes, packed_bytes)
        self.sizes, self._layout = sizes, layout
        self._whole_bytes = arena_bytes - window_bytes(layout)
        self._parts = ExpertCache(sizes.parts(layout), packed_bytes, rule, usage=usage)
        self.learns = self._parts.learns
        self._counts = [0.0] * len(layout.unit_bytes)
        if usage is not None:
            rates = usage.rates()
            self._counts = [HALVE_AFTER * rates[unit // layout.n_levels] for unit in range(len(self._counts))]
        self._tokens = 0
        self._last_layer = layout.n_layers
        self._changed: dict[int, int] = {}
        self.reset(())

    # ---- what is packed

    def held(self, unit: int) -> int:
        """The mask of the parts that are in memory."""
        parts, first = self._parts, N_PARTS * unit
        return (EXPONENTS if first in parts else 0) | (MANTISSAS if first + 1 in parts else 0)

    def take_changes(self) -> Mapping[int, int]:
        """unit -> the mask that it is to have from now on, since the last call."""
        changed, self._changed = self._changed, {}
        return changed

    @property
    def used_bytes(self) -> int:
        """Bytes of the parts in memory."""
        return self._parts.used_bytes

    def reset_parts(self, held: Mapping[int, int]) -> None:
        """Start again from what is packed in memory: unit -> mask."""
        self._changed = {}
        self._parts.reset(
            N_PARTS * unit + part for unit, mask in held.items() for part in range(N_PARTS) if mask >> part & 1
        )

    def schedule(self, units: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Positions of a step's missing units in the order to bring them, see block.py. counts: tokens of each."""
        reads: list[tuple[int, int, int]] = []
        work: list[tuple[int, int, int]] = []
        for i, unit in enumerate(units):
            saved = self.sizes.saved_bytes[unit]
            left = saved[BOTH] - saved[self.held(unit)]
            (reads if left or not saved[BOTH] else work).append((-left, -counts[i], i))
        return block_schedule([i for *_, i in sorted(reads)], [i for *_, i in sorted(work)])

    # ---- what is whole: the arena's eviction rule

    def reset(self, resident: Iterable[int]) -> None:
        self._window: OrderedDict[int, None] = OrderedDict.fromkeys(resident)  # in the arena to leave it, in this order
        self._whole: dict[int, None] = {}
        self._used = 0  # bytes of those
        self._unpacking: list[int] = []  # whole since the present step
        self._heap: list[tuple[float, int]] = []  # (count, at most what it is now; whole unit)

    def note(self, step: Step) -> None:
        if step.layer <= self._last_layer:
            self._count_tokens(step.n_tokens)
        self._last_layer = step.layer
        if self._unpacking:
            self._drop_unpacked()
        self._parts.note(step)
        first, n_levels, counts, parts = (
            self._layout.first_unit[step.layer], self._layout.n_levels, self._counts, self._parts
        )  # fmt: skip
        for expert, count in zip(step.experts, step.counts, strict=True):
            for unit in range(first + expert * n_levels, first + (expert + 1) * n_levels):
                counts[unit] += count
                for part in (N_PARTS * unit, N_PARTS * unit + 1):
                    if part in parts:
                        parts.renew(part)

    def _count_tokens(self, n: int) -> None:
        self._tokens += n
        if self._tokens >= HALVE_AFTER:
            self._counts = [count * 0.5 ** (self._tokens // HALVE_AFTER) for count in self._counts]
            self._tokens %= HALVE_AFTER
            self._heap = [(self._counts[unit], unit) for unit in self._whole]
            heapify(self._heap)

    def added(self, unit: int, victims: Sequence[int]) -> None:
        """A unit comes into the arena: to stay whole, or else to stay packed."""
        if self._may_stay(unit):
            self._whole[unit] = None
            self._used += self._layout.unit_bytes[unit]
            heappush(self._heap, (self._counts[unit], unit))
            self._unpacking.append(unit)
        else:
            self._window[unit] = None
            self._pack(unit)

    def _may_stay(self, unit: int) -> bool:
        """Whether a unit is among the most used; others that are clearly less used make room for it."""
        size = self._layout.unit_bytes[unit]
        while self._used + size > self._whole_bytes:
            least = self._least_used()
            if least is None or self._counts[unit] < CLEARLY_MORE * self._counts[least]:
                return False
            self._release(least)
        return True

    def _least_used(self) -> int | None:
        heap = self._heap
        while heap:
            count, unit = heap[0]
            if unit not in self._whole:
                heappop(heap)
            elif self._counts[unit] > count:
                heapreplace(heap, (self._counts[unit], unit))
            else:
                return unit
        return None

    def _release(self, unit: int) -> None:
        """A whole unit need not stay: it is the next to leave."""
        del self._whole[unit]
        self._used -= self._layout.unit_bytes[unit]
        self._window[unit] = None
        self._window.move_to_end(unit, last=False)

    def _drop_unpacked(self) -> None:
        """What has come to stay whole need not be packed as well; it was unpacked from there, so not before now."""
        for unit in self._unpacking:
            if unit not in self._whole:
                continue
            for part in (N_PARTS * unit, N_PARTS * unit + 1):
                if part in self._parts:
                    self._parts.remove(part)
                    self._changed[unit] = 0
        self._unpacking.clear()

    def _pack(self, unit: int) -> None:
        """Its stored bytes pass through memory now: keep them."""
        for part, size in enumerate(self.sizes.part_bytes[unit]):
            if size == 0 or N_PARTS * unit + part in self._parts:
                continue
            for gone in (*self._parts.add(N_PARTS * unit + part), N_PARTS * unit):
                self._changed[gone // N_PARTS] = self.held(gone // N_PARTS)

    def removed(self, unit: int) -> None:
        if unit in self._whole:
            self._release(unit)
        del self._window[unit]

    def choose(self, units: Units, kept: Container[int]) -> int | None:
        for unit in self._window:
            if unit not in kept:
                del self._window[unit]
                return unit
        least = min((unit for unit in self._whole if unit not in kept), key=self._counts.__getitem__, default=None)
        if least is not None:
            self.removed(least)
        return least

    def release(self) -> None:
        pass

    def learn(self) -> None:
        self._parts.learn()

    def order(self, units: Units) -> list[int]:
        return [*self._window, *sorted(self._whole, key=self._counts.__getitem__)]

    def new_conversation(self) -> None:
        self._parts.new_conversation()
