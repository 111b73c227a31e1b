"""A policy driven through a routing trace without the model: its hits, loads, evictions and bytes, and estimated times.

The counts equal the engine's for the same policy, arena and routing, exactly: the policy object is the real one, it
gets the same Steps, and its plans are executed as native/step.cpp does. A policy that lowers or skips experts would in
the model change what later layers see and route to; a trace keeps the routing it was recorded with. Whether a step is
one event, atomic.py says.

The time model. One compute resource, one disk: a pipe that serves loads in the order they are asked for (FIFO), each
for its bytes divided by disk_bytes_per_second. A step's experts are known when it begins. Hits are computed first, then
each load as it arrives; a load whose victim the step still needs waits until that has been computed; the step ends with
its last expert. Waiting with nothing to compute is stall. What is packed is also unpacked by the one compute resource,
when its bytes are there; with a packed cache, loads that need no read are done while others are read.
After a step come other_seconds, then the next step.
What is fetched ahead goes to a second queue, served a piece (a third of a unit) at a time while no load is queued; a
unit that a step needs before it is whole comes before the step's loads. Of a unit that is cancelled, or still queued at
the end, only the pieces that were begun count as read. Not modelled: several reads at once that share the disk, an
expert's first projections computed while the last arrives, prefill's threads each on an expert of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import EngineError, UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Prefetch, Step, StepPlan
from moe_edge.schedulers.lookahead.controller import Measured
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.packed import BOTH, EXPONENTS, MANTISSAS, PackedCache, PackedSplit
from moe_edge.schedulers.policy import make_policy
from moe_edge.schedulers.replay.atomic import check_atomic, check_holds_steps
from moe_edge.schedulers.replay.trace import Array, Trace

PIECES = 3  # that a unit is read in
MEMORY_BYTES_PER_SECOND = 10e9  # a decode step's experts are bound by memory; two channels of DDR4 give 20 to 30


class Planner(Protocol):
    """What of a Policy the simulation needs."""

    def plan(self, step: Step) -> StepPlan | None: ...

    def meanwhile(self, step: Step) -> Sequence[Prefetch]: ...

    def reset(self, resident: Iterable[int]) -> None: ...


MakePlanner = Callable[[Layout, int], Planner]


@dataclass(frozen=True)
class Costs:
    """disk_bytes_per_second: of the whole disk. use_seconds: computing one expert of a step. other_seconds: between
    the experts of one layer and the routing of the next.

    unpack_bytes_per_second: what all threads together make of packed experts, in bytes of whole ones.
    disk_factor: the disk's speed at a time, as a factor; for disks that change.

    None: what the trace measured, a step's seconds spread evenly over its experts. Without measured seconds: the mean
    bytes of a high-level expert at MEMORY_BYTES_PER_SECOND, whatever the number of tokens; and 0.
    """

    disk_bytes_per_second: float = 3e9
    use_seconds: float | None = None
    other_seconds: float | None = None
    disk_factor: Callable[[float], float] | None = None
    unpack_bytes_per_second: float = inf


@dataclass(frozen=True)
class SimResult:
    """Counts as the engine has them: uses = hits + loads, skipped ones apart. seconds = computing + stall_seconds.

    prefetched and the four after it: as in native/capi.h; all but the first depend on when reads are done, and so do
    the bytes read of what is fetched ahead. So does what of it is packed in memory, with its three counts.
    """

    arena_bytes: int
    tokens: int
    steps: int
    uses: int
    hits: int
    loads: int
    evictions: int
    bytes_read: int
    low_uses: int
    skipped_uses: int
    stall_seconds: float
    seconds: float
    prefetched: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    packed_hits: int = 0
    exponent_hits: int = 0
    mantissa_hits: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses if self.uses else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / self.tokens

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("inf")


def simulate(
    trace: Trace, make: MakePlanner, arena_bytes: int, costs: Costs | None = None, resident: Iterable[int] = (),
    packed_bytes: int = 0, *, held: Iterable[tuple[int, int]] = (), atomic: bool = False,
) -> SimResult:  # fmt: skip
    """Run the planner that make(layout, arena_bytes) gives through the trace.

    resident: units in the arena at the start, the first to evict first.
    packed_bytes: of arena_bytes, what the planner's packed cache has; make() is given the rest.
    held: (unit, mask) of what the packed cache has at the start. atomic: a step is one event, whose experts are not
    evicted for each other.
    Raises BudgetTooSmall, with `atomic` also for an arena that does not hold the largest step, and EngineError for a
    plan that the engine would refuse, or that is not atomic though it must be.
    """
    costs = costs or Costs()
    layout, resident = trace.layout(), tuple(resident)
    if atomic:
        check_holds_steps(trace, arena_bytes - packed_bytes)
    planner = make(layout, arena_bytes - packed_bytes)
    planner.reset(resident)
    arena = SimArena(
        layout, trace.read_bytes.tolist(), arena_bytes - packed_bytes, costs.disk_bytes_per_second, resident,
        costs.disk_factor,
    )  # fmt: skip
    packed = getattr(planner, "packed", None)
    arena.use_packed(packed, packed_bytes, 1 / costs.unpack_bytes_per_second if trace.packed_sizes() else 0.0)
    if packed is not None:
        masks = dict[int, int](held)
        packed.reset_parts(masks)
        arena.start_with(masks)
    if hasattr(planner, "measure"):
        planner.measure = arena.measure
    use_seconds = _default_use_seconds(layout) if costs.use_seconds is None else costs.use_seconds
    other_seconds = costs.other_seconds or 0.0
    compute = None if costs.use_seconds is not None else _lists(trace.compute_seconds)
    other = None if costs.other_seconds is not None else _lists(trace.other_seconds)
    plan, execute = planner.plan, arena.execute
    steps = 0
    wants = {f"with_{what}": bool(getattr(planner, f"wants_{what}", False)) for what in ("routing", "ahead")}
    for batch, step in trace.steps(**wants):
        if compute is not None:
            use_seconds = compute[batch][step.layer] / len(step.experts)
        planned = plan(step)
        if packed is not None:
            arena.hold(packed.take_changes())
        if atomic and planned is not None:
            check_atomic(layout, step, planned)
        execute(step, planned, use_seconds, planner.meanwhile(step) if step.later else ())
        arena.clock += other_seconds if other is None else other[batch][step.layer]
        steps += 1
    return SimResult(
        arena_bytes, trace.n_tokens, steps, arena.uses, arena.hits, arena.loads, arena.evictions, arena.bytes_read,
        arena.low_uses, arena.skipped_uses, arena.stall_seconds, arena.clock,
        arena.prefetched, arena.prefetch_useful, arena.prefetch_late, arena.prefetch_wasted, arena.prefetch_cancelled,
        *(arena.part_hits[mask] for mask in (BOTH, EXPONENTS, MANTISSAS)),
    )  # fmt: skip


def simulate_policy(
    trace: Trace,
    options: PolicyOptions,
    arena_bytes: int,
    costs: Costs | None = None,
    calibration: Calibration | None = None,
    resident: Iterable[int] = (),
    packed_bytes: int = 0,
    *,
    held: Iterable[tuple[int, int]] = (),
    atomic: bool = False,
) -> SimResult:
    """simulate() with the policy that make_policy makes of the options. Raises what either raises, and UsageError for a
    packed cache on a trace of a raw store, or one that does not fit."""
    split = None
    if packed_bytes:
        sizes = trace.packed_sizes()
        if sizes is None:
            raise UsageError(f"a packed cache needs packed experts, and those of {trace.model} are raw in its trace")
        split = PackedSplit(sizes, packed_bytes)

    def make(layout: Layout, arena_bytes: int) -> Planner:
        policy = make_policy(options, layout, arena_bytes, calibration, None, split)
        policy.cache.streams = not atomic
        return policy

    return simulate(trace, make, arena_bytes, costs, resident, packed_bytes, held=held, atomic=atomic)


def _lists(seconds: Array | None) -> list[list[float]] | None:
    return None if seconds is None else seconds.tolist()


def _default_use_seconds(layout: Layout) -> float:
    return layout.total_bytes / sum(layout.n_experts) / MEMORY_BYTES_PER_SECOND


class SimArena:
    """The expert arena, the disk and the clock: executes plans as native/step.cpp and model.cpp do."""

    def __init__(
        self,
        layout: Layout,
        read_bytes: list[int],
        arena_bytes: int,
        disk_bytes_per_second: float,
        resident: Iterable[int] = (),
        disk_factor: Callable[[float], float] | None = None,
    ) -> None:
        self._layout = layout
        self._disk_factor = disk_factor
        self._unit_bytes = layout.unit_bytes
        self._read_bytes = read_bytes
        self._read_seconds = [n / disk_bytes_per_second for n in read_bytes]
        self.arena_bytes = arena_bytes
        self.ready_at = dict.fromkeys(resident, 0.0)  # unit in memory -> when its bytes are all there
        self.used_bytes = sum(self._unit_bytes[u] for u in self.ready_at)
        self.clock = self.disk_free_at = self.stall_seconds = 0.0
        self.disk_busy_seconds = 0.0
        self._soon: deque[int] = deque()  # units fetched ahead that have pieces to read, in this order
        self._asked_at = 0.0  # when the last of them was asked for
        self._left: dict[int, int] = {}  # unit that is not whole -> pieces to read
        self._guesses: set[int] = set()  # fetched ahead and not used yet
        self._cancelled: set[int] = set()
        self.prefetched = self.prefetch_useful = self.prefetch_late = self.prefetch_wasted = 0
        self.prefetch_cancelled = 0
        self._packed: PackedCache | None = None
        self._whole_read = list(read_bytes)
        self._disk_rate = disk_bytes_per_second
        self._unpack_seconds_a_byte = 0.0
        self._parts: dict[int, int] = {}  # unit -> the mask of what is in the packed cache
        self._wanted: dict[int, int] = {}  # unit -> the mask that it has once its bytes have come
        self.packed_bytes = self.packed_used = 0
        self.part_hits = dict.fromkeys(range(BOTH + 1), 0)
        self.uses = self.hits = self.loads = self.evictions = self.bytes_read = self.low_uses = self.skipped_uses = 0

    def execute(
        self, step: Step, plan: StepPlan | None, use_seconds: float, prefetch: Sequence[Prefetch] = ()
    ) -> None:
        """Run one step by its plan, and fetch ahead.

        Raises EngineError, in step.cpp's words, for a plan that cannot be executed.
        """
        n = len(step.experts)
        order, levels, victims = plan or (range(n), (0,) * n, ((),) * n)
        if len(order) != n or sorted(order) != list(range(n)):
            raise EngineError("the scheduler's plan is not a permutation of the experts it was asked for")
        began = self.clock
        hits, loads = self._sort(step, order, levels, victims)
        if self._guesses or self._left:
            self._look_up(step, hits, began)
            hits.sort(key=lambda u: self.ready_at[u])
        for unit in hits:
            self._compute(self.ready_at[unit], use_seconds)
        if not loads:
            self._prefetch(prefetch, began)
            return
        if self._unpack_seconds_a_byte or self._packed is not None:
            self._prefetch(prefetch, self._compute_loads(loads, hits, began, use_seconds))
            return
        busy_until = dict.fromkeys(hits, self.clock)  # the hits share a graph
        asked_at = began
        for unit, gone in loads:
            for victim in gone:
                asked_at = max(asked_at, busy_until.get(victim, began))
                self._evict(victim)
            self._compute(self._read(unit, asked_at), use_seconds)
            busy_until[unit] = self.clock
        self._prefetch(prefetch, asked_at)

    # ---- the packed cache

    def use_packed(self, packed: PackedCache | None, nbytes: int, unpack_seconds_a_byte: float) -> None:
        """Have a packed cache of so many bytes, empty; or none. Unpacking takes its time in any case."""
        self._packed, self.packed_bytes, self._unpack_seconds_a_byte = packed, nbytes, unpack_seconds_a_byte

    def start_with(self, held: Mapping[int, int]) -> None:
        """What the packed cache has at the start: unit -> mask."""
        self.hold(held)
        for unit, mask in held.items():
            self._have(unit, mask)

    def hold(self, changes: Mapping[int, int]) -> None:
        """What the packed cache is to have from now on: what goes goes at once, what comes is there once it is read."""
        assert self._packed is not None
        for unit, mask in changes.items():
            before = self._wanted.get(unit, 0)
            self.packed_used += self._mask_bytes(unit, mask) - self._mask_bytes(unit, before)
            self._wanted[unit] = mask
            self._have(unit, self._held(unit) & mask)
        if self.packed_used > self.packed_bytes:
            raise EngineError("the scheduler's plan exceeds the memory of the packed cache")

    def _mask_bytes(self, unit: int, mask: int) -> int:
        assert self._packed is not None
        return sum(n for part, n in enumerate(self._packed.sizes.part_bytes[unit]) if mask >> part & 1)

    def _held(self, unit: int) -> int:
        return self._parts.get(unit, 0)

    def _have(self, unit: int, mask: int) -> None:
        """These parts of a unit are in memory: that much less of it is to be read."""
        assert self._packed is not None
        self._parts[unit] = mask
        self._read_bytes[unit] = max(0, self._whole_read[unit] - self._packed.sizes.saved_bytes[unit][mask])
        self._read_seconds[unit] = self._read_bytes[unit] / self._disk_rate

    def _count_parts(self, unit: int) -> None:
        if self._packed is not None and (mask := self._held(unit)):
            self.part_hits[BOTH if mask == self._packed.sizes.all_parts(unit) else mask] += 1

    def _compute_loads(
        self, loads: list[tuple[int, Sequence[int]]], hits: list[int], began: float, use: float
    ) -> float:
        """Read what is to be read in plan order; of what is there, the processor takes the first. When it was asked."""
        busy = dict.fromkeys(hits, self.clock)
        waiting: list[tuple[float, int]] = []  # when its bytes are there, unit; in plan order
        asked_at = began

        def compute_one() -> None:
            there = [entry for entry in waiting if entry[0] <= self.clock]
            entry = there[0] if there else min(waiting)
            waiting.remove(entry)
            self._compute(entry[0], use + self._layout.unit_bytes[entry[1]] * self._unpack_seconds_a_byte)
            busy[entry[1]] = self.clock

        for unit, gone in loads:
            for victim in gone:
                while any(victim == other for _, other in waiting):
                    compute_one()
                asked_at = max(asked_at, busy.get(victim, began))
                self._evict(victim)
            waiting.append((self._read(unit, asked_at), unit))
        while waiting:
            compute_one()
        return asked_at

    def measure(self) -> Measured:
        """The sums a controller decides by; planning costs nothing here."""
        return Measured(self.clock, self.stall_seconds, self.disk_busy_seconds, self.bytes_read)

    def _look_up(self, step: Step, hits: list[int], now: float) -> None:
        """What was fetched ahead for this layer: used, and completed first when it is not whole; or cancelled."""
        self._read_soon(now)
        for unit in hits:
            late = unit in self._left
            if unit in self._guesses:
                self._guesses.remove(unit)
                self.prefetch_useful += 1
                self.prefetch_late += late
            if late:
                if unit in self._soon:
                    self._soon.remove(unit)
                self._finish(unit, now)
        of_layer = self._layout.layer_units(step.layer)
        for unit in [u for u in self._soon if u in of_layer]:
            self._soon.remove(unit)
            self._cancelled.add(unit)

    def _finish(self, unit: int, now: float) -> None:
        while unit in self._left:
            self._read_piece(unit, now)

    def _disk(self, asked_at: float, unit: int, share: float) -> None:
        start = max(self.disk_free_at, asked_at)
        seconds = self._read_seconds[unit] * share
        if self._disk_factor:
            seconds /= self._disk_factor(start)
        self.disk_free_at = start + seconds
        self.disk_busy_seconds += seconds

    def _read_soon(self, until: float) -> None:
        """Serve the second queue as far as the disk gets before `until`."""
        while self._soon and max(self.disk_free_at, self._asked_at) < until:
            unit = self._soon[0]
            self._read_piece(unit, self._asked_at)
            if unit not in self._left:
                self._soon.popleft()

    def _read_piece(self, unit: int, asked_at: float) -> None:
        """The next piece of a unit that is not whole."""
        self._disk(asked_at, unit, 1 / PIECES)
        left, n = self._left[unit], self._read_bytes[unit]
        self.bytes_read += n * left // PIECES - n * (left - 1) // PIECES
        if left > 1:
            self._left[unit] = left - 1
        else:
            del self._left[unit]
            self.ready_at[unit] = self.disk_free_at
            self._came(unit)

    def _prefetch(self, prefetch: Sequence[Prefetch], now: float) -> None:
        if not prefetch:
            return
        self._read_soon(now)
        for unit, gone in prefetch:
            for victim in gone:
                self._evict(victim)
            if unit in self.ready_at:
                raise EngineError("the scheduler's plan prefetches an expert that is already in memory")
            self._take(unit)
            self.prefetched += 1
            self.ready_at[unit] = inf
            self._left[unit] = PIECES
            self._guesses.add(unit)
            self._soon.append(unit)
        self._asked_at = now

    def _sort(
        self, step: Step, order: Sequence[int], levels: Sequence[int], victims: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[tuple[int, Sequence[int]]]]:
        """(units in memory, units to read with their victims), both in plan order; counts the uses."""
        n_levels = self._layout.n_levels
        first, experts, ready_at = self._layout.first_unit[step.layer], step.experts, self.ready_at
        hits: list[int] = []
        loads: list[tuple[int, Sequence[int]]] = []
        for at, level, gone in zip(order, levels, victims, strict=True):
            unit = first + experts[at] * n_levels + level
            if level == SKIP:
                if gone:
                    raise EngineError("the scheduler's plan evicts experts for one that it skips")
                self.skipped_uses += 1
                continue
            if not 0 <= level < n_levels:
                raise EngineError(f"the scheduler's plan asks for level {level} of {n_levels}")
            self.low_uses += level > 0
            if unit not in ready_at:
                loads.append((unit, gone))
            elif gone:
                raise EngineError("the scheduler's plan evicts experts for one that is already in memory")
            else:
                hits.append(unit)
        self.uses += len(hits) + len(loads)
        self.hits += len(hits)
        return hits, loads

    def _compute(self, ready_at: float, seconds: float) -> None:
        if ready_at > self.clock:
            self.stall_seconds += ready_at - self.clock
            self.clock = ready_at
        self.clock += seconds

    def _read(self, unit: int, asked_at: float) -> float:
        """Queue a read at the disk; when it will be done."""
        self._take(unit)
        self.bytes_read += self._read_bytes[unit]
        self.loads += 1
        self._count_parts(unit)
        if self._soon:
            self._read_soon(asked_at)
        if self._read_bytes[unit] == 0:
            self.ready_at[unit] = asked_at
            return asked_at
        self._disk(asked_at, unit, 1)
        self._came(unit)
        self.ready_at[unit] = self.disk_free_at
        return self.disk_free_at

    def _came(self, unit: int) -> None:
        """All of a unit was read: what the packed cache wants of it is there from now on."""
        if self._packed is not None and unit in self._wanted:
            self._have(unit, self._wanted[unit])

    def _take(self, unit: int) -> None:
        self.used_bytes += self._unit_bytes[unit]
        if self.used_bytes > self.arena_bytes:
            raise EngineError("the scheduler's plan exceeds the memory of the expert arena")

    def _evict(self, unit: int) -> None:
        if unit not in self.ready_at:
            raise EngineError("the scheduler's plan evicts an expert that is not in memory")
        del self.ready_at[unit]
        if unit in self._left:
            del self._left[unit]
            if unit in self._soon:
                self._soon.remove(unit)
                self._cancelled.add(unit)
        if unit in self._guesses:
            self._guesses.remove(unit)
            if unit in self._cancelled:
                self.prefetch_cancelled += 1
            else:
                self.prefetch_wasted += 1
        self._cancelled.discard(unit)
        self.used_bytes -= self._unit_bytes[unit]
        self.evictions += 1
