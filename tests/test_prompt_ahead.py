"""Reading ahead for a prompt: what is fetched, what makes room for it, and that the bits stay stock's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.schedulers.cache import ExpertCache
from moe_edge.schedulers.eviction import RULES
from moe_edge.schedulers.layout import Layout, Step
from moe_edge.schedulers.lookahead.prompt import PROMPT_TOKENS, PromptAhead
from moe_edge.schedulers.lookahead.prompt_window import MOST_SHARE, PROMPT_SHARE, PromptSums, PromptWindow
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policy import make_policy
from random_models import Shape, write_random_model
from reference import logits_of_context, stock_logits

SIZE = 4096


def small_layout(n_layers: int = 3, n_experts: int = 64, n_levels: int = 1) -> Layout:
    return Layout((n_experts,) * n_layers, n_levels, (SIZE,) * (n_layers * n_experts * n_levels))


def prompt_step(layer: int, experts: list[int], n_tokens: int = PROMPT_TOKENS) -> Step:
    counts = [1 + expert % 5 for expert in experts]
    return Step(layer, experts, counts, [1.0] * len(experts), [1.0] * len(experts), n_tokens)


@pytest.mark.parametrize("rule", RULES)
def test_it_takes_free_room_and_its_share_and_evicts_nothing_in_use(rule: str) -> None:
    layout, n_places = small_layout(), 100
    policy = make_policy(PolicyOptions(cache=rule), layout, n_places * SIZE)
    for number in range(4):
        for layer in range(layout.n_layers):
            step = prompt_step(layer, list(range(64)))
            plan = policy.plan(step)
            assert step.later or layer == 2  # some rules learn after the last layer too
            free = n_places - policy.used_bytes // SIZE
            assert (free > 0) == (number == 0 and layer == 0)
            fetched = policy.meanwhile(step)
            own = set(layout.layer_units(layer))
            # of the last layer nothing is read before a micro-batch has used it
            share = PROMPT_SHARE * n_places if layer == 0 or (layer == 1 and number) else 0
            assert len(fetched) == min(free + share, n_places - len(own))
            assert sum(bool(victims) for _, victims in fetched) == len(fetched) - free
            for unit, victims in fetched:
                assert unit in layout.layer_units(layer + 1) and unit in policy.cache
                assert not own & set(victims)
            assert policy.used_bytes <= n_places * SIZE
            assert plan is None or len(plan.order) == 64


def test_the_most_used_of_the_micro_batch_before_come_first() -> None:
    layout = small_layout()
    cache = ExpertCache(layout, 100 * SIZE)
    ahead = PromptAhead(layout, cache)
    second = prompt_step(1, [3, 4, 9, 14])
    cache.note(second)
    ahead.note(second)
    first = prompt_step(0, [0, 1])
    cache.note(first)
    cache.reset((0, 1, *range(2, 36), *layout.layer_units(2)))  # full
    cache.note(first)
    # 4, 9 and 14 had five tokens each, 3 had four; experts that were not used are not read at all.
    assert [unit - 64 for unit, _ in ahead.fetch(first)] == [4, 9, 14]


def test_nothing_is_guessed_where_a_layer_uses_few_of_its_experts() -> None:
    layout = small_layout()
    cache = ExpertCache(layout, 100 * SIZE)
    step = prompt_step(0, list(range(47)))  # of 64: less than three of four
    cache.note(step)
    assert not PromptAhead(layout, cache).fetch(step)


def test_nothing_for_few_tokens_or_the_last_layer() -> None:
    layout = small_layout()
    ahead = PromptAhead(layout, ExpertCache(layout, 100 * SIZE))
    assert not ahead.wants(prompt_step(0, [1], PROMPT_TOKENS - 1))
    assert not ahead.wants(prompt_step(2, [1]))
    assert ahead.wants(prompt_step(1, [1]))


@pytest.mark.parametrize("used", [[], [5, 9]])
def test_of_the_last_layer_only_what_its_wanted_tokens_used_is_read(used: list[int]) -> None:
    """llama.cpp drops the tokens whose logits nobody wants before the last layer."""
    layout = small_layout()
    policy = make_policy(PolicyOptions(cache="lru"), layout, 100 * SIZE)
    everything = list(range(64))
    fetched: list[int] = []
    for _ in range(2):
        for layer in range(3):
            step = prompt_step(layer, everything) if layer < 2 else prompt_step(layer, used, n_tokens=bool(used))
            policy.plan(step)
            ahead = policy.meanwhile(step) if step.later else ()
            fetched += [unit - layout.first_unit[2] for unit, _ in ahead if unit >= layout.first_unit[2]]
        policy.reset(unit for unit in range(3 * 64) if unit in policy.cache and unit < layout.first_unit[2])
    assert sorted(fetched) == used


def test_the_window_is_what_the_disk_reads_between_two_layers() -> None:
    window = PromptWindow(1000)
    window.first_layer(PromptSums(5.0, 4.0, 1.0, 2.0, 700))  # whatever was before the prompt says nothing
    assert window.bytes == PROMPT_SHARE * 1000
    window.layer(PromptSums(6.0, 4.6, 1.2, 2.5, 750))  # 0.4 s between layers, 100 bytes a second
    assert window.bytes == pytest.approx(40)
    window.layer(PromptSums(7.0, 5.0, 1.4, 3.3, 830))
    assert window.bytes == pytest.approx(60)
    window.first_layer(PromptSums(27.0, 6.0, 1.9, 4.3, 930))
    assert window.bytes == pytest.approx(60)
    window.layer(PromptSums(28.0, 6.4, 1.9, 5.3, 1030))  # nothing was waited for
    assert window.bytes == pytest.approx(0.95 * 60)
    window.layer(PromptSums(29.0, 6.5, 2.8, 5.4, 1130))  # however much it is, this is the most
    assert window.bytes == MOST_SHARE * 1000
    for i in range(100):
        window.layer(PromptSums(30.0 + i, 6.5, 2.8, 5.4, 1130))
    assert window.bytes == PROMPT_SHARE * 1000


def test_a_prompt_that_waits_reads_more_ahead_until_a_token_is_decoded() -> None:
    layout = small_layout(n_layers=6)
    policy = make_policy(PolicyOptions(cache="lru"), layout, 200 * SIZE)
    clock = iter(range(100))

    def measure() -> PromptSums:  # four places a second are read; of ten seconds seven are between layers
        n = next(clock)
        return PromptSums(10.0 * n, 3.0 * n, 2.0 * n, 4.0 * n, 16 * n * SIZE)

    policy.measure_prompts(measure)

    def prompt() -> list[int]:
        counts = []
        for layer in range(6):
            policy.plan(step := prompt_step(layer, list(range(64))))
            counts.append(len(policy.meanwhile(step)))
        return counts

    prompt()
    assert prompt()[:5] == [28] * 5  # seven seconds of four places
    for layer in 2 * list(range(6)):
        policy.plan(Step(layer, [1], [1], [1.0], [1.0], 1))
    assert prompt()[0] == 6


def test_decoding_leaves_what_a_prompt_used_as_it_was() -> None:
    layout = small_layout()
    cache = ExpertCache(layout, 100 * SIZE)
    ahead = PromptAhead(layout, cache)
    for n_tokens, used in ((PROMPT_TOKENS, [4, 9]), (1, [50])):
        for layer in range(3):
            ahead.note(prompt_step(layer, used, n_tokens))
    step = prompt_step(1, [0])
    cache.note(step)
    assert [unit - layout.first_unit[2] for unit, _ in ahead.fetch(step)] == [4, 9]


def test_an_expert_in_memory_at_any_level_is_left_alone() -> None:
    layout = small_layout(n_levels=2)
    cache = ExpertCache(layout, 100 * SIZE)
    cache.reset([layout.first_unit[1] + 1, *list(layout.layer_units(2))[:99]])  # expert 0 of layer 1, low; full
    step = prompt_step(0, list(range(64)))
    cache.note(step)
    units = [unit for unit, _ in PromptAhead(layout, cache).fetch(step)]
    assert units == [layout.first_unit[1] + 2, layout.first_unit[1] + 4, layout.first_unit[1] + 6]


@pytest.mark.parametrize("rule", ["auto", "lru"])
def test_the_bits_are_stocks_while_it_reads_ahead(tmp_path: Path, rule: str) -> None:
    path = write_random_model(tmp_path / "wide.gguf", "olmoe", Shape(n_layer=4, n_expert=96, n_used=8))
    tokens = [(7 * i) % 200 + 1 for i in range(3 * PROMPT_TOKENS)]
    expected = stock_logits(path, tokens, PROMPT_TOKENS, 1, n_ctx=256)
    engine = open_engine(
        path, "middle", n_ctx=256, n_ubatch=PROMPT_TOKENS, n_threads=1, logits_all=True,
        policy=PolicyOptions(cache=rule),
    )  # fmt: skip
    with engine, engine.decoding():
        llama = engine.llama
        ours = logits_of_context(llama._ctx.ctx, llama._model.model, tokens, PROMPT_TOKENS)
        counters = engine.counters()
    assert np.array_equal(ours, expected)
    assert counters.prefetched > 0 and counters.evictions > 0
    assert counters.prefetch_useful > 0.8 * counters.prefetched
    assert counters.committed_bytes <= engine.plan.arena_bytes
