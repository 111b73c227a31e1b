"""A second turn evaluates what is new, in models that can forget the end of a conversation and in those that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from every_architecture import write_tiny_model
from moe_edge.models.errors import EngineError
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Generation, Sampling, generate
from moe_edge.runner.kv.rollback import (
    BEFORE_END,
    FEWEST,
    MOST,
    SHARE_BYTES,
    Checkpoint,
    Checkpoints,
    checkpoints_bytes,
)
from moe_edge.runner.kv.rollback import how_many as n_kept
from moe_edge.runner.prove import NOTHING

RECURRENT = ("qwen3next", "qwen35moe", "lfm2moe", "granitehybrid", "kimi-linear", "nemotron_h_moe")
WINDOW = ("gpt-oss", "step35", "gemma4")  # of sliding attention
ATTENTION = ("qwen3moe", *WINDOW)
GREEDY = Sampling(temp=0)
N_REPLY = 12


def words(seed: int, n: int) -> list[int]:
    return [(7 * i * i + 3 + 11 * seed) % 290 for i in range(n)]


def opened(folder: Path, arch: str, **more: Any) -> Engine:
    path = folder / f"{arch}.gguf"
    if not path.exists():
        write_tiny_model(path, arch)
    options: dict[str, Any] = {
        "ram_bytes": 1 << 30, "n_threads": 1, "n_ctx": 256, "n_ubatch": 16, "flash_attn": False, "proof": NOTHING,
    }  # fmt: skip
    return Engine(path, EngineOptions(**{**options, **more}))


def reply(engine: Engine, tokens: list[int]) -> tuple[Generation, list[int]]:
    """A greedy reply, and its tokens, of which the last one is not evaluated."""
    result = generate(engine, tokens, N_REPLY, GREEDY, ignore_end=True)
    return result, engine.llama.input_ids[len(tokens) : engine.llama.n_tokens].tolist()


@pytest.mark.parametrize("arch", RECURRENT + ATTENTION)
@pytest.mark.parametrize("thinks", [False, True])
def test_a_second_turn_evaluates_the_new_tokens(tmp_path: Path, arch: str, thinks: bool) -> None:
    """thinks: the reply is not in the second prompt as it was made, so the conversation parts where the reply began."""
    first = words(0, 70)
    with opened(tmp_path, arch) as engine:
        made = reply(engine, first)[1]
        said = made[6:] if thinks else made
        second = first + said + words(1, 20)
        result, again = reply(engine, second)
        most = len(said) + 20 + BEFORE_END if thinks else 20
        assert result.prompt_tokens - result.reused_tokens <= most
    with opened(tmp_path, arch) as engine:
        whole, fresh = reply(engine, second)
        assert whole.reused_tokens == 0
        assert (result.text, again) == (whole.text, fresh)


@pytest.mark.parametrize("arch", RECURRENT)
def test_a_prefix_that_two_conversations_share_is_evaluated_twice_at_most(tmp_path: Path, arch: str) -> None:
    system = words(0, 50)
    with opened(tmp_path, arch) as engine:
        assert reply(engine, system + words(1, 30))[0].reused_tokens == 0
        assert reply(engine, system + words(2, 30))[0].reused_tokens == 0
        third, made = reply(engine, system + words(3, 30))
        assert third.reused_tokens >= 50
    with opened(tmp_path, arch) as engine:
        assert reply(engine, system + words(3, 30))[1] == made


@pytest.mark.parametrize("arch", ["qwen3next", "lfm2moe", "qwen3moe"])
def test_after_a_failed_decode_the_conversation_goes_on_from_where_it_was(tmp_path: Path, arch: str) -> None:
    first = words(0, 70)
    with opened(tmp_path, arch) as engine:
        made = reply(engine, first)[1]
        second = first + made + words(1, 40)
        plan = engine.native.schedule

        def fails(*_: Any) -> Any:
            raise EngineError("the disk is gone")

        engine.native.schedule = fails
        with pytest.raises(EngineError, match="the disk is gone"):
            reply(engine, second)
        engine.native.schedule = plan
        result, again = reply(engine, second)
        assert result.reused_tokens == len(first) + len(made)
    with opened(tmp_path, arch) as engine:
        assert reply(engine, second)[1] == again


def test_other_models_take_no_copies(tmp_path: Path) -> None:
    with opened(tmp_path, "qwen3moe") as engine:
        reply(engine, words(0, 70))
        assert engine.checkpoints.kept == []


def test_the_plan_counts_the_copies_and_they_stay_within_it(tmp_path: Path) -> None:
    with opened(tmp_path, "qwen3next") as engine:
        text = words(0, 20)
        for turn in range(12):
            text += reply(engine, text)[1][:5] + words(turn, 4)
        kept = engine.checkpoints.kept
        assert len(kept) == MOST
        assert 0 < sum(len(each.copy) for each in kept) <= engine.plan.fixed.kv_bytes


def test_the_bound_follows_from_the_size_of_a_state() -> None:
    assert n_kept(1) == MOST and n_kept(SHARE_BYTES // 3) == 3 and n_kept(SHARE_BYTES) == FEWEST
    assert checkpoints_bytes(0) == 0
    assert checkpoints_bytes(75 << 20) == 3 * (75 << 20)


def test_the_beginning_and_the_end_stay_when_copies_must_go() -> None:
    class Llama:
        _is_recurrent = _is_hybrid = True

    kept = Checkpoints(Llama())
    kept.kept = [Checkpoint(n, b"x") for n in (10, 50, 55, 90, 100)]
    kept._drop_one()
    assert [each.n_tokens for each in kept.kept] == [10, 50, 90, 100]
    assert kept.before(60) == 50 and kept.before(9) == 0
    kept.forget_after(60)
    assert [each.n_tokens for each in kept.kept] == [10, 50]
