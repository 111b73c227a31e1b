"""The look-ahead controller on simulated disks: it earns what there is to earn, and gives up where there is nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.lookahead.around import LookAheadPolicy, with_lookahead
from moe_edge.schedulers.lookahead.controller import (
    HOLD_TOKENS,
    LONGEST_HOLD_TOKENS,
    TRIAL_PAIRS,
    WINDOW_TOKENS,
    Controller,
    Cost,
    Measured,
    _compare,
)
from moe_edge.schedulers.policies.exact import ExactLru
from moe_edge.schedulers.replay.simulate import Costs, SimResult, simulate
from moe_edge.schedulers.replay.trace import Trace

N_LAYERS, N_EXPERTS, N_USED, UNIT = 8, 16, 2, 1000


@lru_cache(maxsize=8)
def routed(n_tokens: int, recall: float, seed: int = 0) -> Trace:
    """A trace whose experts drift from token to token, with look-ahead that is right for a share of the experts."""
    rng = np.random.default_rng(seed)
    shape = (n_tokens, N_LAYERS, N_USED)
    experts = np.zeros(shape, np.int16)
    ahead = np.full((n_tokens, N_LAYERS, 3, 2 * N_USED), -1, np.int16)
    popularity = 1 / np.arange(1, N_EXPERTS + 1) ** 0.7
    popularity /= popularity.sum()
    for t in range(n_tokens):
        for layer in range(N_LAYERS):
            experts[t, layer] = rng.choice(N_EXPERTS, N_USED, replace=False, p=popularity)
    for t in range(n_tokens):
        for layer in range(N_LAYERS):
            for d in range(min(3, N_LAYERS - 1 - layer)):
                order = list(rng.permutation(N_EXPERTS))
                right = [e for e in experts[t, layer + 1 + d] if rng.random() < recall ** (d + 1)]
                wrong = [e for e in order if e not in experts[t, layer + 1 + d]]
                ahead[t, layer, d] = (right + wrong)[: 2 * N_USED]
    scores = np.zeros(ahead.shape, np.float16)
    scores[:] = np.array([0.4, 0.3, 0.2, 0.1], np.float16)
    n_units = N_LAYERS * N_EXPERTS
    return Trace(
        "drift", "0", (N_EXPERTS,) * N_LAYERS, 1, np.full(n_units, UNIT, np.int64), np.full(n_units, UNIT, np.int64),
        np.ones(n_tokens, np.int32), np.zeros(1, np.int32), np.ones((n_tokens, N_LAYERS), np.int32),
        experts, np.full(shape, 0.5, np.float32), ahead_experts=ahead, ahead_scores=scores,
    )  # fmt: skip


@dataclass
class Run:
    off: SimResult
    auto: SimResult
    controller: Controller

    @property
    def speedup(self) -> float:
        return self.off.seconds / self.auto.seconds


def run(trace: Trace, read_seconds: float, factor: Callable[[float], float] | None = None, share: float = 0.4) -> Run:
    """Layers take 1 second of computing; an expert read_seconds of reading."""
    arena_bytes = int(share * UNIT * N_LAYERS * N_EXPERTS)
    costs = Costs(UNIT / read_seconds, use_seconds=0.25, other_seconds=0.5, disk_factor=factor)
    made: list[LookAheadPolicy] = []

    def make(layout: Layout, arena_bytes: int) -> LookAheadPolicy:
        policy = with_lookahead(ExactLru(layout, arena_bytes), layout, "auto")
        assert isinstance(policy, LookAheadPolicy)
        made.append(policy)
        return policy

    auto = simulate(trace, make, arena_bytes, costs)
    controller = made[0].controller
    assert controller is not None
    return Run(simulate(trace, ExactLru, arena_bytes, costs), auto, controller)


def test_good_predictions_on_a_disk_with_time_to_spare_pay() -> None:
    r = run(routed(600, 0.9), 0.7)
    assert r.off.stall_seconds / r.off.seconds > 0.2
    assert r.speedup > 1.1 and r.controller.pays
    assert r.auto.prefetch_useful > r.auto.prefetch_wasted


def test_wrong_predictions_are_found_out_and_cost_less_than_a_hundredth() -> None:
    r = run(routed(600, 0.0), 0.7)
    assert not r.controller.pays and 1 <= r.controller.trials <= 6
    assert r.speedup > 0.99


def test_a_disk_that_keeps_up_is_left_alone() -> None:
    r = run(routed(300, 0.9), 0.005)
    assert r.controller.trials == 0 and r.auto.prefetched == 0
    assert r.auto.seconds == r.off.seconds and r.auto.bytes_read == r.off.bytes_read


@pytest.mark.parametrize("recall", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("read_seconds", [0.1, 0.5, 2.0, 8.0])
def test_it_never_loses_more_than_a_hundredth(recall: float, read_seconds: float) -> None:
    assert run(routed(600, recall), read_seconds).speedup > 0.99


def test_a_disk_that_slows_down_switches_it_on() -> None:
    r = run(routed(1000, 0.9), 0.6, lambda t: 60.0 if t < 1500 else 1.0)
    assert r.controller.pays and r.controller.trials >= 1
    assert r.speedup > 1.05


def test_a_disk_that_speeds_up_leaves_nothing_to_gain_and_nothing_lost() -> None:
    r = run(routed(1000, 0.9), 0.6, lambda t: 1.0 if t < 5000 else 200.0)
    assert r.speedup > 1.0


def test_a_disk_that_stalls_now_and_then_does_not_mislead_it() -> None:
    """Every 300 seconds a second in which the disk is a hundred times slower."""

    def stalls(t: float) -> float:
        return 0.01 if t % 300 < 1 else 1.0

    assert run(routed(600, 0.9), 0.6, stalls).speedup > 1.05
    assert run(routed(600, 0.0), 0.6, stalls).speedup > 0.985


# ---- the windows, by hand


class Clock:
    """Feeds a controller with tokens of fixed costs: 0.6 seconds, and `off` or `on` of stall."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.now = Measured(0.0, 0.0, 0.0, 0)

    def tokens(self, n: int, off: float, on: float, busy: float = 0.5) -> list[bool]:
        states = []
        for _ in range(n):
            n_ = self.now
            stall = on if self.controller.on else off
            busy_seconds = n_.disk_busy_seconds + busy
            self.now = Measured(n_.seconds + 0.6 + stall, n_.stall_seconds + stall, busy_seconds, n_.bytes_read + 800)
            self.controller.token(self.now)
            states.append(self.controller.on)
        return states


def controller() -> Controller:
    return Controller(8, 4, 100.0)


TRIAL = 2 * TRIAL_PAIRS * WINDOW_TOKENS


def test_it_is_off_until_a_trial_with_alternating_windows() -> None:
    c = controller()
    states = Clock(c).tokens(2 * WINDOW_TOKENS + 1 + TRIAL, off=0.4, on=0.2)
    assert not any(states[: 2 * WINDOW_TOKENS + WINDOW_TOKENS])
    assert sum(states[:-1]) == TRIAL_PAIRS * WINDOW_TOKENS
    assert c.on and c.trials == 1


def test_after_a_failed_trial_the_pause_doubles_up_to_a_limit() -> None:
    c = controller()
    clock = Clock(c)
    states = clock.tokens(9000, off=0.3, on=0.4)
    starts = [i for i in range(1, len(states)) if states[i] and not states[i - 1]]
    gaps = np.diff(starts) - 2 * WINDOW_TOKENS  # a hopeless trial ends after its first pair of windows
    assert gaps[0] == pytest.approx(2 * HOLD_TOKENS, abs=3)
    assert gaps[1] == pytest.approx(4 * HOLD_TOKENS, abs=3)
    assert gaps.max() == pytest.approx(LONGEST_HOLD_TOKENS, abs=3)
    assert sum(states) / len(states) < 0.01


def test_no_trial_without_stall_or_without_idle_disk() -> None:
    for stall, busy in ((0.001, 0.5), (0.5, 0.999)):
        c = controller()
        assert not any(Clock(c).tokens(500, off=stall, on=0.0, busy=busy))
        assert c.trials == 0


def test_it_gives_up_when_it_stops_paying() -> None:
    c = controller()
    clock = Clock(c)
    clock.tokens(2 * WINDOW_TOKENS + 1 + TRIAL, off=0.4, on=0.2)
    assert c.on
    clock.tokens(HOLD_TOKENS + TRIAL + 2, off=0.2, on=0.25)
    assert not c.on


def test_a_long_pause_between_two_tokens_is_not_spare_disk_time() -> None:
    c = controller()
    clock = Clock(c)
    clock.tokens(30, off=0.4, on=0.4)
    before = c.allowance_bytes
    clock.now = Measured(clock.now.seconds + 3600, *[getattr(clock.now, f) for f in list(vars(clock.now))[1:]])
    clock.tokens(1, off=0.4, on=0.4)
    assert c.allowance_bytes < 2.5 * before


def test_it_climbs_towards_the_width_that_costs_least() -> None:
    """Misses fall with the width up to 7 and waste rises behind it; depth does not matter."""
    c = controller()
    clock = Clock(c)
    clock.tokens(2 * WINDOW_TOKENS + 1 + TRIAL, off=0.4, on=0.2)
    for _ in range(3000):
        for group in range(3):
            width = c.settings[group].width
            c.ledgers[group].missed += 100.0 * max(0, 7 - width)
            c.ledgers[group].wasted += 400.0 * max(0, width - 7)
        clock.tokens(1, off=0.4, on=0.2)
    assert [s.width for s in c.settings] == pytest.approx([7, 7, 7], abs=1)
    assert all(1 <= s.depth <= 3 for s in c.settings)


# ---- the comparison


def test_tokens_are_compared_at_equal_wanted_bytes() -> None:
    """10 ms and 2 ms for each byte wanted; with look-ahead 1 ms less, on tokens that happened to want more."""
    without = [Cost(10.0 + 2 * w, w) for w in range(10)]
    with_it = [Cost(9.0 + 2 * w, w) for w in range(4, 14)]
    mean, saved, error = _compare(without, with_it)
    assert mean == pytest.approx(19.0) and saved == pytest.approx(1.0) and error == pytest.approx(0.0, abs=1e-9)


def test_unknown_wanted_bytes_leave_the_plain_difference_and_its_error() -> None:
    mean, saved, error = _compare([Cost(s, 0) for s in (3.0, 5.0, 4.0)], [Cost(s, 0) for s in (2.0, 3.0, 4.0)])
    assert (mean, saved) == (4.0, 1.0)
    assert error == pytest.approx((4 / 3 * (1 / 3 + 1 / 3)) ** 0.5)


def test_one_token_that_waited_for_something_else_does_not_decide() -> None:
    costs = [Cost(1.0, 1), Cost(1.1, 2), Cost(1.2, 3)] * 4
    assert abs(_compare(costs, [*costs[:-1], Cost(500.0, 3)])[1]) < 0.05
