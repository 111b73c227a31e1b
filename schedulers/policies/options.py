"""What a user can say about scheduling, as one value. Which knobs go together is checked where a policy is made."""

from __future__ import annotations

from dataclasses import dataclass

POLICY_NAMES = ("exact", "dymoe", "hobbit", "damage")
LOW_LEVELS = ("low", "skip")
DEPTHS = ("auto", "cosine", "calibrated", "flat")
IMPORTANCES = ("auto", "gate", "damage")
LOOKAHEADS = ("off", "single", "stacked", "votes", "auto")
PREFILL_IMPORTANCES = ("auto", "mass", "attention", "damage")


@dataclass(frozen=True)
class PolicyOptions:
    """A policy and its knobs.

    retention: dymoe, mean share of expert uses at the high level, 0 to 1. low_level: what the others get. depth: how
    the share falls with depth. importance: what ranks experts in decode; prefill_importance: in prefill. heavy_share:
    share of a micro-batch's tokens that count as heavy hitters. renormalise: after a skip, scale the token's other
    gate weights up to the old sum. reuse: a resident high level serves a low wish (DyMoE's conservative reuse).
    t1, t2: hobbit's thresholds on the cumulated gate weight; None: fitted from the calibration.
    price: damage, nats of expected KLD that a MiB read must save.
    cache: which expert goes when another needs its place, a name of schedulers.eviction.RULES. lookahead: how experts
    of the next layers are predicted and read early.
    max_kld: choose the setting by this bound (nats per token, against exact) from the calibrated table.
    """

    name: str = "exact"
    retention: float = 0.9
    low_level: str = "low"
    depth: str = "auto"
    importance: str = "auto"
    prefill_importance: str = "auto"
    heavy_share: float = 0.1
    renormalise: bool = False
    reuse: bool = True
    t1: float | None = None
    t2: float | None = None
    price: float = 0.001
    cache: str = "auto"
    lookahead: str = "off"
    max_kld: float | None = None
