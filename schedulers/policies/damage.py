"""Ours: read what is worth its bytes. Every use gets the level with the least damage + price * bytes still to be read.

Damage of a use is the squared gate weight times the calibrated damage of that expert at that level, so the choice knows
which experts are fragile, which layers the loss feels, and what is in memory already; bits flow between layers and
tokens to where a byte saves most. Where the calibration knows what it costs, an expert may also be replaced by one in
memory that the router ranks lower: before the layer chooses, each is given the cheapest of being read high, read low,
replaced and skipped. It is the run-time form of the converter's allocation (convert/allocate.py), and the
rule of PAPERS.md, section 5: lower what has the least damage for each byte saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from moe_edge.models.calibration import Calibration
from moe_edge.models.errors import UsageError
from moe_edge.schedulers.layout import SKIP, Layout, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.options import LOW_LEVEL, REUSE, SHARED_KNOBS, Knob, PolicyOptions
from moe_edge.schedulers.policies.entry import PolicyEntry
from moe_edge.schedulers.policies.gates import gate_ratio, gate_weights, gate_weights_of
from moe_edge.schedulers.policies.levels import HIGH, LOW, IntArray, LevelPolicy
from moe_edge.schedulers.policies.reroute import history_warning

MIB = 1 << 20
FEW_TOKENS = 4  # in a prompt, experts that more tokens would read are not replaced
LOW_PERCENTS = (20, 40, 60, 80, 90, 95)  # of the uses, that go low at the prices which `--calibrate` measures

PRICE = Knob(
    "price", 0.001, "nats of expected KLD that reading a MiB must save",
    is_what="a price; give nats for each MiB, from 0 up",
)  # fmt: skip
SUBSTITUTE = Knob(
    "substitute", "auto", "another expert in memory may take an expert's place: auto (where that was calibrated), off",
    choices=("auto", "off"),
)  # fmt: skip


class DamagePolicy(LevelPolicy):
    """price: nats for each MiB read. Made by make_policy, which checks the options.

    What is in memory costs nothing: a high level there is always used, a low one is replaced when the damage it would
    do is worth the read. (Without `reuse` every level costs its bytes, as if nothing were in memory, and yet any
    expert may be a replacement: the most damage that a price can do.) With one level in the store the choice is
    between reading, replacing and skipping.
    replacements: the experts that took another's place in the present step.
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
        self.selects = _selects(options, calibration)
        self.replacements: set[int] = set()
        measured = calibration.substitution if self.selects else None
        self._factor = measured.factor.tolist() if measured else []  # [L][bins]
        self._gating = list(zip(measured.gates.tolist(), measured.scale.tolist(), strict=True)) if measured else []

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
        cheapest, layer, free = self._cheapest, step.layer, () if self._reuse else self.replacements
        return [
            HIGH if expert in free else cheapest(layer, expert, squares)[0]
            for expert, squares in zip(step.experts, step.squares, strict=True)
        ]

    def _cheapest(self, layer: int, expert: int, squares: float) -> tuple[int, float]:
        """(level, damage + price * bytes) of an expert whose squared gate weights sum to `squares`."""
        assert self._low_damage and self._skip_damage
        n_levels, sizes, price = self._layout.n_levels, self._layout.unit_bytes, self.price
        cache = self.cache if self._reuse else ()
        unit = self._layout.first_unit[layer] + expert * n_levels
        if unit in cache:
            return HIGH, 0.0
        level, least = HIGH, price * sizes[unit]
        if n_levels > 1:
            low = squares * self._low_damage[layer][expert]
            low += 0.0 if unit + LOW in cache else price * sizes[unit + LOW]
            if low < least:
                level, least = LOW, low
        if self._may_skip and squares * self._skip_damage[layer][expert] < least:
            return SKIP, squares * self._skip_damage[layer][expert]
        return level, least

    # ---- replacements

    def select(self, selection: Selection) -> Sequence[int] | None:
        layer, n_used, order, _, gates = selection
        self.replacements = set()
        kind, scale = self._gating[layer]
        costs = []  # (rank, weight, what is saved by a replacement), the lowest ranks first
        weights: list[float] = []
        for rank in range(n_used - 1, -1, -1):
            if not self._in_memory(layer, order[rank]):
                weights = weights or gate_weights(kind, scale, gates[:n_used])
                squares = weights[rank] * weights[rank]
                costs.append((rank, squares, self._cheapest(layer, order[rank], squares)[1]))
        if not costs:
            return None
        chosen, other = list(order[:n_used]), n_used
        for rank, squares, saved in costs:
            while other < len(order) and not self._at_hand(layer, order[other]):
                other += 1
            if other >= len(order):
                break
            ratio = gate_ratio(kind, gates[other], gates[rank])
            damage = self._damage_of(layer, order[rank], order[other], squares, ratio)
            if damage < saved:
                chosen[rank] = order[other]
                self._count_replacement(order[other], damage)
                other += 1
        return chosen if self.replacements else None

    def select_many(self, selections: Selections) -> IntArray | None:
        """Expert by expert, those of few tokens: all of its tokens get another one, or none."""
        layer, n_used, order, _, gates = selections
        self.replacements = set()
        counts = np.bincount(order[:, :n_used].ravel(), minlength=order.shape[1])
        few = np.flatnonzero((counts > 0) & (counts <= FEW_TOKENS)).tolist()
        few = [expert for expert in few if not self._in_memory(layer, expert)]
        if gates is None or not few:
            return None
        kind, scale = self._gating[layer]
        at_hand = counts > FEW_TOKENS
        at_hand |= np.array([self._at_hand(layer, expert) for expert in range(len(at_hand))])
        chosen: IntArray = order[:, :n_used].copy()
        own = np.take_along_axis(gates, chosen, 1).astype(np.float64)
        squares = np.square(gate_weights_of(kind, scale, own))
        for expert in sorted(few, key=lambda e: (counts[e], e)):
            tokens, slots = np.nonzero(chosen == expert)
            found: list[tuple[int, int, int]] = []
            total = 0.0
            for t, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
                other = next((e for e in order[t, n_used:].tolist() if at_hand[e] and e not in chosen[t]), None)
                if other is None:
                    break
                ratio = gate_ratio(kind, float(gates[t, other]), float(gates[t, expert]))
                total += self._damage_of(layer, expert, other, float(squares[t, slot]), ratio)
                found.append((t, slot, other))
            every = float(squares[tokens, slots].sum())
            if len(found) == len(tokens) and total < self._cheapest(layer, expert, every)[1]:
                for t, slot, other in found:
                    chosen[t, slot] = other
                    self._count_replacement(other, total / len(found))
        return chosen if self.replacements else None

    def _in_memory(self, layer: int, expert: int) -> bool:
        return self._reuse and self._layout.first_unit[layer] + expert * self._layout.n_levels in self.cache

    def _at_hand(self, layer: int, expert: int) -> bool:
        """Whether an expert can take another's place without a read."""
        if not self._reuse:
            return True
        unit = self._layout.first_unit[layer] + expert * self._layout.n_levels
        return unit in self.cache or (self._layout.n_levels > 1 and unit + LOW in self.cache)

    def _damage_of(self, layer: int, expert: int, other: int, squares: float, ratio: float) -> float:
        """Of giving an expert's use, with this squared gate weight, to another one, as that is in memory."""
        assert self._low_damage and self._skip_damage
        factors = self._factor[layer]
        factor = float(factors[min(len(factors) - 1, int(ratio * len(factors)))])
        damage: float = squares * self._skip_damage[layer][expert] * factor
        if self._reuse and not self._in_memory(layer, other) and self._layout.n_levels > 1:
            damage += squares * ratio * ratio * self._low_damage[layer][other]
        return damage

    def _count_replacement(self, other: int, damage: float) -> None:
        self.replacements.add(other)
        self.stats.substituted += 1
        if self.stats.expected_damage is not None:
            self.stats.expected_damage += damage


def _selects(options: PolicyOptions, calibration: Calibration | None) -> bool:
    return options[SUBSTITUTE] == "auto" and calibration is not None and calibration.substitution is not None


def _warning(options: PolicyOptions, calibration: Calibration | None) -> str:
    return history_warning(options, calibration) if _selects(options, calibration) else ""


def _describe(options: PolicyOptions, calibration: Calibration | None) -> str:
    if _selects(options, calibration):
        replaced = "experts may be replaced"
    elif options[SUBSTITUTE] == "off":
        replaced = "no expert is replaced"
    else:
        replaced = "no expert is replaced, as this calibration does not know what that costs"
    return f"damage, price {options[PRICE]:.3g} nats/MiB, the rest {options[LOW_LEVEL]}, {replaced}"


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
    DamagePolicy, knobs=(PRICE, SUBSTITUTE, *SHARED_KNOBS), describe=_describe, main_knob=PRICE, settings=_settings,
    selects=_selects, warning=_warning,
)  # fmt: skip
