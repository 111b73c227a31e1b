"""How long a calibrated conversion will take: what its stages have to do, and how long one unit of each takes.

The times of units are measured on the model itself before most of the work is done (rehearse.py), and replaced by what
a stage really takes as it goes on. The stages that are still to come are taken to be as much faster or slower than the
rehearsal as those before them were: the rehearsal lasts seconds, in which a machine may be busy otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
STAGES = ("watching", "sensitivity", "experts", "levels", "substitution", "writing", "settings")
WORDS = {
    "watching": "running the text", "sensitivity": "weighing layers", "experts": "trying types", "levels": "levels",
    "substitution": "substitution", "writing": "quantizing and writing", "settings": "proof and settings",
}  # fmt: skip
SAY_SECONDS = 20.0  # between lines of progress that say how long is left
PACE_SECONDS = 5.0  # of work done, by the rehearsal, before it is compared with what it took
MOST_PACE = 3.0  # times as fast or as slow as the rehearsal


@dataclass
class Stage:
    """units: to be done in all, in the stage's own unit. each: forecast seconds of one; None: not known yet.

    done: of the units; before: done by an earlier run or before the forecast was known; spent: seconds of the others.
    """

    units: float = 0.0
    each: float | None = None
    done: float = 0.0
    before: float = 0.0
    spent: float = 0.0

    @property
    def rehearsed(self) -> float:
        """Seconds that what this run has done would have taken, by the forecast."""
        return (self.done - self.before) * (self.each or 0.0)

    def left(self, pace: float) -> float:
        """Seconds: by what was measured here once a tenth is done, before by the forecast times the pace."""
        mine = self.done - self.before
        each = (self.each or 0.0) * pace
        if mine > 0 and mine >= 0.1 * (self.units - self.before):
            each = self.spent / mine
        return max(0.0, self.units - self.done) * each


class Forecast:
    """The stages of one conversion. now: a clock, seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.stages = {name: Stage() for name in STAGES}
        self.is_known = False
        self._now, self._started, self._at = now, now(), now()
        self._said = float("-inf")

    def plan(self, stage: str, units: float, done: float = 0.0) -> None:
        """So many units, of which some were done before."""
        found = self.stages[stage]
        found.units, found.done, found.before = units, done, done

    def know(self, seconds: Mapping[str, float]) -> None:
        """Seconds of one unit of each stage. What was done before, loading and the first reads, sets no pace."""
        for name, each in seconds.items():
            self.stages[name].each = each
        for stage in self.stages.values():
            stage.before, stage.spent = stage.done, 0.0
        self.is_known = True

    def begin(self) -> None:
        """What takes time from here on belongs to the next step."""
        self._at = self._now()

    def step(self, stage: str, units: float = 1.0) -> None:
        """So many units are done, since the last step or begin()."""
        now = self._now()
        found = self.stages[stage]
        found.done += units
        found.spent += now - self._at
        self._at = now

    @property
    def passed(self) -> float:
        """Seconds since it began."""
        return self._now() - self._started

    def pace(self) -> float:
        """Seconds that work took over the seconds that the rehearsal gave it; 1 while little is done."""
        known = [stage for stage in self.stages.values() if stage.each and stage.spent]
        rehearsed = sum(stage.rehearsed for stage in known)
        if rehearsed < PACE_SECONDS:
            return 1.0
        return min(MOST_PACE, max(1 / MOST_PACE, sum(stage.spent for stage in known) / rehearsed))

    def left(self) -> float:
        pace = self.pace()
        return sum(stage.left(pace) for stage in self.stages.values())

    def text(self) -> str:
        """The whole forecast, stage by stage, of what is left and what has passed."""
        pace = self.pace()
        left = {name: stage.left(pace) for name, stage in self.stages.items()}
        parts = [f"{WORDS[name]} {clock(seconds)}" for name, seconds in left.items() if seconds >= 0.5]
        return f"forecast: {clock(self.passed + self.left())} in all, {clock(self.left())} left: " + ", ".join(parts)

    def suffix(self) -> str:
        """What to add to a line of progress, now and then."""
        now = self._now()
        if not self.is_known or now - self._said < SAY_SECONDS:
            return ""
        self._said = now
        return f"; about {clock(self.left())} left"

    def to_json(self) -> str:
        return json.dumps({name: stage.each for name, stage in self.stages.items()})

    def read(self, text: str | None) -> None:
        """Seconds of units that an earlier run has measured; nothing where they are not there."""
        try:
            found = json.loads(text or "{}")
            self.know({name: float(each) for name, each in found.items() if name in STAGES and each is not None})
            self.is_known = bool(found)
        except (ValueError, TypeError, AttributeError):
            self.is_known = False


def timed_twice(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds of the faster of two times: the first takes memory that was never touched."""
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        found = work()
        seconds.append(time.monotonic() - started)
    return found, min(seconds)


def clock(seconds: float) -> str:
    """`2 h 05 min`, `7 min`, `12 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
