"""Usage of experts over runs: counts, fading, and what is read before the first token."""

from __future__ import annotations

import pytest
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.usage import HALF_LIFE_TOKENS, Usage, preload_order
from test_eviction import ONE, run, step

# ---- usage -------------------------------------------------------------------------------------------------


def test_usage_counts_tokens_and_uses() -> None:
    usage = Usage((4, 4))
    for asked in (step(0, [0, 1], 3, [3, 1]), step(1, [2], 3), step(0, [0]), step(1, [3])):
        usage.note(asked)
    assert (usage.tokens, usage.counts) == (4, [4, 1, 0, 0, 0, 0, 3, 1])
    assert usage.rates() == [1, 0.25, 0, 0, 0, 0, 0.75, 0.25]
    assert Usage((4, 4)).rates() == [0.0] * 8


def test_usage_of_earlier_runs_fades() -> None:
    usage = Usage((2,), [100.0, 50.0], 100.0)
    n = int(HALF_LIFE_TOKENS)
    usage.note(step(0, [1], n))
    assert (usage.tokens, usage.counts) == (50 + n, [50, 25 + n])
    with pytest.raises(ValueError, match="3 counts for 2 experts"):
        Usage((2,), [1.0, 2.0, 3.0])


def test_the_cache_counts_usage_and_starts_from_it() -> None:
    usage = Usage(ONE.n_experts)
    run(ExpertCache(ONE, 80, count=usage), [0], [1], [1], [1])
    assert usage.counts[:2] == [1, 3]
    for rule in ("decayed", "next-use", "learned"):
        cache = ExpertCache(ONE, 20, rule, usage=usage)
        cache.reset([1, 0])
        assert run(cache, [2]) == [0]  # without usage 1, which was named first
        cache.reset([1, 0])
        assert run(cache, [2]) == [0]


def test_preload_takes_the_most_used_that_fit() -> None:
    layout = Layout((4,), 2, (10, 4, 30, 4, 10, 4, 10, 4))
    usage = Usage((4,), [2.0, 9.0, 0.0, 5.0], 10.0)
    assert preload_order(usage, layout, 40) == [2, 6]
    assert preload_order(usage, layout, 25) == [6, 0]  # the most used one has 30 bytes
    assert preload_order(usage, layout, 1000) == [2, 6, 0]  # 4 was never used
    assert preload_order(Usage((4,)), layout, 1000) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_a_token_changes_nothing_and_breaks_nothing(rule: str) -> None:
    """llama.cpp gives the last layer no rows when a micro-batch wants no logits."""
    cache = ExpertCache(Layout((4, 4), 1, (10,) * 8), 40, rule)
    for layer in (0, 1):
        cache.note(Step(layer, [1], [1], [1.0], [1.0], 1))
        assert cache.add(4 * layer + 1) == []
    cache.note(Step(1, [], [], [], [], 0))
    cache.note(Step(0, [2, 3], [1, 1], [0.5, 0.5], [0.25, 0.25], 1))
    assert cache.add(2) == [] and cache.add(3) == [] and cache.used_bytes == 40
