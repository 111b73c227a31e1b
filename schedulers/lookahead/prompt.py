"""Reading for the next layer of a prompt while this layer's last experts and the next attention are computed.

A micro-batch of many tokens uses nearly every expert of every layer, so what the next layer needs is known without a
prediction, and a disk that would idle through the attention reads it. What is read so takes free room in the arena, and
beyond that a small share of it (prompt_window.py). Exact, as all look-ahead is: it changes when bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.layout import Layout, Prefetch, Step
from moe_edge.schedulers.lookahead.prompt_window import PromptSums, PromptWindow

# From so many tokens on, a prompt's micro-batch uses about nine of ten experts of a layer (issue 5, part A).
PROMPT_TOKENS = 64
# The share of this layer's experts that this micro-batch must use for the next layer's to be read unseen. Attention
# hides a fifth of a layer's bytes or less, of which a quarter may be in vain: 5 % more bytes at most.
NEARLY_ALL = 0.75


class PromptAhead:
    """What to read of the next layer, for one cache. fetch() is for steps of PROMPT_TOKENS or more.

    The experts that the micro-batch before used most come first. The first one has none before it: there they come in
    the order of their numbers, as the step itself would read them, and only where this layer used most of what it has.
    The last layer is not guessed at: llama.cpp gives it only the tokens whose logits are wanted, mostly one or none.

    measure: gives the engine's sums, asked once a layer; set by whoever runs it. Without it the window stays as it
    begins, so that a replay of a trace repeats what was done.
    """

    def __init__(self, layout: Layout, cache: ExpertCache) -> None:
        self._layout, self._cache = layout, cache
        self.measure: Callable[[], PromptSums] | None = None
        self._window = PromptWindow(cache.arena_bytes)
        self._counts: dict[int, dict[int, int]] = {}  # layer -> expert -> tokens of the latest micro-batch
        self._in_prompt = False  # whether the step before was of many tokens

    def note(self, step: Step) -> None:
        """Remember what a prompt's micro-batch used of this layer; of the last one also when it has few tokens left."""
        many = step.n_tokens >= PROMPT_TOKENS
        if many or (self._in_prompt and step.layer + 1 == self._layout.n_layers):
            self._counts[step.layer] = dict(zip(step.experts, step.counts, strict=True))
        if not many and not self._in_prompt:
            self._window.begin()  # a token was decoded: the next prompt may have another length
        self._in_prompt = many

    def wants(self, step: Step) -> bool:
        """Whether fetch() has anything to do for this step, asked before it is planned."""
        return step.n_tokens >= PROMPT_TOKENS and step.layer + 1 < self._layout.n_layers

    def fetch(self, step: Step) -> list[Prefetch]:
        """Units of the next layer to read now, in this order. The step must be the one that the cache noted last."""
        layout, layer = self._layout, step.layer + 1
        if self.measure is not None:
            (self._window.layer if step.layer else self._window.first_layer)(self.measure())
        experts: list[int]
        if layer in self._counts:
            counts = self._counts[layer]
            experts = sorted(counts, key=lambda expert: -counts[expert])
        elif layer + 1 < layout.n_layers and len(step.experts) >= NEARLY_ALL * layout.n_experts[step.layer]:
            experts = list(range(layout.n_experts[layer]))
        else:
            return []
        first, n_levels = layout.first_unit[layer], layout.n_levels
        absent = [
            first + expert * n_levels
            for expert in experts
            if not any(first + expert * n_levels + level in self._cache for level in range(n_levels))
        ]
        added = self._cache.add_ahead(absent, self._window.bytes)
        return [Prefetch(unit, victims) for unit, victims in added]
