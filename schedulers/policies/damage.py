"""Ours: read what is worth its bytes. Every use gets the level with the least damage + price * bytes still to be read.

Damage of a use is the squared gate weight times the calibrated damage of that expert at that level, so the choice knows
which experts are fragile, which layers the loss feels, and what is in memory already; bits flow between layers and
tokens to where a byte saves most. It is the run-time form of the converter's allocation (convert/allocate.py), and the
rule of PAPERS.md, section 5: lower what has the least damage for each byte saved.
"""

from __future__ import annotations

import numpy as np
from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.options import LOW_LEVEL, REUSE, SHARED_KNOBS, Knob, PolicyOptions
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.levels import HIGH, LOW, LevelPolicy

MIB = 1 << 20
LOW_PERCENTS = (20, 40, 60, 80, 90, 95)  # of the uses, that go low at the prices which `--calibrate` measures

PRICE = Knob(
    "price", 0.001, "nats of expected KLD that reading a MiB must save",
    is_what="a price; give nats for each MiB, from 0 up",
)  # fmt: skip


class DamagePolicy(LevelPolicy):
    """price: nats for each MiB read. Made by make_policy, which checks the options.

    What is in memory costs nothing: a high level there is always used, a low one is replaced when the damage it would
    do is worth the read. (Without `reuse` every level costs its bytes, as if nothing were in memory.) With one level
    in the store the choice is between reading and skipping.
    """

    name = "damage"
    wants_routing = wants_attention = False

    def __init__(
        self, layout: Layout, arena_bytes: int, options: PolicyOptions, calibration: Calibration | None = None
    ) -> None:
        if calibration is None:
            raise UsageError("policy damage needs a calibration and this model has none; convert it with --calibrate")
        super().__init__(layout, arena_bytes, calibration, options[REUSE])
        self.price = options[PRICE] / MIB
        self._may_skip = options[LOW_LEVEL] == "skip" or layout.n_levels == 1

    def plan(self, step: Step) -> StepPlan | None:
        if self._reuse and self._all_high(step):
            return None
        wishes = self.wishes(step)
        self.stats.wanted_high += wishes.count(HIGH)
        self.stats.wanted_low += wishes.count(LOW)
        self.stats.wanted_skip += wishes.count(SKIP)
        return self.serve(step, wishes)

    def wishes(self, step: Step) -> list[int]:
        """The level of least damage + price * bytes for each expert; ties go to the better one."""
        assert self._low_damage and self._skip_damage
        of_low, of_skip = self._low_damage[step.layer], self._skip_damage[step.layer]
        n_levels, sizes = self._layout.n_levels, self._layout.unit_bytes
        first, price, may_skip = self._layout.first_unit[step.layer], self.price, self._may_skip
        cache = self.cache if self._reuse else ()
        wishes = [HIGH] * len(step.experts)
        for i, (expert, squares) in enumerate(zip(step.experts, step.squares, strict=True)):
            unit = first + expert * n_levels
            if unit in cache:
                continue
            least = price * sizes[unit]
            if n_levels > 1:
                low = squares * of_low[expert] + (0.0 if unit + LOW in cache else price * sizes[unit + LOW])
                if low < least:
                    wishes[i], least = LOW, low
            if may_skip and squares * of_skip[expert] < least:
                wishes[i] = SKIP
        return wishes


def _describe(options: PolicyOptions, calibration: Calibration | None) -> str:
    return f"damage, price {options[PRICE]:.3g} nats/MiB, the rest {options[LOW_LEVEL]}"


def _settings(calibration: Calibration | None, high_bytes: float, low_bytes: float) -> list[PolicyOptions]:
    """The prices at which a share of the uses goes low."""
    saved_mib = (high_bytes - low_bytes) / MIB
    if calibration is None or saved_mib <= 0:
        return []
    shares = np.quantile(calibration.use_damage, np.array(LOW_PERCENTS) / 100)
    prices = sorted({float(damage) / saved_mib for damage in shares} - {0.0})  # at 0 nothing is lowered
    level = "low" if low_bytes else "skip"
    return [PolicyOptions("damage", price=price, low_level=level, reuse=False) for price in prices]


POLICY = PolicyEntry(
    "damage", 30, "each use gets the level with the least expected damage + price x bytes to be read (ours)",
    DamagePolicy, knobs=(PRICE, *SHARED_KNOBS), describe=_describe, main_knob=PRICE, settings=_settings,
)  # fmt: skip
