"""The table behind --max-kld: what each setting of a converted model costs in KLD, measured against exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from moe_edge.runner.engine import Engine, EngineOptions
from moe_edge.runner.evaluate import (
    ReferenceLogits,
    bos_token,
    cut_chunks,
    eval_options,
    kld_of_rows,
    logits_pass,
    read_text,
    scored_positions,
    tokenize_text,
)
from moe_edge.schedulers.calibration import Setting
from moe_edge.schedulers.options import PolicyOptions

CHUNK = 512
RETENTIONS = {"low": (0.9, 0.75, 0.5, 0.25, 0.0), "skip": (0.9, 0.75, 0.5)}


def measure_settings(
    model: Path,
    text: Path,
    *,
    after_tokens: int,
    n_tokens: int,
    options: EngineOptions | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Setting, ...]:
    """Measured on the text behind after_tokens (on its start where it is too short), token by token as in decode.

    The policy gets what it wishes: no resident high level serves a low wish. That is the worst a cache can make of it.
    Fastest first. Raises what the engine raises.
    """
    o = eval_options(model, options or EngineOptions(), CHUNK, one_by_one=True)
    settings = []
    with Engine(model, o) as engine, ReferenceLogits() as kept:
        tokens = tokenize_text(engine, read_text(text))
        n = max(1, n_tokens // CHUNK)
        later = tokens[after_tokens:]
        chunks = cut_chunks(later if len(later) >= CHUNK else tokens, CHUNK, n_chunks=n, bos=bos_token(engine))
        kept.check_room(len(chunks) * len(scored_positions(CHUNK)), int(engine.llama.n_vocab()))
        engine.set_policy(PolicyOptions())
        for block in logits_pass(engine, chunks, one_by_one=True):
            kept.write(block.rows)
        high, low = _level_bytes(engine)
        levels = ("low", "skip") if len(engine.model.levels) > 1 else ("skip",)
        for low_level in levels:
            for retention in RETENTIONS[low_level]:
                kept.rewind()
                asked = PolicyOptions("dymoe", retention=retention, low_level=low_level, reuse=False)
                policy = engine.set_policy(asked)
                kld = [
                    kld_of_rows(kept.read(*block.rows.shape), block.rows)
                    for block in logits_pass(engine, chunks, one_by_one=True)
                ]
                stats = policy.stats
                bytes_ = stats.wanted_high * high + stats.wanted_low * low
                share = bytes_ / max(1, (stats.wanted_high + stats.wanted_low + stats.wanted_skip) * high)
                mean = max(0.0, float(np.concatenate(kld).mean()))
                settings.append(Setting("dymoe", low_level, retention, mean, share))
                tell(f"setting: retention {retention:g}, {low_level}: KLD {mean:.4g}, {100 * share:.0f} % of the bytes")
    return tuple(sorted(settings, key=lambda s: s.bytes_share))


def _level_bytes(engine: Engine) -> tuple[float, float]:
    """Mean bytes of an expert at the high level and at the low one (0 where there is none)."""
    sizes, n_levels = engine.layout.unit_bytes, engine.layout.n_levels
    return float(np.mean(sizes[::n_levels])), float(np.mean(sizes[1::n_levels])) if n_levels > 1 else 0.0


