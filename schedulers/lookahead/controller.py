"""How much to fetch ahead, decided from measurements: nothing where it does not pay, and from time to time another try.

Pure: counts and seconds in, (depth, width) of a layer and a byte allowance out. Fed once a token.

On or off: short windows of tokens with and without look-ahead alternate, and the tokens' times are compared at equal
numbers of bytes that a token needed and that were not in memory, or were only because they had been fetched ahead. The
whole time, since reading meanwhile slows computing down. On only when that is clearly lower; tried again after a pause
that doubles each time it is not. Not even tried when there is no stall worth saving, or when the disk has no time to
spare: then fetching ahead moves reads about and saves none.

How much: what the disk could read in the time it is idle. How far and how wide: hill-climbing of (width, depth), one
coordinate of one group of layers at a time, on miss bytes + a * wasted bytes, a being how busy the disk is.
Source: FIRM-MoE's resource-adaptive preloading (PAPERS.md, section 3), whose objective has two coefficients that were
not available; the windows are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GROUPS = 3  # shallow, middle, deep
WINDOW_TOKENS = 8
SETTLE_TOKENS = 2  # at the start of a window, not counted: reads asked for before
TRIAL_PAIRS, MOST_TRIAL_PAIRS = 2, 6
HOLD_TOKENS, LONGEST_HOLD_TOKENS = 64, 1024
CLIMB_TOKENS = 16
MARGIN = 0.01  # of a token's time without look-ahead, besides the error of what was measured
GIVE_UP = 0.03  # a trial ends with its first pair of windows when look-ahead costs so much more in it
CLIMB_MARGIN = 0.05  # of a group's cost: two windows of the same text differ
LEAST_STALL = 0.02  # share of a token's time
LEAST_SPARE = 0.12  # share of a token's time in which the disk is idle


@dataclass(frozen=True)
class Measured:
    """Sums since some start. seconds: of the clock. wanted_bytes: of the experts used that were read when needed or had
    been fetched ahead; 0 throughout: not known.
    """

    seconds: float
    stall_seconds: float
    disk_busy_seconds: float
    bytes_read: int
    wanted_bytes: int = 0


@dataclass
class Ledger:
    """Of one group of layers, in bytes: units read when needed, and fetched ahead and not used."""

    missed: float = 0.0
    wasted: float = 0.0

    def cost(self, price_of_waste: float) -> float:
        return self.missed + price_of_waste * self.wasted


@dataclass
class Reach:
    """How far a group of layers looks ahead: so many layers, and so many experts of each."""

    depth: int
    width: int


class Cost(NamedTuple):
    """Of one token: what it took, and the bytes it wanted, see Measured."""

    seconds: float
    wanted: float


class Controller:
    """n_used: experts of a token and layer. unit_bytes: of one expert, about. most_depth: layers that may be asked."""

    def __init__(self, n_layers: int, n_used: int, unit_bytes: float, *, most_depth: int = 3) -> None:
        self._n_layers, self._n_used, self._unit_bytes = n_layers, n_used, unit_bytes
        self._most_depth = most_depth
        # simulated and measured: three quarters of the experts gain nearly what all of them do, with half of the waste,
        # and a second layer mostly moves reads about (docs/LOG.md); the rest is for climbing
        self.settings = [Reach(1, max(1, n_used * 3 // 4)) for _ in range(GROUPS)]
        self.ledgers = [Ledger() for _ in range(GROUPS)]
        self.on = False
        self.allowance_bytes = 0.0  # for each step
        self.trials = self.tokens = 0
        self._last: Measured | None = None
        self._hold = HOLD_TOKENS  # tokens until the next trial when off
        self._token_seconds = self._busy_share = self._bytes_per_second = self._stall_share = 0.0
        self._plan: list[bool] = []  # windows of the present trial still to come
        self._window: list[Cost] = []
        self._costs: dict[bool, list[Cost]] = {True: [], False: []}
        self._left = 2 * WINDOW_TOKENS  # tokens until the next decision; the first ones warm the cache
        self._decided = False
        self._climb_left = CLIMB_TOKENS
        self._climb_at = 0
        self._climb_before: float | None = None
        self._steps = [1] * (2 * GROUPS)  # the direction each coordinate is tried in
        self._old: Reach | None = None

    @property
    def pays(self) -> bool:
        """What the last trial found; during a trial `on` alternates."""
        return self._decided

    @property
    def comparing(self) -> bool:
        """Whether a trial is under way, with look-ahead or without it."""
        return bool(self._plan or self._costs[True] or self._costs[False])

    def group(self, layer: int) -> int:
        return layer * GROUPS // self._n_layers

    def setting(self, layer: int) -> Reach:
        return self.settings[self.group(layer)]

    def token(self, now: Measured) -> None:
        """A token is done: `now` are the sums after it."""
        last, self._last = self._last, now
        if last is None:
            return
        self.tokens += 1
        self._observe(last, now)
        cost = Cost(now.seconds - last.seconds, now.wanted_bytes - last.wanted_bytes)
        self._left -= 1
        if self.comparing:
            self._in_trial(cost)
        elif self._left <= 0:
            self._start_trial()
        elif self._decided:
            self._climb()

    def _observe(self, last: Measured, now: Measured) -> None:
        seconds = max(now.seconds - last.seconds, 1e-9)
        busy = min(now.disk_busy_seconds - last.disk_busy_seconds, seconds)
        read = now.bytes_read - last.bytes_read
        first = self._token_seconds == 0.0
        if not first:
            seconds = min(seconds, 4 * self._token_seconds)  # somebody thought about what to ask next
        self._token_seconds = self._mix(self._token_seconds, seconds, first)
        self._busy_share = self._mix(self._busy_share, min(1.0, busy / seconds), first)
        self._stall_share = self._mix(self._stall_share, (now.stall_seconds - last.stall_seconds) / seconds, first)
        if busy > 0 and read > 0:
            self._bytes_per_second = self._mix(self._bytes_per_second, read / busy, self._bytes_per_second == 0.0)
        spare = (1 - self._busy_share) * self._token_seconds / self._n_layers
        # Twice the mean, as layers differ; and not too little: what the disk does not get to is cancelled and costs
        # little, and a busy disk still gains from knowing what to read in the short times it is idle.
        self.allowance_bytes = max(2 * spare * self._bytes_per_second, self._unit_bytes * max(1, self._n_used // 2))

    @staticmethod
    def _mix(old: float, new: float, first: bool) -> float:
        return new if first else old + (new - old) / WINDOW_TOKENS

    # ---- on or off

    @property
    def _worth_trying(self) -> bool:
        return self._stall_share >= LEAST_STALL and self._busy_share <= 1 - LEAST_SPARE

    def _start_trial(self) -> None:
        if not self._decided and not self._worth_trying:  # when it is on, these shares are its own doing
            self._left = WINDOW_TOKENS
            return
        self.trials += 1
        self._plan = [False, True] * TRIAL_PAIRS
        self._costs = {True: [], False: []}
        self._window = []
        self._old, self._climb_before = None, None
        self.on = self._plan[0]

    def _in_trial(self, cost: Cost) -> None:
        self._window.append(cost)
        if len(self._window) < WINDOW_TOKENS:
            return
        self._costs[self._plan.pop(0)] += self._window[SETTLE_TOKENS:]
        self._window = []
        costs = self._costs
        if not costs[True]:
            self.on = self._plan[0]
            return
        if self._plan and len(costs[True]) < len(costs[False]):
            self.on = self._plan[0]
            return
        without, saved, error = _compare(costs[False], costs[True])
        n_pairs = len(costs[True]) // (WINDOW_TOKENS - SETTLE_TOKENS)
        hopeless = saved < (-GIVE_UP * without if n_pairs < TRIAL_PAIRS else 0)
        clear = n_pairs >= TRIAL_PAIRS and abs(saved) > 2 * error
        if not hopeless and not clear and n_pairs < MOST_TRIAL_PAIRS:
            self._plan = self._plan or [False, True]
            self.on = self._plan[0]
            return
        self._plan = []
        pays = saved > MARGIN * without + error
        self._hold = HOLD_TOKENS if pays and not self._decided else min(2 * self._hold, LONGEST_HOLD_TOKENS)
        self._set(pays)
        self._left = self._hold
        self._costs = {True: [], False: []}

    def _set(self, on: bool) -> None:
        self.on = self._decided = on
        self._climb_left, self._old, self._climb_before = CLIMB_TOKENS, None, None
        self._clear()

    def _clear(self) -> None:
        for ledger in self.ledgers:
            ledger.missed = ledger.wasted = 0.0

    # ---- how far and how wide

    def _climb(self) -> None:
        """After each window: keep the last change when its group costs less than before it, else take it back."""
        self._climb_left -= 1
        if self._climb_left > 0:
            return
        self._climb_left = CLIMB_TOKENS
        group, by_depth = divmod(self._climb_at, 2)
        cost = self.ledgers[group].cost(self._busy_share)
        self._clear()
        if self._old is None or self._climb_before is None:
            self._climb_before = cost
            self._old = self._change(group, bool(by_depth))
            return
        if cost > self._climb_before * (1 - CLIMB_MARGIN):
            self.settings[group] = self._old
            self._steps[self._climb_at] *= -1
        self._old = self._climb_before = None
        self._climb_at = (self._climb_at + 1) % (2 * GROUPS)

    def _change(self, group: int, depth: bool) -> Reach:
        """Move one coordinate of one group, away from a limit it is at; returns the setting before."""
        old = self.settings[group]
        value, least, most = (old.depth, 1, self._most_depth) if depth else (old.width, 1, 2 * self._n_used)
        step = self._steps[self._climb_at] * (1 if depth else max(1, self._n_used // 4))
        moved = min(max(value + step, least), most)
        if moved == value:
            moved = min(max(value - step, least), most)
        self.settings[group] = Reach(moved, old.width) if depth else Reach(old.depth, moved)
        return old


def _compare(without: list[Cost], with_it: list[Cost]) -> tuple[float, float, float]:
    """(seconds of a token without look-ahead, what look-ahead saves of them, standard error of that).

    An analysis of covariance: tokens miss more or less, so both sides are compared at the same wanted bytes, by the
    slope that they have in common.
    """
    sides = [_trimmed(without), _trimmed(with_it)]
    means = [Cost(sum(c.seconds for c in side) / len(side), sum(c.wanted for c in side) / len(side)) for side in sides]
    spread = sum((c.wanted - m.wanted) ** 2 for side, m in zip(sides, means, strict=True) for c in side)
    common = sum(
        (c.wanted - m.wanted) * (c.seconds - m.seconds) for side, m in zip(sides, means, strict=True) for c in side
    )
    slope = common / spread if spread else 0.0
    apart = means[1].wanted - means[0].wanted
    rest = sum(
        (c.seconds - m.seconds - slope * (c.wanted - m.wanted)) ** 2
        for side, m in zip(sides, means, strict=True)
        for c in side
    )
    n = [len(side) for side in sides]
    error2 = rest / max(1, sum(n) - 3) * (1 / n[0] + 1 / n[1] + (apart**2 / spread if spread else 0.0))
    return means[0].seconds, means[0].seconds - means[1].seconds + slope * apart, error2**0.5


def _trimmed(costs: list[Cost]) -> list[Cost]:
    """Without the slowest eighth and the fastest: one page fault, background write or pause must not decide."""
    ordered = sorted(costs)
    cut = len(ordered) // 8
    return ordered[cut : len(ordered) - cut]
