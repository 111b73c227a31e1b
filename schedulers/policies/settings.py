"""From what a user asks for to what a policy is made of: --max-kld resolved by the calibrated table, knobs checked."""

from __future__ import annotations

from dataclasses import replace

from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.policies.hobbit import fit_thresholds
from moe_edge.schedulers.policies.options import (
    DEPTHS,
    IMPORTANCES,
    LOOKAHEADS,
    LOW_LEVELS,
    POLICY_NAMES,
    PREFILL_IMPORTANCES,
    PolicyOptions,
)


def choose_setting(calibration: Calibration | None, max_kld: float) -> Setting | None:
    """The measured setting with the fewest bytes whose KLD is at most max_kld; None: exact, which is always within it.

    Ties go to the lower KLD. Raises UsageError without a table, and for a bound that is not a number from 0 up.
    """
    if not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g} is not a bound; give nats per token, for instance --max-kld 0.02")
    if calibration is None or not calibration.settings:
        raise UsageError("--max-kld needs measured settings and this model has none; convert it with --calibrate")
    within = [s for s in calibration.settings if s.kld <= max_kld and s.bytes_share < 1.0 and s.policy != "exact"]
    return min(within, key=lambda s: (s.bytes_share, s.kld), default=None)


def describe_setting(setting: Setting | None, max_kld: float) -> str:
    """One sentence to print before a run."""
    if setting is None:
        return f"--max-kld {max_kld:g}: exact, as no measured setting reads less within that"
    knob = "--price" if setting.policy == "damage" else "--retention"
    return (
        f"--max-kld {max_kld:g}: --policy {setting.policy} {knob} {setting.knob:.3g} --low-level {setting.low_level}, "
        f"measured at {setting.kld:.2g} nats per token "
        f"and {setting.bytes_share:.0%} of the bytes of exact"
    )


def describe_options(options: PolicyOptions, calibration: Calibration | None) -> str:
    """A policy and the knobs that matter to it, as the policy reads them."""
    if options.name == "dymoe":
        measured = "calibrated" if calibration else "cosine"
        depth = measured if options.depth == "auto" else options.depth
        return f"dymoe, retention {options.retention:g} ({depth} depth schedule), the rest {options.low_level}"
    if options.name == "hobbit":
        t1, t2 = fit_thresholds(calibration)
        t1, t2 = (t1 if options.t1 is None else options.t1), (t2 if options.t2 is None else options.t2)
        return f"hobbit, t1 {t1:.2f}, t2 {t2:.2f}"
    if options.name == "damage":
        return f"damage, price {options.price:.3g} nats/MiB, the rest {options.low_level}"
    return options.name


def resolve_options(options: PolicyOptions, calibration: Calibration | None) -> PolicyOptions:
    """The options with --max-kld replaced by the setting it chooses; unchanged without one. Raises UsageError."""
    if options.max_kld is None:
        return options
    setting = choose_setting(calibration, options.max_kld)
    if setting is None:
        return replace(options, name="exact", max_kld=None)
    options = replace(options, name=setting.policy, low_level=setting.low_level, max_kld=None)
    if setting.policy == "damage":
        return replace(options, price=setting.knob)
    return replace(options, retention=setting.knob)


def check_options(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    """Raises UnknownName for a name we do not have, and UsageError for a knob out of range or without what it needs."""
    _check_names(options)
    if not 0 <= options.retention <= 1:
        raise UsageError(f"--retention {options.retention:g} is outside 0 to 1; it is a share of expert uses")
    if not 0 < options.heavy_share <= 1:
        raise UsageError(
            f"heavy share {options.heavy_share:g} is outside 0 to 1; it is a share of a micro-batch's tokens"
        )
    if options.name == "hobbit":
        _check_thresholds(options, calibration)
    elif options.t1 is not None or options.t2 is not None:
        raise UsageError(f"t1 and t2 are hobbit's thresholds and the policy is {options.name}; use --policy hobbit")
    if options.name == "damage" and not options.price >= 0:
        raise UsageError(f"--price {options.price:g} is not a price; give nats for each MiB, from 0 up")
    if options.name == "dymoe":
        _check_dymoe(options, layout, calibration)
    if calibration and options.name != "exact" and len(calibration.levels) != layout.n_levels:
        raise UsageError(
            f"the calibration is for levels {', '.join(calibration.levels)} but the model has {layout.n_levels}; "
            "convert it again with --calibrate"
        )


def _check_names(options: PolicyOptions) -> None:
    for what, name, known in (
        ("policy", options.name, POLICY_NAMES),
        ("low level", options.low_level, LOW_LEVELS),
        ("depth schedule", options.depth, DEPTHS),
        ("importance", options.importance, IMPORTANCES),
        ("prefill importance", options.prefill_importance, PREFILL_IMPORTANCES),
        ("cache rule", options.cache, RULES),
        ("look-ahead", options.lookahead, LOOKAHEADS),
    ):
        if name not in known:
            raise UnknownName(f"unknown {what} '{name}'; known: {', '.join(known)}")


def _check_thresholds(options: PolicyOptions, calibration: Calibration | None) -> None:
    t1, t2 = fit_thresholds(calibration)
    t1, t2 = (t1 if options.t1 is None else options.t1), (t2 if options.t2 is None else options.t2)
    if not 0 <= t1 <= t2 <= 1:
        raise UsageError(f"thresholds t1 {t1:g} and t2 {t2:g} do not satisfy 0 <= t1 <= t2 <= 1")


def _check_dymoe(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    if options.low_level == "low" and options.retention < 1 and layout.n_levels < 2:
        raise UsageError(
            "the model has no low level; convert it with --low TYPE, or use --low-level skip, or --retention 1"
        )
    if calibration is None:
        for what, name, needs in (
            ("depth schedule", options.depth, "calibrated"),
            ("importance", options.importance, "damage"),
            ("prefill importance", options.prefill_importance, "damage"),
        ):
            if name == needs:
                raise UsageError(
                    f"{what} '{name}' needs a calibration and this model has none; convert it with --calibrate"
                )
