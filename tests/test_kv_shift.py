"""A context that shifts goes on past its end, says so, and leaves nothing of it to the next prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moe_edge.models.errors import UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.events import Piece
from moe_edge.runner.generate import Generation, Sampling, generate, stream
from moe_edge.runner.kv.shift import SINKS
from test_kv_checkpoints import opened, words

GREEDY = Sampling(temp=0)
N_CTX = 256  # what llama.cpp's cells are padded to


def run(engine: Engine, tokens: list[int], n: int) -> tuple[Generation, list[int]]:
    """A greedy reply and its tokens."""
    said: list[int] = []
    events = stream(engine, tokens, n, GREEDY, ignore_end=True)
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            result: Generation = end.value
            return result, said[: result.generated_tokens]  # the last characters may come in a piece of their own
        if isinstance(event, Piece):
            said.append(event.token)


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_a_reply_goes_on_when_the_context_is_full(tmp_path: Path, arch: str) -> None:
    prompt = words(0, 70)
    with opened(tmp_path, arch, n_ctx=2 * N_CTX) as engine:
        wide = run(engine, prompt, 300)[1]
    with opened(tmp_path, arch, n_ctx=N_CTX) as engine:
        ended, said = run(engine, prompt, 300)
        assert ended.generated_tokens == N_CTX - 70 and said == wide[: len(said)] and ended.shifted_tokens == 0
        alone = run(engine, words(5, 40), 20)[1]
    with opened(tmp_path, arch, n_ctx=N_CTX, context_shift=True) as engine:
        assert any("context shift" in line for line in engine.lines())
        result, said = run(engine, prompt, 700)
        before = N_CTX - 70
        assert result.generated_tokens == 700 and said[:before] == wide[:before]
        forgotten, full = 0, N_CTX - 1
        while 70 + 700 - 1 - forgotten > full:
            forgotten += (full - SINKS) // 2
        assert result.shifted_tokens == forgotten
        assert f"{forgotten} tokens of the context forgotten" in result.line()
        assert result.to_json(engine)["context_shifted_tokens"] == forgotten
        assert engine.llama.n_tokens <= SINKS  # nothing of it is gone on with
        assert run(engine, prompt, 50)[1] == wide[:50]
        assert run(engine, words(5, 40), 20)[1] == alone


def test_the_rest_keeps_its_order_and_its_positions(tmp_path: Path) -> None:
    """What llama.cpp then holds is the first tokens and the newer half, at positions without a gap."""
    from moe_edge.runner.kv.shift import shift
    from moe_edge.runner.llama import first_position

    with opened(tmp_path, "qwen3moe", n_ctx=N_CTX) as engine, engine.decoding():
        tokens = words(0, 255)
        engine.llama.eval(tokens)
        n = shift(engine.llama)
        kept = tokens[:SINKS] + tokens[SINKS + n :]
        assert engine.llama.input_ids[: engine.llama.n_tokens].tolist() == kept and n == (255 - SINKS) // 2
        import llama_cpp

        assert first_position(engine.llama) == 0
        assert llama_cpp.llama_memory_seq_pos_max(engine.llama._ctx.memory, 0) == len(kept) - 1
        engine.llama.eval(words(1, 30))


@pytest.mark.parametrize(
    ("arch", "more", "says"),
    [("qwen3next", {}, "recurrent state"), ("step35", {}, "cannot shift"),
     ("qwen3moe", {"cache_type_k": "q8_0", "flash_attn": True}, "q8_0")],
)  # fmt: skip
def test_memory_that_cannot_shift_is_refused_by_name(
    tmp_path: Path, arch: str, more: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=f"--context-shift.*{says}"):
        opened(tmp_path, arch, context_shift=True, **more)


def test_a_reply_that_is_stopped_after_a_shift_leaves_nothing_either(tmp_path: Path) -> None:
    asked = iter(range(10_000))
    with opened(tmp_path, "qwen3moe", n_ctx=N_CTX, context_shift=True) as engine:
        result = generate(
            engine, words(0, 70), 900, GREEDY, ignore_end=True, should_stop=lambda: next(asked) > 400
        )
        assert result.finish_reason == "stopped" and result.shifted_tokens > 0 and engine.llama.n_tokens <= SINKS
