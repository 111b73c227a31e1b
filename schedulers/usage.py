"""How often each expert is used: lately (DecayedUses, for eviction), and in the long run (Usage, to start from later).

Counts only; runner/warm.py keeps the file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from moe_edge.schedulers.layout import Layout, Step

HALF_LIFE_TOKENS = 16384.0  # of what earlier runs used; a few long conversations
SEED_TOKENS = 2.0  # what earlier runs used counts as this many tokens at the start
SMALLEST_SCALE, LARGEST_GAIN = 2.0**-512, 2.0**400  # powers of 2: scaling by them rounds nothing


class Usage:
    """Uses of every expert by tokens: those of earlier runs, decayed, and those of this one.

    n_experts: of each MoE layer. counts: [sum of n_experts], layer by layer; tokens: how many were counted.
    """

    def __init__(self, n_experts: Sequence[int], counts: Sequence[float] = (), tokens: float = 0.0) -> None:
        self.n_experts = tuple(n_experts)
        total = sum(self.n_experts)
        if len(counts) not in (0, total):
            raise ValueError(f"{len(counts)} counts for {total} experts")
        self._before, self._tokens_before = list(counts) or [0.0] * total, tokens
        self._first = [sum(self.n_experts[:layer]) for layer in range(len(self.n_experts))]
        self._now = [0] * total
        self._tokens_now, self._layer = 0, len(self.n_experts)

    def note(self, step: Step) -> None:
        """Count one step."""
        if step.layer <= self._layer:
            self._tokens_now += step.n_tokens
        self._layer = step.layer
        now, first = self._now, self._first[step.layer]
        for expert, count in zip(step.experts, step.counts, strict=True):
            now[first + expert] += count

    @property
    def tokens_now(self) -> int:
        """Tokens counted in this run."""
        return self._tokens_now

    @property
    def tokens(self) -> float:
        """Tokens counted, those of earlier runs decayed by what came since."""
        return self._tokens_before * self._faded + self._tokens_now

    @property
    def counts(self) -> list[float]:
        """Uses of each expert, decayed alike."""
        faded = self._faded
        return [before * faded + now for before, now in zip(self._before, self._now, strict=True)]

    def rates(self) -> list[float]:
        """The share of the tokens that used each expert, 0 to 1; zeros before the first token."""
        tokens = self.tokens
        return [min(1.0, count / tokens) for count in self.counts] if tokens > 0 else [0.0] * len(self._now)

    @property
    def _faded(self) -> float:
        return float(0.5 ** (self._tokens_now / HALF_LIFE_TOKENS))


class DecayedUses:
    """Uses of every expert, in memory or not, each worth half as much after half_life tokens.

    score[i] is the decayed sum times the `gain` of its layer, so that it changes only when its expert is used: dividing
    all of a layer by the same number orders nothing anew. Each layer has a clock of its own, since a prompt's
    micro-batch brings hundreds of tokens at once: the layers it has not come to yet would look as if nobody had used
    them for all that time, just before all of their experts are needed.
    A step of n tokens counts as n tokens that each use the expert alike.
    """

    def __init__(self, layout: Layout, half_life: float, usage: Usage | None = None) -> None:
        self.half_life = half_life
        self.first_expert = [unit // layout.n_levels for unit in layout.first_unit]
        self._n_experts = layout.n_experts
        self.layer_of = [layer for layer, n in enumerate(layout.n_experts) for _ in range(n)]
        self._decay: float = 0.5 ** (1 / half_life)
        self._usage = usage
        self.rescaled: Callable[[int], None] = lambda layer: None  # called when all scores of a layer have changed
        self.reset()

    def reset(self) -> None:
        """Forget the uses, but for what an earlier run is known to have used."""
        self.score = array("d", bytes(8 * len(self.layer_of)))  # an array, so that numpy can look at it as it is
        if self._usage is not None:
            self.score = array("d", [SEED_TOKENS * rate for rate in self._usage.rates()])
        self.gain = [1.0] * len(self._n_experts)
        self.scale = [1 - self._decay] * len(self._n_experts)  # score * scale: the chance of a use by a token

    def rate(self, expert: int) -> float:
        """The estimated chance that a token uses this expert, numbered over all layers."""
        return self.score[expert] * self.scale[self.layer_of[expert]]

    def note(self, step: Step) -> None:
        n, layer = step.n_tokens, step.layer
        if n < 1:  # the last layer of a micro-batch whose logits nobody wants
            return
        self.gain[layer] = gain = self.gain[layer] * 2 ** min(n / self.half_life, 512.0)
        if gain > LARGEST_GAIN:
            self.gain[layer] = gain = gain * SMALLEST_SCALE
            self._scale_down(layer)
        self.scale[layer] = (1 - self._decay) / gain
        score, first = self.score, self.first_expert[layer]
        if n == 1:
            for expert in step.experts:
                score[first + expert] += gain
        else:
            gain *= (1 - self._decay**n) / (1 - self._decay) / n
            for expert, count in zip(step.experts, step.counts, strict=True):
                score[first + expert] += gain * count

    def _scale_down(self, layer: int) -> None:
        first = self.first_expert[layer]
        for expert in range(first, first + self._n_experts[layer]):
            self.score[expert] *= SMALLEST_SCALE
        self.rescaled(layer)


def preload_order(usage: Usage, layout: Layout, arena_bytes: int) -> list[int]:
    """High-level units to read before the first token: the most used experts that fit, the most used first.

    By uses alone: units of one level are alike in size, and bytes do not change what a use would save a byte. Ties go
    to the lower unit. Experts that were never used are left out. Give the result reversed to reset().
    """
    rates, units = usage.rates(), range(0, len(layout.unit_bytes), layout.n_levels)
    chosen, left = [], arena_bytes
    for unit in sorted(units, key=lambda unit: -rates[unit // layout.n_levels]):
        if rates[unit // layout.n_levels] <= 0:
            break
        if layout.unit_bytes[unit] <= left:
            chosen.append(unit)
            left -= layout.unit_bytes[unit]
    return chosen
