"""From what a user asks for to what a policy is made of: --max-kld resolved by the calibrated table, knobs checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.errors import UnknownName, UsageError
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.lookahead.rules import LOOKAHEADS
from moe_edge.schedulers.options import LOW_LEVEL, Knob, PolicyOptions
from moe_edge.schedulers.policies import KNOBS, find_policy, who_listens
from moe_edge.schedulers.policies.entry import PolicyEntry


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
    knob = setting_knob(setting)
    return (
        f"--max-kld {max_kld:g}: --policy {setting.policy} {knob.option} {setting.knob:.3g} "
        f"{LOW_LEVEL.option} {setting.low_level}, measured at {setting.kld:.2g} nats per token "
        f"and {setting.bytes_share:.0%} of the bytes of exact"
    )


def setting_knob(setting: Setting) -> Knob:
    """The knob that a measured setting turns. Raises UsageError for a policy that has none."""
    knob = find_policy(setting.policy).main_knob
    if knob is None:
        raise UsageError(f"the measured setting is of policy {setting.policy}, which has no knob to turn")
    return knob


def describe_options(options: PolicyOptions, calibration: Calibration | None) -> str:
    """A policy and the knobs that matter to it, as the policy reads them."""
    return find_policy(options.name).describe(options, calibration)


def policy_warning(options: PolicyOptions, calibration: Calibration | None) -> str:
    """What somebody who asks for a policy should know; empty when there is nothing."""
    return find_policy(options.name).warning(options, calibration)


def policy_selects(options: PolicyOptions, calibration: Calibration | None) -> bool:
    """Whether a policy takes part in the choice of experts. Raises UnknownName, UsageError."""
    resolved = resolve_options(options, calibration)
    return find_policy(resolved.name).selects(resolved, calibration)


def resolve_options(options: PolicyOptions, calibration: Calibration | None) -> PolicyOptions:
    """The options with --max-kld replaced by the setting it chooses; unchanged without one. Raises UsageError."""
    if options.max_kld is None:
        return options
    setting = choose_setting(calibration, options.max_kld)
    if setting is None:
        return replace(options, name="exact", max_kld=None)
    knobs: dict[str, Any] = {setting_knob(setting).name: setting.knob, LOW_LEVEL.name: setting.low_level}
    return PolicyOptions(
        setting.policy, cache=options.cache, lookahead=options.lookahead, knobs=options.knobs, **knobs
    )


def check_options(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    """Raises UnknownName for a name we do not have, and UsageError for a knob out of range or without what it needs."""
    entry = find_policy(options.name)
    for what, name, known in (("cache rule", options.cache, RULES), ("look-ahead", options.lookahead, LOOKAHEADS)):
        if name not in known:
            raise UnknownName(f"unknown {what} '{name}'; known: {', '.join(known)}")
    for name, value in options.turned():
        _check_knob(entry, name, value)
    entry.check(options, layout, calibration)
    if calibration and options.name != "exact" and len(calibration.levels) != layout.n_levels:
        raise UsageError(
            f"the calibration is for levels {', '.join(calibration.levels)} but the model has {layout.n_levels}; "
            "convert it again with --calibrate"
        )


def _check_knob(entry: PolicyEntry, name: str, value: object) -> None:
    """A knob that somebody turned: its range is its own; the policy must listen to one that changes something."""
    knob = KNOBS.get(name)
    if knob is None:
        raise UnknownName(f"unknown knob '{name}'; known: {', '.join(KNOBS)}")
    knob.check(value)
    if value != knob.default and knob.default is None and knob not in entry.knobs:
        whose = ", ".join(who_listens(knob))
        raise UsageError(f"{knob.option} is {whose}'s and the policy is {entry.name}; use --policy {whose}")
