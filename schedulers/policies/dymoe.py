"""DyMoE: a share of each step's experts, the most important ones, at the high level; the rest low or skipped.

The share falls with depth (depth.py), importance is importance.py's, the cache rules are levels.py's.
Source: DyMoE, PAPERS.md, section 1 (third-party summaries of the paper; what is ours is marked there).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.options import LOW_LEVEL, REUSE, SHARED_KNOBS, Knob, PolicyOptions
from moe_edge.schedulers.policies.depth import DEPTHS, at_least_one, depth_schedule
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.importance import expected_damage, gate_mass, heavy_hitters, most_important
from moe_edge.schedulers.policies.levels import HIGH, LOW, LevelPolicy

GOLDEN = 0.618034

RETENTION = Knob(
    "retention", 0.9, "mean share of expert uses at the high level", most=1.0, is_what="a share of expert uses"
)
DEPTH = Knob(
    "depth", "auto", "how the share changes with depth: cosine, calibrated, flat", choices=DEPTHS,
    label="depth schedule",
)  # fmt: skip
IMPORTANCE = Knob(
    "importance", "auto", "what ranks experts in decode: gate (weights), damage (calibrated)",
    choices=("auto", "gate", "damage"),
)  # fmt: skip
PREFILL_IMPORTANCE = Knob(
    "prefill_importance", "auto", "what ranks experts in prefill: mass (gate weights), attention, damage (calibrated)",
    choices=("auto", "mass", "attention", "damage"), label="prefill importance",
)  # fmt: skip
HEAVY_SHARE = Knob(
    "heavy_share", 0.1, "share of a micro-batch's tokens that count as heavy hitters", most=1.0, least_too=False,
    is_what="a share of a micro-batch's tokens", label="heavy share", hidden=True,
)  # fmt: skip


class DyMoE(LevelPolicy):
    """retention: r(l) of each MoE layer, [L]. Made by make_policy, which checks the options."""

    name = "dymoe"

    def __init__(
        self, layout: Layout, arena_bytes: int, options: PolicyOptions, calibration: Calibration | None = None
    ) -> None:
        super().__init__(layout, arena_bytes, calibration, options[REUSE])
        self.retention = depth_schedule(options[DEPTH], options[RETENTION], layout.n_layers, calibration)
        auto = "damage" if calibration else "gate"
        self._rest = SKIP if options[LOW_LEVEL] == "skip" else LOW
        self._damage = self._skip_damage if self._rest == SKIP else self._low_damage
        self._decode = auto if options[IMPORTANCE] == "auto" else options[IMPORTANCE]
        self._prefill = auto if options[PREFILL_IMPORTANCE] == "auto" else options[PREFILL_IMPORTANCE]
        self._heavy_share = options[HEAVY_SHARE]
        # with everything at the high level nothing is ranked, so nothing needs watching
        self.wants_attention = self.wants_routing = self._prefill == "attention" and options[RETENTION] < 1
        self._carry = self._no_debts()  # experts owed to the high level, for decode and prefill, for each layer
        self._shares: dict[int, tuple[float, ...]] = {}  # experts of a step -> r(l) with the guard of one expert

    def _no_debts(self) -> tuple[list[float], list[float]]:
        """Staggered between layers, so that rounding does not go the same way in all of them at the first token."""
        n = self._layout.n_layers
        return [(i * GOLDEN) % 1 - 0.5 for i in range(n)], [(i * GOLDEN) % 1 - 0.5 for i in range(n)]

    def reset(self, resident: Iterable[int]) -> None:
        """Forget the cache state and what rounding owes, and start from these units. The counts go on."""
        super().reset(resident)
        self._carry = self._no_debts()

    def plan(self, step: Step) -> StepPlan | None:
        n = len(step.experts)
        n_high = self._next_n_high(step.layer, n, step.n_tokens > 1)
        stats = self.stats
        stats.wanted_high += n_high
        if self._rest == LOW:
            stats.wanted_low += n - n_high
        else:
            stats.wanted_skip += n - n_high
        if (self._reuse or n_high == n) and self._all_high(step):
            return None
        return self.serve(step, self._wishes(step, n_high))

    def _next_n_high(self, layer: int, n: int, prefill: bool) -> int:
        """How many of n experts get the high level: r(l) * n rounded, the rest goes to the layer's next step.

        Handed on to the next layer, as a first version did it, the rest rounded the depth schedule away to a flat one.
        Rounding up instead would make 98 % of a top-2 model's uses high at a retention of 0.75 (PAPERS.md, section 1).
        """
        if n not in self._shares:
            self._shares[n] = at_least_one(self.retention, n)
        carry = self._carry[prefill]
        target = self._shares[n][layer] * n + carry[layer]
        n_high = min(n, max(1, int(target + 0.5)))
        carry[layer] = target - n_high
        return n_high

    def wishes(self, step: Step) -> Sequence[int]:
        n = len(step.experts)
        return self._wishes(step, min(n, max(1, round(self.retention[step.layer] * n))))

    def _wishes(self, step: Step, n_high: int) -> Sequence[int]:
        n = len(step.experts)
        if n_high == n:
            return [HIGH] * n
        wishes = [self._rest] * n
        for i in most_important(self._importance(step), n_high):
            wishes[i] = HIGH
        return wishes

    def _importance(self, step: Step) -> Sequence[float]:
        rule = self._prefill if step.n_tokens > 1 else self._decode
        if rule == "damage" and self._damage:
            return expected_damage(step, self._damage)
        if rule == "attention":
            return heavy_hitters(step, self._heavy_share)
        return gate_mass(step)


def _check(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    if options[LOW_LEVEL] == "low" and options[RETENTION] < 1 and layout.n_levels < 2:
        raise UsageError(
            "the model has no low level; convert it with --low TYPE, or use --low-level skip, or --retention 1"
        )
    if calibration is None:
        for knob, needs in ((DEPTH, "calibrated"), (IMPORTANCE, "damage"), (PREFILL_IMPORTANCE, "damage")):
            if options[knob] == needs:
                raise UsageError(
                    f"{knob.label or knob.name} '{needs}' needs a calibration and this model has none; "
                    "convert it with --calibrate"
                )


def _describe(options: PolicyOptions, calibration: Calibration | None) -> str:
    measured = "calibrated" if calibration else "cosine"
    depth = measured if options[DEPTH] == "auto" else options[DEPTH]
    return f"dymoe, retention {options[RETENTION]:g} ({depth} depth schedule), the rest {options[LOW_LEVEL]}"


def _settings(calibration: Calibration | None, high_bytes: float, low_bytes: float) -> list[PolicyOptions]:
    retentions = {"low": (0.9, 0.75, 0.5, 0.25), "skip": (0.9, 0.75)}
    return [
        PolicyOptions("dymoe", retention=retention, low_level=level, reuse=False)
        for level in (("low", "skip") if low_bytes else ("skip",))
        for retention in retentions[level]
    ]


POLICY = PolicyEntry(
    "dymoe", 10, "a share of the uses high, the most important ones, by a depth schedule (after DyMoE)", DyMoE,
    knobs=(RETENTION, DEPTH, IMPORTANCE, PREFILL_IMPORTANCE, HEAVY_SHARE, *SHARED_KNOBS),
    check=_check, describe=_describe, main_knob=RETENTION, settings=_settings,
)  # fmt: skip
