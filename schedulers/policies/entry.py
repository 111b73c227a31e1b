"""What a policy file offers the rest of the program: how to make it, and how to ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_edge.models.calibration import Calibration
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.options import Knob, PolicyOptions


def _nothing_to_check(options: PolicyOptions, layout: Layout, calibration: Calibration | None) -> None:
    pass


def _no_settings(calibration: Calibration | None, high_bytes: float, low_bytes: float) -> Sequence[PolicyOptions]:
    return ()


@dataclass(frozen=True)
class PolicyEntry:
    """A policy as the command line, `show`, `simulate`, the calibration and the docs know it.

    words: one phrase for `--help`. order: where it stands in lists, lowest first. knobs: what it listens to.
    make: (layout, arena bytes, options, calibration) -> the policy. check: what the knobs' own ranges do not say;
    raises UsageError. describe: the policy and the knobs that matter, in one phrase, as the policy reads them.
    main_knob: the one that trades bytes for precision; None for a policy that has no measured settings.
    settings: (calibration, mean bytes of an expert at the high level, at the low level or 0) -> the settings that
    `--calibrate` measures for --max-kld. selects: whether it takes part in the choice of experts. warning: what
    somebody who asks for it should know, one sentence; empty when there is nothing.
    """

    name: str
    order: int
    words: str
    make: Callable[[Layout, int, PolicyOptions, Calibration | None], Any]
    knobs: tuple[Knob, ...] = ()
    check: Callable[[PolicyOptions, Layout, Calibration | None], None] = _nothing_to_check
    describe: Callable[[PolicyOptions, Calibration | None], str] = lambda options, calibration: options.name
    main_knob: Knob | None = None
    settings: Callable[[Calibration | None, float, float], Sequence[PolicyOptions]] = _no_settings
    selects: Callable[[PolicyOptions, Calibration | None], bool] = lambda options, calibration: False
    warning: Callable[[PolicyOptions, Calibration | None], str] = lambda options, calibration: ""
