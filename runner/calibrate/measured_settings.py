"""The table behind --max-kld: what each setting of a converted model costs in KLD, measured against exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from moe_edge.models.calibration import Calibration, Setting
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.runner.calibrate.observe import spread_chunks
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.evaluate import eval_options
from moe_edge.runner.measure.logits import ReferenceLogits, bos_token, cut_chunks, read_text, tokenize_text
from moe_edge.schedulers.layout import SKIP, Layout, Step, StepPlan
from moe_edge.schedulers.options import LOW_LEVEL, PolicyOptions
from moe_edge.schedulers.policies import POLICIES, find_policy
from moe_edge.schedulers.policy import Policy

CHUNK = 512


def measure_settings(
    model: Path,
    text: Path,
    *,
    n_tokens: int,
    options: EngineOptions | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Setting, ...]:
    """Measured on chunks spread over the text, half a chunk off those of the calibration, token by token as in decode.

    The policy gets what it wishes: no resident high level serves a low wish. That is the worst a cache can make of it.
    Fastest first. Raises what the engine raises.
    """
    o = eval_options(model, options or EngineOptions(), CHUNK, one_by_one=True)
    settings = []
    with _engine(model, o, tell) as engine, ReferenceLogits() as kept:
        tokens = tokenize_text(engine, read_text(text))
        shifted = tokens[CHUNK // 2 :] if len(tokens) >= 3 * CHUNK // 2 else tokens
        chunks = spread_chunks(cut_chunks(shifted, CHUNK, bos=bos_token(engine)), n_tokens)
        engine.set_policy(PolicyOptions())
        kept.keep(engine, chunks, one_by_one=True)
        high, low = _level_bytes(engine)
        for asked in _grid(engine.model.calibration, high, low):
            policy = engine.set_policy(asked)
            used = _BytesUsed(engine.layout, policy)
            engine.native.schedule = used.plan
            kld = kept.kld(engine, chunks, one_by_one=True)
            share = used.bytes / max(1, used.exact_bytes)
            mean = max(0.0, float(kld.mean()))
            turned = find_policy(asked.name).main_knob
            assert turned is not None, "a policy with settings has a knob that they turn"
            knob, low_level = asked[turned], asked[LOW_LEVEL]
            expected = (policy.stats.expected_damage or 0.0) / chunks.size
            settings.append(Setting(asked.name, low_level, knob, mean, share, expected))
            tell(
                f"setting: {asked.name} {knob:.3g}, {low_level}: KLD {mean:.4g}, {100 * share:.0f} % of the bytes"
            )
    return tuple(sorted(settings, key=lambda s: s.bytes_share))


def _engine(model: Path, options: EngineOptions, tell: Callable[[str], None]) -> Engine:
    """Hours of work are not given up for the last table: what does not fit beside the program runs at its least."""
    try:
        return Engine(model, options)
    except BudgetTooSmall as error:
        if not options.charge_program:
            raise
        tell(f"settings: {error}; they are measured above --ram, by what the program holds beside the model")
        return Engine(model, replace(options, charge_program=False))


class _BytesUsed:
    """Bytes of the levels a policy chose, and of the same experts at the high level; types may differ by expert."""

    def __init__(self, layout: Layout, policy: Policy) -> None:
        self._layout, self._policy = layout, policy
        self.bytes = self.exact_bytes = 0

    def plan(self, step: Step) -> StepPlan | None:
        made = self._policy.plan(step)
        sizes, n_levels = self._layout.unit_bytes, self._layout.n_levels
        first = self._layout.first_unit[step.layer]
        exact = sum(sizes[first + expert * n_levels] for expert in step.experts)
        # an expert that took another's place came from memory: the one it replaced is not read
        free = getattr(self._policy, "replacements", ())
        self.exact_bytes += exact
        if made is None:
            self.bytes += sum(sizes[first + expert * n_levels] for expert in step.experts if expert not in free)
            return None
        for i, level in zip(made.order, made.levels, strict=True):
            if level != SKIP and step.experts[i] not in free:
                self.bytes += sizes[first + step.experts[i] * n_levels + level]
        return made


def _grid(calibration: Calibration | None, high_bytes: float, low_bytes: float) -> list[PolicyOptions]:
    """The settings to measure, those of every policy that has some: at most SETTING_ROWS."""
    return [
        options for policy in POLICIES.values() for options in policy.settings(calibration, high_bytes, low_bytes)
    ]


def _level_bytes(engine: Engine) -> tuple[float, float]:
    """Mean bytes of an expert at the high level and at the low one (0 where there is none)."""
    sizes, n_levels = engine.layout.unit_bytes, engine.layout.n_levels
    return float(np.mean(sizes[::n_levels])), float(np.mean(sizes[1::n_levels])) if n_levels > 1 else 0.0
