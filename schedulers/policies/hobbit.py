"""HOBBIT's miss rule: what is in memory at the high level is used; only misses are degraded, by cumulated gate weight.

Source: HOBBIT, PAPERS.md, section 2. Its prefetch and its eviction score are not here.
"""

from __future__ import annotations

from math import inf

from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.options import RENORMALISE, Knob, PolicyOptions
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.importance import gate_mass, most_important
from moe_edge.schedulers.policies.levels import HIGH, LOW, LevelPolicy

PAPER_T1, PAPER_T2 = 0.6, 0.9  # fitted to Mixtral, where they make 67 % of uses high, 30 % low, 3 % skipped
FITTED_HIGH_PERCENT, FITTED_NOT_SKIPPED_PERCENT = 67, 97

# their ranges hang together: _check looks at both
T1 = Knob("t1", None, "cumulated gate weight up to which misses stay high", least=-inf)
T2 = Knob("t2", None, "and up to which they are low; beyond, skipped", least=-inf)


def fit_thresholds(calibration: Calibration | None) -> tuple[float, float]:
    """T1 and T2 that split this model's expert uses as the paper's split Mixtral's: 67, 30 and 3 %.

    Without a calibration: the paper's own, which mean something else on a model with another top-k.
    """
    if calibration is None:
        return PAPER_T1, PAPER_T2
    s = calibration.cumulated
    return float(s[FITTED_HIGH_PERCENT]), float(s[FITTED_NOT_SKIPPED_PERCENT])


def thresholds(options: PolicyOptions, calibration: Calibration | None) -> tuple[float, float]:
    """T1 and T2 as asked for, else fitted."""
    t1, t2 = fit_thresholds(calibration)
    return (t1 if options[T1] is None else options[T1]), (t2 if options[T2] is None else options[T2])


class Hobbit(LevelPolicy):
    """t1, t2: the thresholds in use. Made by make_policy, which checks the options; reuse is always on."""

    name = "hobbit"
    wants_routing = wants_attention = False

    def __init__(
        self, layout: Layout, arena_bytes: int, options: PolicyOptions, calibration: Calibration | None = None
    ) -> None:
        super().__init__(layout, arena_bytes, calibration)
        self.t1, self.t2 = thresholds(options, calibration)

    def plan(self, step: Step) -> StepPlan | None:
        if self._all_high(step):
            return None
        wishes = self.wishes(step)
        first, n_levels = self._layout.first_unit[step.layer], self._layout.n_levels
        asked = [w for e, w in zip(step.experts, wishes, strict=True) if first + e * n_levels not in self.cache]
        self.stats.wanted_high += asked.count(HIGH)
        self.stats.wanted_low += asked.count(LOW)
        self.stats.wanted_skip += asked.count(SKIP)
        return self.serve(step, wishes)

    def wishes(self, step: Step) -> list[int]:
        """The level of each expert by the miss rule: s, the shares of the gate weight before it in falling order.

        s <= t1: high; s <= t2: low; else skip. The first has s = 0 and is always high. Of several tokens, the shares of
        the summed gate weights: our generalisation, the paper's rule for one token. A model with one level has nothing
        lower to read: low becomes high.
        """
        mass = gate_mass(step)
        total = sum(mass) or 1.0
        t1, t2 = self.t1 * total, self.t2 * total
        low = LOW if self._layout.n_levels > 1 else HIGH
        wishes = [HIGH] * len(mass)
        before = 0.0
        for i in most_important(mass, len(mass)):
            if before > t1:
                wishes[i] = low if before <= t2 else SKIP
            before += mass[i]
        return wishes


def _check(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    t1, t2 = thresholds(options, calibration)
    if not 0 <= t1 <= t2 <= 1:
        raise UsageError(f"thresholds t1 {t1:g} and t2 {t2:g} do not satisfy 0 <= t1 <= t2 <= 1")


def _describe(options: PolicyOptions, calibration: Calibration | None) -> str:
    t1, t2 = thresholds(options, calibration)
    return f"hobbit, t1 {t1:.2f}, t2 {t2:.2f}"


POLICY = PolicyEntry(
    "hobbit", 20, "only misses are degraded, by cumulated gate weight (after HOBBIT)", Hobbit,
    knobs=(T1, T2, RENORMALISE), check=_check, describe=_describe,
)  # fmt: skip
