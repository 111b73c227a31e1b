"""How many experts of a layer a prompt's micro-batch touches, as seen in earlier prompts or in a trace.

Tokens that choose their experts at random touch nearly all of them at once; real routing is narrower, and by how much
differs from model to model. So it is counted, by the size of the micro-batch, and the few numbers are kept. Counts
only; runner/touched_file.py keeps the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moe_edge.schedulers.layout import Step
from moe_edge.schedulers.replay.trace import NO_EXPERT, Trace

LEAST_TOKENS = 32  # of a micro-batch that is counted
MOST_STEPS = 4096.0  # of one size, beyond which older ones count half
TRACE_TOKENS = 2048  # the largest micro-batch that is looked at in a trace


class Touched:
    """Sums over the steps of micro-batches of 2^b to 2^(b+1) - 1 tokens, for each b.

    sums: b -> (steps, tokens, experts touched, experts there were), each summed over the steps. Steps of the last layer
    are left out by whoever notes them: llama.cpp gives it only the tokens whose logits are wanted.
    """

    def __init__(self, sums: Mapping[int, tuple[float, float, float, float]] | None = None) -> None:
        self.sums = dict(sums or {})
        self.noted = 0  # steps of this run

    def note(self, step: Step, n_experts: int) -> None:
        """Count a step of a layer of n_experts; steps of few tokens are left alone."""
        self._add(step.n_tokens, len(step.experts), n_experts)

    def _add(self, n_tokens: int, touched: int, n_experts: int) -> None:
        if n_tokens < LEAST_TOKENS:
            return
        size = n_tokens.bit_length() - 1
        steps, tokens, found, there = self.sums.get(size, (0.0, 0.0, 0.0, 0.0))
        if steps >= MOST_STEPS:
            steps, tokens, found, there = steps / 2, tokens / 2, found / 2, there / 2
        self.sums[size] = steps + 1, tokens + n_tokens, found + touched, there + n_experts
        self.noted += 1

    def share(self, n_tokens: int, used_share: float) -> float | None:
        """The share of a layer's experts that n_tokens tokens touch; None where nothing was counted.

        used_share: of a token, top_k / n_experts. From the nearest size that was counted, by the share of the experts
        that would be touched alike by as many tokens that draw from those alone.
        """
        if not self.sums:
            return None
        at = math.log2(max(n_tokens, 1))
        steps, tokens, found, there = min(self.sums.values(), key=lambda s: abs(at - math.log2(s[1] / s[0])))
        drawn_from = effective_share(found / there, tokens / steps, used_share)
        return drawn_share(drawn_from, n_tokens, used_share)


def drawn_share(drawn_from: float, n_tokens: float, used_share: float) -> float:
    """The share of all experts touched by n_tokens independent tokens that draw used_share from drawn_from of them."""
    return float(drawn_from * (1 - (1 - min(1.0, used_share / drawn_from)) ** n_tokens))


def effective_share(touched: float, n_tokens: float, used_share: float) -> float:
    """The drawn_from of drawn_share() that gives `touched`: at least a token's own, at most all."""
    low, high = min(used_share, 1.0), 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if drawn_share(middle, n_tokens, used_share) < touched:
            low = middle
        else:
            high = middle
    return high


def touched_in(trace: Trace) -> Touched:
    """Counts of a trace's tokens in a row, as if they came in prompts of 32, 64, ... tokens; not the last layer's."""
    touched = Touched()
    for layer, n_experts in enumerate(trace.n_experts[:-1]):
        rows = trace.experts[:, layer]
        rows = rows[(rows != NO_EXPERT).all(axis=1)]
        n_tokens = LEAST_TOKENS
        while n_tokens <= min(TRACE_TOKENS, len(rows)):
            for at in range(0, len(rows) - n_tokens + 1, n_tokens):
                touched._add(n_tokens, len(set(rows[at : at + n_tokens].ravel().tolist())), n_experts)
            n_tokens *= 2
    return touched
