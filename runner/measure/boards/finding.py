"""What a check says: what was found, what that costs, and the line that mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_edge.runner.measure.boards.machine import Machine

OK, NOTE, COSTS, UNKNOWN = "ok", "note", "costs", "unknown"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    state: ok; note, for what may matter; costs, for what makes a model slow or breaks it; unknown, when the machine
    does not say. cost, mend: one sentence each, empty where there is nothing to do.
    """

    name: str
    state: str
    found: str
    cost: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """A file of this folder ends with one. run: what it finds; nothing where the question does not arise."""

    name: str
    order: int
    run: Callable[[Machine], Iterator[Finding]]
