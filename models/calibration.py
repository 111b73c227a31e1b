"""What a calibration measured, as the policies use it. Pure data; store/calibration_keys.py stores and reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from moe_edge.models.formats.floats import Float64Array

# how llama.cpp makes gate weights of what its router says of the chosen experts (native/capi.h, me_gates)
GATES_UNKNOWN, GATES_PLAIN, GATES_NORMALISED, GATES_SOFTMAX = 0, 1, 2, 3


@dataclass(frozen=True)
class Setting:
    """One row of the table behind --max-kld, measured on the calibration text against the exact policy.

    knob: the retention of dymoe, the price of damage. kld: mean nats per token. bytes_share: bytes of the levels used,
    as a share of what exact uses. expected: nats per token that the damage table expects of the same uses.
    """

    policy: str
    low_level: str
    knob: float
    kld: float
    bytes_share: float
    expected: float = 0.0


@dataclass(frozen=True)
class Substitution:
    """What it costs to take another expert than the router chose.

    factor [L, B]: squared change of the layer's output when one of a token's experts is replaced, relative to
    g^2 |E(x)|^2 of the one that is replaced; by the ratio of the two gates, B bins from 0 to 1. The other experts'
    weights change as the model makes them; that is in it. gates [L]: how gate weights come about, GATES_*;
    scale [L]: their factor.
    """

    factor: Float64Array
    gates: npt.NDArray[np.int64]
    scale: Float64Array


@dataclass(frozen=True)
class Calibration:
    """L MoE layers, E experts of the widest layer (narrower ones padded with zeros), the store's n levels.

    text_sha256, n_tokens: the text. levels: the store's level names, highest first.
    counts [L, E]: tokens routed to each expert. mean_gate [L, E]: mean gate weight of those. squares [L, E]: sum of
    their squared gate weights. sensitivity [L]: KLD, in nats, for each unit of squared error in the layer's MoE output,
    from disturbing it at a known size.
    error [L, E, n + 1]: sum over the tokens of g^2 |E(x) - E_level(x)|^2 at each level; the last is the expert removed.
    cumulated [101]: quantiles 0 to 100 % over expert uses of the gate weight (shares of a token's sum) before each use
    in falling order: s(e_i) of HOBBIT's miss rule.
    use_damage [L, 101]: quantiles 0 to 100 % over the uses of a layer of g^2 * unit_damage at the level `low` (or of
    skipping, when the store has one level).
    settings: measured rows, fastest first; empty when none were measured.
    substitution: None when it was not measured, as before 2026-11-27 and for models whose graph does not let it.
    """

    text_sha256: str
    n_tokens: int
    levels: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    mean_gate: Float64Array
    squares: Float64Array
    sensitivity: Float64Array
    error: Float64Array
    cumulated: Float64Array
    use_damage: Float64Array
    settings: tuple[Setting, ...] = ()
    substitution: Substitution | None = None

    @property
    def damage_scale(self) -> float:
        """Measured KLD for each nat that the damage table expects: the median over the settings; 1 without any.

        The table adds up small errors as if they were alone; together they also flip routers' choices (docs/LOG.md).
        """
        ratios = [s.kld / s.expected for s in self.settings if s.expected > 0]
        return float(np.median(ratios)) if ratios else 1.0

    def damage(self) -> Float64Array:
        """[L, E, n + 1]: expected KLD (nats per token) when that expert alone is always used at that level."""
        scaled: Float64Array = self.error * self.sensitivity[:, None, None] / max(1, self.n_tokens)
        return scaled

    def unit_damage(self, level: int) -> Float64Array:
        """[L, E]: nats that one use with gate weight 1 costs at `level` (an index; -1: skipped) above the level 0.

        A use with gate weight g costs g^2 times this. An expert the text never used gets its layer's median
        (PAPERS.md, section 5).
        """
        extra = np.maximum(0.0, self.error[..., level] - self.error[..., 0]) * self.sensitivity[:, None]
        used = self.squares > 0
        unit: Float64Array = np.divide(extra, self.squares, out=np.zeros_like(extra), where=used)
        for layer, row in enumerate(unit):
            seen = row[used[layer]]
            row[~used[layer]] = np.median(seen) if len(seen) else 0.0
        return unit
