"""Which run of layers makes a token fastest on several boards. Pure: figures in, ranges of layers out.

A token passes through the boards one after the other, so what counts is the sum of their seconds, by the cost model of
boards_forecast.py: a board with a fast disk or processor takes more layers, up to what its memory keeps at that speed.
The network takes each board the same time however many layers it has, so it has no say here.

The best split is found by dynamic programming over (boards, layers). Every board gets a layer with experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_edge.schedulers.boards_forecast import BlockWork, BoardSpeeds, runs_by_memory
from moe_edge.schedulers.budget import MIB
from moe_edge.schedulers.estimate import (
    DECODE_OVERLAP,
    busy_seconds,
    expert_hit_rate,
    interpolate,
    typical_hit_rate,
)
from moe_edge.schedulers.workers import check_enough_layers

# A worker counts a little more than a plan foresees: graphs in ggml's server, pages of its own program.
SPARE_BYTES = 8 * MIB
# A forecast is not known to a few per cent. A split that is slower by less may be taken where memory is filled more
# evenly by it: speeds of like boards differ from one measurement to the next, and the layers should not.
EVEN_SHARE = 0.05
# How much evenness weighs, in tokens of the fastest split: tried from the first on, each a part of the one before,
# until the split is fast enough.
EVEN_FIRST, EVEN_FACTOR, EVEN_STEPS = 1000.0, 2.0, 24
CURVE_POINTS = 32

Run = tuple[int, int]


@dataclass(frozen=True)
class FastestSplit:
    """seconds: of a token in all boards, without the network."""

    layers: tuple[range, ...]
    seconds: float


def fastest_split(model: BlockWork, boards: Sequence[BoardSpeeds]) -> FastestSplit | None:
    """The split with the fewest forecast seconds a token; of those within 5 %, one that fills memory evenly.

    None when no split fits the boards' memory. Raises UsageError when there are more boards than layers with experts.
    """
    costs = _Costs(model)
    with_experts = [i for i, n in enumerate(model.expert_bytes) if n > 0]
    check_enough_layers(len(boards), len(with_experts))
    fastest = _best(costs, boards, 0.0)
    if fastest is None:
        return None
    limit = (1 + EVEN_SHARE) * costs.total(boards, fastest)
    for step in range(EVEN_STEPS):
        runs = _best(costs, boards, EVEN_FIRST * limit / EVEN_FACTOR**step)
        assert runs is not None  # as feasible as the fastest
        if costs.total(boards, runs) <= limit:
            break
    else:
        runs = fastest
    return FastestSplit(tuple(range(a, b) for a, b in runs), costs.total(boards, runs))


def split_by_speed(model: BlockWork, boards: Sequence[BoardSpeeds]) -> list[range]:
    """As fastest_split(); by memory where no split fits, so that whoever is asked can say what is missing."""
    found = fastest_split(model, boards)
    return runs_by_memory(model, [board.ram_bytes for board in boards]) if found is None else list(found.layers)


def _best(costs: _Costs, boards: Sequence[BoardSpeeds], weight: float) -> tuple[Run, ...] | None:
    """The runs with the least sum of seconds and of weight times how full a board is, squared; None when all are
    infinite. Ties go to the earlier end."""
    n, inf = costs.n_blocks, float("inf")
    least = [0.0] + [inf] * n  # of the boards so far, for each end of their layers
    begins: list[list[int]] = []
    for number, board in enumerate(boards):
        ends = [n] if number == len(boards) - 1 else range(1, n)
        now, chosen = [inf] * (n + 1), [0] * (n + 1)
        for end, begin in ((e, b) for e in ends for b in range(e)):
            if least[begin] == inf or not costs.has_experts((begin, end)):
                continue
            seconds, squared = costs.of(board, (begin, end))
            if (total := least[begin] + seconds + weight * squared) < now[end]:
                now[end], chosen[end] = total, begin
        least = now
        begins.append(chosen)
    if least[n] == inf:
        return None
    runs: list[Run] = []
    end = n
    for chosen in reversed(begins):
        runs.append((chosen[end], end))
        end = chosen[end]
    return tuple(reversed(runs))


class _Costs:
    """What a run of layers takes, from sums over the layers before each: the cost model without walking experts."""

    def __init__(self, model: BlockWork) -> None:
        work, layout = model.work, model.work.layout
        self._work, self.n_blocks = work, len(model.dense_bytes)
        probable = work.probabilities() * work.expert_bytes()
        starts = [0, *itertools.accumulate(layout.n_experts)]
        used, held, moe, self._largest = ([0.0] * self.n_blocks for _ in range(4))
        for layer, block in enumerate(model.moe_blocks):
            used[block] = float(probable[starts[layer] : starts[layer + 1]].sum())
            units = layout.layer_units(layer)
            held[block] = float(sum(layout.unit_bytes[units.start : units.stop : layout.n_levels]))
            self._largest[block], moe[block] = float(layout.largest_bytes(layer)), 1
        self._used, self._experts, self._moe = _sums(used), _sums(held), _sums(moe)
        self._largest_sum = _sums(self._largest)
        kv = model.kv_bytes
        self._dense, self._kv = _sums(model.dense_bytes), _sums(kv)
        self._used_share = model.used_share
        self._hit_rate = _hit_curve(model)
        self._known: dict[tuple[BoardSpeeds, Run], tuple[float, float]] = {}

    def has_experts(self, run: Run) -> bool:
        return _of(self._moe, run) > 0

    def held_bytes(self, board: BoardSpeeds, run: Run) -> float:
        """Everything but experts."""
        return board.fixed_bytes + SPARE_BYTES + _of(self._dense, run) + _of(self._kv, run)

    def of(self, board: BoardSpeeds, run: Run) -> tuple[float, float]:
        """(seconds, the share of the board's memory that all of this would take, squared)."""
        known = self._known.get((board, run))
        if known is None:
            share = (self.held_bytes(board, run) + _of(self._experts, run)) / board.ram_bytes
            known = self._known[board, run] = (self.seconds(board, run), share**2)
        return known

    def seconds(self, board: BoardSpeeds, run: Run) -> float:
        """Of a token; infinite when the memory does not hold the experts in flight. See estimate.py."""
        arena = board.ram_bytes - self.held_bytes(board, run)
        if arena < max(_of(self._largest_sum, run), 2 * max(self._largest[run[0] : run[1]])):
            return float("inf")
        experts, routed = _of(self._experts, run), _of(self._used, run)
        hits = 1.0 if arena >= experts else self._hit_rate(arena / experts)
        used = routed + _of(self._dense, run) + self._used_share * _of(self._kv, run)
        speeds = board.speeds
        compute = used / min(speeds.compute, speeds.memory) + _of(self._moe, run) * speeds.layer_seconds
        return busy_seconds(routed * (1 - hits) / self._work.delivery(speeds), compute, DECODE_OVERLAP[1])

    def total(self, boards: Sequence[BoardSpeeds], runs: Sequence[Run]) -> float:
        return sum(self.seconds(board, run) for board, run in zip(boards, runs, strict=True))


def _hit_curve(model: BlockWork) -> Callable[[float], float]:
    """Hits by the share of the experts in memory. A calibrated model's curve is taken once, of all its layers."""
    work = model.work
    if work.counts is None:
        used_share = work.top_k / max(work.layout.n_experts)
        return lambda share: typical_hit_rate(share, used_share).expected
    total = work.layout.total_bytes
    shares = [i / CURVE_POINTS for i in range(CURVE_POINTS + 1)]
    points = [(x, expert_hit_rate(work, int(x * total))[0].expected) for x in shares]
    return lambda share: interpolate(points, share)


def _sums(values: Sequence[float]) -> list[float]:
    return [0.0, *itertools.accumulate(float(v) for v in values)]


def _of(sums: Sequence[float], run: Run) -> float:
    return sums[run[1]] - sums[run[0]]
