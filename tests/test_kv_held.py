"""Conversations side by side in memory: each has the bits that it would have alone, whatever else is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import BudgetTooSmall
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.kv.held import SHARE, auto_bytes
from moe_edge.runner.kv.prompt_cache import LEAST_TOKENS
from moe_edge.runner.kv.reuse import Known, reuse_of
from moe_edge.runner.kv.state_file import read_header
from moe_edge.runner.llama import window_is_kept
from moe_edge.runner.protocol import Request
from moe_edge.runner.prove import NOTHING
from moe_edge.runner.sampling import Sampling
from moe_edge.runner.serve.engine_model import EngineModel
from moe_edge.runner.serve.metrics import NUMBERS
from moe_edge.schedulers.budget import MIB
from random_models import write_random_model
from test_every_architecture import last_logits
from test_kv_checkpoints import opened, reply, words
from test_kv_disk import files, own_cache, with_cache

ARCHITECTURES = ("qwen3moe", "gpt-oss", "gemma4", "lfm2moe", "qwen35moe", "qwen3next", "nemotron_h_moe", "deepseek2")
WINDOWS = (
    "afmoe", "cohere2moe", "exaone-moe", "gemma4", "gpt-oss", "granite_swa", "laguna", "maple", "mellum", "mimo2",
    "step35",
)  # fmt: skip
__all__ = ["own_cache"]


def held(folder: Path, arch: str, **more: Any) -> Engine:
    return opened(folder, arch, **{"held_bytes": 64 * MIB, **more})


def talk(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], Any]]:
    """(tokens of the reply, logits at its end) for each prompt."""
    found = []
    for prompt in prompts:
        made = reply(engine, prompt)[1]
        found.append((made, last_logits(engine).copy()))
    return found


def turns(seed: int, system: list[int], n: int = 3) -> list[list[int]]:
    """The prompts of a conversation, each the last one with words in the place of the reply. Nothing of them depends on
    what a model says."""
    text, found = list(system), []
    for turn in range(n):
        text = text + words(100 * seed + turn, 40 + 7 * turn)
        found.append(text)
        text = text + words(100 * seed + 50 + turn, 9)
    return found


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_conversation_has_the_bits_that_it_has_alone(tmp_path: Path, arch: str, flash: bool) -> None:
    """Three clients in turns, two of them with one system prompt; evictions of experts are forced."""
    system = words(7, 50)
    talks = [turns(1, system), turns(2, system), turns(3, [])]
    alone = []
    for each in talks:
        with held(tmp_path, arch, flash_attn=flash, n_ctx=512) as engine:
            alone.append(talk(engine, each))
            floor = engine.plan.floor_bytes
    with held(tmp_path, arch, flash_attn=flash, n_ctx=512, ram_bytes=floor) as engine:
        together: list[list[Any]] = [[], [], []]
        reused = 0
        for turn in range(3):
            for client, each in enumerate(talks):
                result, made = reply(engine, each[turn])
                together[client].append((made, last_logits(engine).copy()))
                if turn:
                    reused += result.reused_tokens
        assert engine.counters().evictions > 0 or engine.plan.arena_bytes == engine.layout.total_bytes
        assert engine.held is not None and len(engine.held.copies) == 2 and engine.held.n_restored >= 6
        assert reused >= sum(len(each[turn - 1]) for each in talks for turn in (1, 2)) - 6 * 4
        assert engine.held.nbytes <= engine.held.limit_bytes
    for mine, theirs in zip(alone, together, strict=True):
        for (made, logits), (made_there, logits_there) in zip(mine, theirs, strict=True):
            assert made == made_there and np.array_equal(logits, logits_there)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", WINDOWS)
def test_a_copied_window_can_be_cut_anywhere(tmp_path: Path, arch: str, flash: bool) -> None:
    """Where templates drop the thinking, far behind the window's last cells; over 512 cells, which flash attention
    splits among two threads. Another conversation ran in between."""
    more: dict[str, Any] = {"flash_attn": flash, "n_ctx": 1024, "n_ubatch": 64, "n_threads": 2}
    first, other = words(1, 600), words(2, 300)
    cuts = (*first[:597], *words(3, 70)), (*first, *words(4, 9), *words(5, 70))
    for second in cuts:
        found = []
        for between in (False, True):
            with held(tmp_path, arch, **more) as engine:
                made = reply(engine, first)[1]
                if between:
                    reply(engine, other)
                result, again = reply(engine, list(second))
                assert result.reused_tokens in (597, 600) and engine.held is not None
                assert engine.held.n_restored == between
                found.append((made, again, last_logits(engine).copy()))
        assert found[0][:2] == found[1][:2] and np.array_equal(found[0][2], found[1][2])


@pytest.mark.parametrize("arch", ["gpt-oss", "gemma4"])
@pytest.mark.parametrize("flash", [False, True])
def test_a_window_that_went_to_the_disk_has_the_bits_that_it_had(
    tmp_path: Path, arch: str, flash: bool, own_cache: Path
) -> None:
    """Two conversations in turns with memory for none of them, in one process and in the next one; cut and whole."""
    talks = [turns(1, words(7, 90), 4), turns(2, words(8, 80), 4)]
    more: dict[str, Any] = {"flash_attn": flash, "n_ctx": 512}
    alone = []
    for each in talks:
        with held(tmp_path, arch, **more) as engine:
            alone.append(talk(engine, each))
    found: list[list[Any]] = [[], []]
    for two in (0, 2):
        with with_cache(tmp_path, arch, held_bytes=1000, **more) as engine:
            for turn in (two, two + 1):
                for client, each in enumerate(talks):
                    result, made = reply(engine, each[turn])
                    assert result.reused_tokens >= (len(each[turn - 1]) if turn else 0)
                    found[client].append((made, last_logits(engine).copy()))
            assert engine.held is not None and not engine.held.copies
    for mine, theirs in zip(alone, found, strict=True):
        for (made, logits), (made_there, logits_there) in zip(mine, theirs, strict=True):
            assert made == made_there and np.array_equal(logits, logits_there)


@pytest.mark.parametrize("more", [{"_is_recurrent": True}, {"architecture": "dots3note"}])
def test_a_window_that_cannot_be_copied_whole_is_refused_by_one_sentence(
    tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path, "gpt-oss") as engine:
        llama = engine.llama
        assert window_is_kept(llama)
        if "architecture" in more:
            llama.metadata["general.architecture"] = more["architecture"]
        else:
            llama._is_recurrent = True
        assert not window_is_kept(llama)
    monkeypatch.setattr("moe_edge.runner.sizes.window_is_kept", lambda *_: False)
    said: list[str] = []
    options = EngineOptions(ram_bytes=1 << 30, n_ctx=256, held_bytes=MIB, proof=NOTHING)
    with Engine(tmp_path / "gpt-oss.gguf", options, tell=said.append) as engine:
        assert engine.held is None and engine.plan.fixed.held_bytes == 0
    assert [line for line in said if "not held" in line] == [
        "conversations are not held in memory: this model's sliding window cannot be copied whole"
    ]


def test_a_shared_system_prompt_is_evaluated_once(tmp_path: Path) -> None:
    system = words(7, 70)
    for arch in ("qwen3moe", "qwen3next", "gpt-oss"):
        with held(tmp_path, arch) as engine:
            reply(engine, system + words(1, 30))
            second = reply(engine, system + words(2, 30))[0]
            third = reply(engine, system + words(3, 30))[0]
            shared = 70 // 16 * 16  # whole micro-batches
            assert second.reused_tokens == (0 if arch == "qwen3next" else shared) and third.reused_tokens == shared
            assert engine.held is not None and engine.held.n_conversations == 3


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "gemma4"])
def test_the_copy_used_longest_ago_goes_to_the_disk_and_comes_back(tmp_path: Path, own_cache: Path, arch: str) -> None:
    with with_cache(tmp_path, arch, held_bytes=64 * MIB) as engine:
        reply(engine, words(1, 70))
        assert engine.held is not None
        engine.held.park()
        size = engine.held.nbytes
    for path in files(own_cache):
        path.unlink()
    with with_cache(tmp_path, arch, held_bytes=int(2.5 * size)) as engine:
        kept = engine.held
        assert kept is not None
        made = [reply(engine, words(client, 70))[1] for client in (1, 2, 3)]
        assert len(kept.copies) == 2 and not files(own_cache)
        reply(engine, words(4, 70))
        assert len(kept.copies) == 2 and kept.n_spilled == 1 and len(files(own_cache)) == 1
        [path] = files(own_cache)
        assert read_header(path).tokens[:70].tolist() == words(1, 70)
        again = reply(engine, words(1, 70) + made[0] + words(9, 20))[0]
        assert again.reused_tokens == 70 + len(made[0]) and kept.n_restored == 0
    assert len(files(own_cache)) >= 4  # at the end everything that pays is kept


def test_a_spilled_file_is_the_one_that_would_have_been_written_at_once(tmp_path: Path, own_cache: Path) -> None:
    for arch in ("qwen3moe", "qwen3next", "gpt-oss", "gemma4"):
        with with_cache(tmp_path, arch, held_bytes=64 * MIB) as engine:
            reply(engine, words(1, 70))
            assert engine.held is not None and engine.prompts is not None
            engine.held.park()
            engine.prompts.store()
            [path] = files(own_cache)
            whole = path.read_bytes()
            path.unlink()
            engine.held.close()
            assert files(own_cache) == [path] and path.read_bytes() == whole
            path.unlink()
        for path in files(own_cache):
            path.unlink()


def test_memory_is_planned_and_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with held(tmp_path, "qwen3moe", held_bytes=0) as plain:
        floor, plan = plain.plan.floor_bytes, plain.plan
        assert plain.held is None
    with pytest.raises(BudgetTooSmall, match=r"conversations 64\.0 MiB"):
        held(tmp_path, "qwen3moe", ram_bytes=floor + 9 * MIB)
    with held(tmp_path, "qwen3moe", held_bytes=None, ram_bytes=floor + MIB) as engine:
        nbytes = engine.plan.fixed.held_bytes
        assert nbytes == auto_bytes(plan.fixed.kv_bytes, MIB) == MIB // SHARE
        assert "conversations" in engine.plan.lines()[0] and engine.plan.budget_bytes == floor + MIB
    assert auto_bytes(10, -5) == 0 and auto_bytes(10, 10**6) == 10


def test_a_file_is_not_read_for_a_few_tokens(tmp_path: Path, own_cache: Path) -> None:
    with with_cache(tmp_path, "qwen3moe", held_bytes=64 * MIB) as engine:
        reply(engine, words(1, 24))
    assert len(files(own_cache)) == 1
    with with_cache(tmp_path, "qwen3moe", held_bytes=64 * MIB) as engine:
        assert reply(engine, [*words(1, 24), *words(2, 40)])[0].reused_tokens == 0


def test_what_is_too_long_for_the_memory_is_not_held(tmp_path: Path) -> None:
    with held(tmp_path, "qwen3moe", held_bytes=1000) as engine:
        made = reply(engine, words(1, 70))[1]
        reply(engine, words(2, 70))
        assert engine.held is not None and engine.held.copies == []
        assert reply(engine, words(1, 70) + made + words(9, 9))[0].reused_tokens == 0


def test_what_a_prompt_takes_over() -> None:
    tokens = np.arange(100, dtype=np.int32)
    common: dict[str, Any] = {"window": 0, "recurrent": False, "n_ubatch": 16}
    known = Known(tokens, prompt_tokens=80, aligned=64)
    assert reuse_of(known, [*range(100), 7], **common).n == 100
    assert reuse_of(known, list(range(80)), **common).n == 79, "the same prompt again"
    assert reuse_of(known, [*range(77), 300, 301], **common).n == 77, "a template that closes the turn in another way"
    other = reuse_of(known, [*range(75), 300, 301], **common)
    assert (other.n, other.continues) == (64, False), "whole micro-batches of another conversation's"
    assert reuse_of(known, [*range(30), 300], **common).n == 16
    assert reuse_of(known, [300, 301], **common).n == 0
    recurrent = Known(tokens, 80, 64, checkpoints=(30, 32, 76))
    assert reuse_of(recurrent, [*range(60), 300], **{**common, "recurrent": True}).n == 32
    assert reuse_of(recurrent, [*range(90), 300], **{**common, "recurrent": True}).n == 76
    assert LEAST_TOKENS > 16


@pytest.mark.parametrize("window", [False, True])
def test_the_server_tells_what_it_holds(tmp_path: Path, window: bool) -> None:
    path = write_random_model(tmp_path / "window.gguf", "gpt-oss") if window else tiny_model_path()
    with open_engine(path, "resident", n_ctx=1024, n_threads=1, held_bytes=64 * MIB) as engine:
        model = EngineModel(engine, name="tiny", defaults=Sampling(temp=0.0))
        talks = ["The king said that the old man " * 4, "In the beginning there was a river by the sea " * 4]
        for _ in range(3):
            for client, text in enumerate(talks):
                prepared = model.prepare(Request(prompt=text, n_tokens=8))
                said: list[Any] = []
                assert model.run(prepared, said.append, lambda: False).reason == "length"
                talks[client] = text + "".join(getattr(event, "text", "") for event in said) + " and then"
        numbers = model.numbers()
        assert numbers["conversations_held"] == 2 and numbers["held_bytes"] > 0
        assert numbers["conversations_restored"] >= 4
        assert numbers["prefix_tokens_reused"] > 100 and numbers["conversations_spilled"] == 0
        assert any(part["name"] == "conversations" for part in model.picture()["memory"])
        assert set(numbers) - {"tokens", "expert_uses"} <= set(NUMBERS)
