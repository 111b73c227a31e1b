"""Drawing tokens: grammars, biases, probabilities, events of a stream, stops at any moment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import Stopped, UsageError
from moe_edge.runner.engine import Engine
from moe_edge.runner.events import Piece, Progress
from moe_edge.runner.generate import Generation, Sampling, generate, stream
from moe_edge.runner.sampling import last_logits, log_softmax, most_likely
from moe_edge.runner.tokens import tokenize

GREEDY = Sampling(temp=0.0)
PROMPT = "The king said to the queen"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine(tiny_model_path(), "middle", n_ctx=512, n_ubatch=32, n_threads=1) as engine:
        yield engine


def collect(events: Iterator[Progress | Piece]) -> tuple[list[Progress], list[Piece], Generation]:
    progress: list[Progress] = []
    pieces: list[Piece] = []
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return progress, pieces, end.value
        if isinstance(event, Progress):
            progress.append(event)
        else:
            pieces.append(event)


def test_pieces_of_a_stream_are_the_text_of_generate(engine: Engine) -> None:
    whole = generate(engine, PROMPT, 24, GREEDY)
    engine.new_conversation()
    progress, pieces, streamed = collect(stream(engine, PROMPT, 24, GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text == streamed.text
    assert streamed.generated_tokens == len(pieces) == 24
    assert progress[0].done == 0 and progress[-1].done == progress[-1].total == whole.prompt_tokens


def test_a_long_prompt_reports_every_micro_batch(engine: Engine) -> None:
    engine.new_conversation()
    progress, _, out = collect(stream(engine, PROMPT * 12, 1, GREEDY))
    assert [p.done for p in progress[:3]] == [0, 32, 64]
    assert progress[-1].done == out.prompt_tokens > 64


def test_a_stop_between_micro_batches_keeps_what_was_evaluated(engine: Engine) -> None:
    engine.new_conversation()
    asked = 0

    def third() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with pytest.raises(Stopped):
        generate(engine, PROMPT * 12, 4, GREEDY, should_stop=third)
    again = generate(engine, PROMPT * 12, 4, GREEDY)
    assert again.reused_tokens == 64
    engine.new_conversation()
    assert generate(engine, PROMPT * 12, 4, GREEDY).text == again.text


def test_a_closed_stream_gives_the_turn_back(engine: Engine) -> None:
    events = stream(engine, PROMPT, 24, GREEDY)
    while not isinstance(next(events), Piece):
        pass
    events.close()
    assert generate(engine, PROMPT, 4, GREEDY).generated_tokens == 4


def test_what_a_reader_of_the_text_raises_comes_out_and_the_engine_goes_on(engine: Engine) -> None:
    def fails(_text: str) -> None:
        raise ValueError("the reader failed")

    try:
        generate(engine, PROMPT, 4, GREEDY, on_text=fails)
    except ValueError as kept:  # its traceback keeps every frame alive
        assert generate(engine, PROMPT, 4, GREEDY).generated_tokens == 4
        assert "reader" in str(kept)
    else:
        pytest.fail("what the reader raised was lost")


def test_the_stop_text_that_came_is_named_and_the_first_one_counts(engine: Engine) -> None:
    text = generate(engine, PROMPT, 24, GREEDY).text
    early, late = text[6:10], text[12:16]
    out = generate(engine, PROMPT, 24, GREEDY, stop=[late, "never said at all", early])
    assert out.finish_reason == "stop" and out.stop_text == early
    assert out.text == text[: text.index(early)]


# ---- grammar


def test_a_grammar_is_followed_to_its_end(engine: Engine) -> None:
    grammar = 'root ::= "[" [0-9] [0-9] ", " ("yes" | "no") "]"'
    for temp in (0.0, 1.0):
        out = generate(engine, PROMPT, 40, Sampling(temp=temp, seed=5, grammar=grammar))
        assert re.fullmatch(r"\[\d\d, (yes|no)\]", out.text), out.text
        assert out.finish_reason == "stop"


def test_a_grammar_that_the_reply_keeps_anyway_changes_nothing(engine: Engine) -> None:
    free = generate(engine, PROMPT, 12, GREEDY)
    held = generate(engine, PROMPT, 12, Sampling(temp=0.0, grammar="root ::= [^\\x00]*"))
    assert held.text == free.text


def test_a_grammar_for_json_gives_json(engine: Engine) -> None:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    properties = {"n": {"enum": [1, 2]}, "ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["n", "ok"]}
    grammar = json_schema_to_gbnf(json.dumps(schema))
    out = generate(engine, PROMPT, 60, Sampling(temp=0.7, seed=1, grammar=grammar))
    assert set(json.loads(out.text)) == {"n", "ok"}


@pytest.mark.parametrize("text", ["no root here", 'root ::= "a" nowhere', 'root ::= root "a"'])
def test_a_grammar_with_a_fault_is_refused(engine: Engine, text: str) -> None:
    with pytest.raises(UsageError, match="grammar"):
        generate(engine, PROMPT, 4, Sampling(grammar=text))
    assert generate(engine, PROMPT, 4, GREEDY).generated_tokens == 4


def test_a_grammar_that_allows_no_token_is_an_error_and_the_process_lives(
    random_model: Callable[[str], Path],
) -> None:
    with open_engine(random_model("qwen3moe"), "resident", n_ctx=64, n_threads=1) as other:
        ids = [(token, -math.inf) for token in range(512)]
        with pytest.raises(UsageError, match="allows no token"):
            generate(other, "a", 4, Sampling(temp=0.9, logit_bias=tuple(ids), grammar='root ::= "a"'))
        assert generate(other, "a", 2, GREEDY).generated_tokens >= 1


# ---- bias and probabilities


def test_a_bias_forces_or_forbids_a_token(engine: Engine) -> None:
    first = tokenize(engine.llama, " banana", special=False, add_bos=False)[0]
    forced = collect(stream(engine, PROMPT, 3, Sampling(temp=0, logit_bias=((first, 100.0),))))[1]
    assert [piece.token for piece in forced][:3] == [first] * 3
    free = collect(stream(engine, PROMPT, 1, GREEDY))[1][0].token
    other = collect(stream(engine, PROMPT, 1, Sampling(temp=0, logit_bias=((free, -100.0),))))[1][0].token
    assert other != free


def test_a_bias_of_no_token_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="logit_bias names token 999999"):
        generate(engine, PROMPT, 1, Sampling(logit_bias=((999999, 1.0),)))


def test_probabilities_are_those_of_the_logits(engine: Engine) -> None:
    _, pieces, _ = collect(stream(engine, PROMPT, 4, Sampling(temp=0.0, logprobs=5)))
    for piece in pieces:
        known = piece.logprob
        assert known is not None and known.token == piece.token == known.top[0][0]
        assert known.logprob == known.top[0][2] <= 0
        assert [value for _, _, value in known.top] == sorted((value for _, _, value in known.top), reverse=True)
        assert len(known.top) == 5
    logits = last_logits(engine.llama)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1, abs=1e-4)


def test_the_most_likely_are_sorted_and_there_may_be_fewer_than_asked_for() -> None:
    values = log_softmax(np.array([1.0, 3.0, 2.0], np.float32))
    assert most_likely(values, 2) == [1, 2]
    assert most_likely(values, 9) == [1, 2, 0]
    assert most_likely(values, 0) == []
    assert values[1] == pytest.approx(math.log(math.exp(3) / (math.exp(1) + math.exp(2) + math.exp(3))), abs=1e-6)


def test_penalties_reach_the_sampler(engine: Engine) -> None:
    free = generate(engine, PROMPT, 40, GREEDY).text
    assert generate(engine, PROMPT, 40, Sampling(temp=0, repeat_penalty=5.0)).text != free
    assert generate(engine, PROMPT, 40, Sampling(temp=0, frequency_penalty=50.0)).text != free
