"""A step as one event: all its experts are in memory together when it ends, and none makes room for another of it.

What is in memory when a step begins is a hit in any case. The engine has the rest so for steps of one token whose
experts fit (tests/test_atomic_replay.py); a prompt's steps stream, there the latest experts make room for the next
(schedulers/cache.py). A replay can have it so for every step, as those that others publish do.
"""

from __future__ import annotations

import numpy as np
from moe_edge.models.errors import BudgetTooSmall, EngineError
from moe_edge.schedulers.layout import Layout, Step, StepPlan
from moe_edge.schedulers.replay.trace import Trace


def largest_step_bytes(trace: Trace) -> int:
    """Bytes of the step that needs most, all its experts at the high level: the least arena of an atomic replay."""
    layout = trace.layout()
    sizes = np.array(layout.unit_bytes[:: layout.n_levels])
    return max(
        int(sizes[np.array(step.experts) + layout.first_unit[step.layer] // layout.n_levels].sum())
        for _, step in trace.steps()
    )


def check_holds_steps(trace: Trace, arena_bytes: int) -> None:
    """Raises BudgetTooSmall, with the bytes that would do, for an arena that does not hold the largest step."""
    needed = largest_step_bytes(trace)
    if arena_bytes < needed:
        raise BudgetTooSmall(
            f"an expert arena of {arena_bytes} bytes does not hold the experts of the largest step of {trace.model}, "
            f"{needed} bytes, which an event-atomic replay keeps together; give more, or count as the engine does",
            needed,
        )


def check_atomic(layout: Layout, step: Step, plan: StepPlan) -> None:
    """Raises EngineError for a plan that evicts one expert of the step for another; a change of level is none."""
    of_layer, n_levels, experts = layout.layer_units(step.layer), layout.n_levels, set(step.experts)
    for at, gone in zip(plan.order, plan.victims, strict=True):
        for unit in gone:
            expert = (unit - of_layer.start) // n_levels
            if unit in of_layer and expert in experts and expert != step.experts[at]:
                raise EngineError("the scheduler's plan evicts an expert of a step for another of the same step")
