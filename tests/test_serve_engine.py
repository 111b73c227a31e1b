"""The real model behind the server: templates, thinking, tools by grammar, cancelling, prefixes; and its clients."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from conftest import open_engine
from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import ContextFull, UsageError
from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.events import Progress
from moe_edge.runner.protocol import End, Event, Logprobs, Request, SamplingChoice, ToolChoice
from moe_edge.runner.sampling import Sampling
from moe_edge.runner.serve.engine_model import EngineModel, template_kwargs
from random_vocabulary import byte_letters
from scripted import CONTROL, USER_DEFINED, write_scripted_model
from serving import PATIENCE, Server, eventually, exchange, raw_request, serving

PROMPT = "The king said to the queen"
GREEDY = SamplingChoice(temp=0.0)
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]},
        },
    }
    for name in ("count", "weigh")
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{# the answer comes after </think> #}"
)


def run(model: EngineModel, request: Request, stop: Callable[[], bool] = lambda: False) -> tuple[list[Event], End]:
    events: list[Event] = []
    end = model.run(model.prepare(request), events.append, stop)
    return events, end


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


@pytest.fixture(scope="module")
def tiny() -> Iterator[EngineModel]:
    with open_engine(tiny_model_path(), "middle", n_ctx=1024, n_ubatch=32, n_threads=1) as engine:
        yield EngineModel(engine, name="tiny", defaults=Sampling(temp=0.0))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineModel]:
    """Says `<think>`, thinks, and answers in pieces of a character each."""
    reply = ["<think>", "Hm", " hm", "</think>", "\n\n\n", "\xe4\xb8", "Gut", " so", "."]
    path = write_scripted_model(
        tmp_path_factory.mktemp("thinker") / "thinker.gguf", reply, template=TEMPLATE,
        types={"<think>": USER_DEFINED, "</think>": USER_DEFINED}, more_tokens=["x"],
    )  # fmt: skip
    with open_engine(path, "resident", n_ctx=256, n_threads=1) as engine:
        yield EngineModel(engine, name="thinker", defaults=Sampling(temp=0.0))


# ---- requests and events


def test_a_text_goes_on_and_its_prefix_is_kept(tiny: EngineModel) -> None:
    first, end = run(tiny, Request(prompt=PROMPT, n_tokens=8, sampling=GREEDY))
    assert isinstance(first[0], Progress) and end.reason == "length" and end.usage.generated_tokens == 8
    assert end.usage.traded["expert_uses"] > 0 and end.usage.traded["policy"] == "exact"
    again, end = run(tiny, Request(prompt=PROMPT, n_tokens=8, sampling=GREEDY))
    assert text_of(again) == text_of(first) and end.usage.cached_tokens == end.usage.prompt_tokens - 1
    ids = tuple(tiny.tokenize(PROMPT, special=True, add_bos=True))
    assert text_of(run(tiny, Request(prompt=ids, n_tokens=8, sampling=GREEDY))[0]) == text_of(first)


def test_messages_without_a_template_are_gone_on_with(tiny: EngineModel) -> None:
    plain, _ = run(tiny, Request(prompt=PROMPT, n_tokens=8, sampling=GREEDY))
    chat, _ = run(tiny, Request(messages=({"role": "user", "content": PROMPT},), n_tokens=8, sampling=GREEDY))
    assert text_of(chat) == text_of(plain)
    with pytest.raises(UsageError, match="no chat template"):
        tiny.prepare(Request(messages=({"role": "user", "content": "x"},), tools=TOOLS))


def test_what_does_not_fit_is_refused_before_its_turn(tiny: EngineModel) -> None:
    with pytest.raises(ContextFull) as raised:
        tiny.prepare(Request(prompt=PROMPT * 400))
    counted = raised.value.prompt_tokens
    assert counted is not None and counted > raised.value.n_ctx == 1024 and "--ctx-size" in str(raised.value)
    for long in (Request(prompt="x" * 40_000), Request(messages=({"role": "user", "content": "x" * 40_000},))):
        with pytest.raises(ContextFull, match="40000 characters"):
            tiny.prepare(long)
    with pytest.raises(ContextFull):
        tiny.tokenize("x" * 40_000, special=True, add_bos=False)
    with pytest.raises(UsageError, match="not in the vocabulary"):
        tiny.prepare(Request(prompt=(1, 10**6)))
    with pytest.raises(UsageError, match="empty"):
        tiny.prepare(Request(prompt=""))
    with pytest.raises(UsageError, match="logit_bias"):
        tiny.prepare(Request(prompt="x", sampling=SamplingChoice(logit_bias=((10**6, 1.0),))))
    with pytest.raises(UsageError, match="chat_template_kwargs"):
        template_kwargs(Request(template_kwargs={"messages": []}))


def test_a_stop_text_of_the_request_is_told(tiny: EngineModel) -> None:
    whole = text_of(run(tiny, Request(prompt=PROMPT, n_tokens=20, sampling=GREEDY))[0])
    _, end = run(tiny, Request(prompt=PROMPT, n_tokens=20, sampling=GREEDY, stop=(whole[8:12],)))
    assert end.reason == "stop" and end.stop_text == whole[8:12]


def test_probabilities_come_with_the_text(tiny: EngineModel) -> None:
    events, end = run(tiny, Request(prompt=PROMPT, n_tokens=6, sampling=GREEDY, logprobs=2))
    told = [each for event in events if isinstance(event, Logprobs) for each in event.tokens]
    assert b"".join(each.data for each in told).decode() == text_of(events)
    assert len(told) == end.usage.generated_tokens and all(len(each.top) == 2 for each in told)


def test_cancelling_before_in_and_after_the_prompt(tiny: EngineModel) -> None:
    request = Request(prompt=PROMPT * 30, n_tokens=5, sampling=GREEDY)
    alone = text_of(run(tiny, request)[0])
    for limit in range(1, 12):
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked >= limit  # noqa: B023

        run(tiny, Request(prompt="Other words entirely", n_tokens=1))
        _, end = run(tiny, request, stop)
        assert end.reason == "cancelled"
        events, end = run(tiny, request)
        assert text_of(events) == alone
        assert end.usage.cached_tokens >= min(32 * (limit - 1), end.usage.prompt_tokens - 1)

    def stray() -> bool:
        tiny.stop()
        return False

    run(tiny, request, stray)  # a stop that nobody meant ends nothing for good
    assert text_of(run(tiny, request)[0]) == alone


# ---- thinking, templates


def test_thinking_and_the_answer_are_apart(thinker: EngineModel) -> None:
    events, end = run(thinker, Request(messages=({"role": "user", "content": "Hi"},)))
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    assert thought == "Hm hm" and text_of(events).endswith("Gut so.") and end.reason == "stop"
    assert end.usage.reasoning_tokens >= 1 and end.stop_text is None
    assert "thinking" in thinker.facts.capabilities and "tools" in thinker.facts.capabilities


def test_an_answer_that_is_begun_is_gone_on_with(thinker: EngineModel) -> None:
    question = {"role": "user", "content": "Hi"}
    begun = thinker.render(Request(messages=(question, {"role": "assistant", "content": "Gut"})))
    assert begun == thinker.render(Request(messages=(question,))) + "Gut"


def test_a_conversation_that_is_too_long_goes_without_its_oldest_turns_where_the_dialect_has_it_so(
    thinker: EngineModel,
) -> None:
    roles = ("user", "assistant")
    turns = [{"role": role, "content": f"{role} {n} says" + " hm" * 12} for n in range(12) for role in roles]
    messages = tuple([{"role": "system", "content": "Be brief."}, *turns[:-1]])
    with pytest.raises(ContextFull):
        thinker.prepare(Request(messages=messages))
    prepared = thinker.prepare(Request(messages=messages, truncate=True, n_tokens=8))
    assert len(prepared.tokens) <= thinker.facts.n_ctx - 8 and prepared.extra.dropped > 0
    kept = thinker.render(prepared.request)
    assert "user 11 says" in kept and "user 0 says" not in kept and "Be brief." in kept
    _, end = run(thinker, Request(messages=messages, truncate=True, n_tokens=8))
    assert end.usage.traded["dropped_messages"] == prepared.extra.dropped


def test_a_form_begins_behind_the_thinking(thinker: EngineModel) -> None:
    question = ({"role": "user", "content": "Hi"},)
    schema = {"type": "object", "properties": {"x": {"enum": [7]}}, "required": ["x"]}
    events, _ = run(thinker, Request(messages=question, schema=schema, n_tokens=60))
    assert [type(event) for event in events if isinstance(event, Reasoning)] != []
    assert json.loads(text_of(events)) == {"x": 7}


def test_a_form_on_harmonys_final_channel(tmp_path: Path) -> None:
    ends = ["<|return|>", "<|call|>"]  # with these in the vocabulary <|end|> ends no reply
    tags = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", *ends]
    reply = ["<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", "assistant", "x", "y"]
    path = write_scripted_model(
        tmp_path / "harmony.gguf", reply, types=dict.fromkeys(tags, CONTROL), more_tokens=["final", *ends],
        template=TEMPLATE.replace("</think>", "<|channel|> and <|message|>"),
    )  # fmt: skip
    schema = {"type": "object", "properties": {"x": {"enum": [7]}}, "required": ["x"]}
    with open_engine(path, "resident", n_ctx=256, n_threads=1) as engine:
        model = EngineModel(engine, name="harmony", defaults=Sampling(temp=0.0))
        question = ({"role": "user", "content": "Hi"},)
        events, _ = run(model, Request(messages=question, schema=schema, n_tokens=60))
        assert [event.text for event in events if isinstance(event, Reasoning)] == ["Hm"]
        assert json.loads(text_of(events)) == {"x": 7}
        call = Request(messages=question, tools=TOOLS, tool_choice=ToolChoice("required", "weigh"), n_tokens=80)
        events, end = run(model, call)
        assert end.reason == "tool_calls" and any(isinstance(event, ToolStart) for event in events)


@pytest.mark.parametrize("several", [True, False])
def test_a_call_in_the_familys_own_words_behind_its_own_thinking(tmp_path: Path, several: bool) -> None:
    """Seed's prompt leaves `<seed:think>` open, and its calls have tags of their own."""
    tags = ["<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"]
    template = TEMPLATE.replace("assistant\n", "assistant\n<seed:think>\n").replace("</think>", " and ".join(tags))
    path = write_scripted_model(
        tmp_path / "seed.gguf", ["Hm", " hm", "</seed:think>", "x", "y"], types=dict.fromkeys(tags, USER_DEFINED),
        more_tokens=[tag for tag in tags if tag != "</seed:think>"], template=template,
    )  # fmt: skip
    question = ({"role": "user", "content": "Hi"},)
    with open_engine(path, "resident", n_ctx=256, n_threads=1) as engine:
        model = EngineModel(engine, name="seed", defaults=Sampling(temp=0.0))
        request = Request(messages=question, tools=TOOLS, tool_choice=ToolChoice("required"), one_tool=not several)
        prepared = model.prepare(replace(request, n_tokens=150))
        assert prepared.extra.parser().__class__.__name__ == "TaggedCallParser"
        events, end = run(model, replace(request, n_tokens=150))
        assert "".join(event.text for event in events if isinstance(event, Reasoning)) == "Hm hm"
        starts = [event for event in events if isinstance(event, ToolStart)]
        assert starts and text_of(events) == "" and (several or len(starts) == 1)
        first = "".join(e.text for e in events if isinstance(e, ToolArguments) and e.index == 0)
        assert json.loads(first)["n"] in (1, 2, 3) and end.reason in ("tool_calls", "length")
        schema = {"type": "object", "properties": {"x": {"enum": [7]}}, "required": ["x"]}
        events, _ = run(model, Request(messages=question, schema=schema, n_tokens=60))
        assert json.loads(text_of(events)) == {"x": 7}


# ---- tools by force


@pytest.mark.parametrize("name", [None, "weigh"])
def test_a_required_call_is_forced_whatever_the_model_would_say(thinker: EngineModel, name: str | None) -> None:
    question = ({"role": "user", "content": "Hi"},)
    request = Request(messages=question, tools=TOOLS, tool_choice=ToolChoice("required", name), n_tokens=80)
    events, end = run(thinker, request)
    assert end.reason == "tool_calls" and text_of(events) == ""
    start = next(event for event in events if isinstance(event, ToolStart))
    arguments = "".join(event.text for event in events if isinstance(event, ToolArguments))
    assert start.name in ({"count", "weigh"} if name is None else {name})
    assert json.loads(arguments)["n"] in (1, 2, 3)
    assert sum(isinstance(event, ToolEnd) for event in events) == 1


def test_forms_that_cannot_be_kept_to_are_refused(tiny: EngineModel) -> None:
    bad: list[dict[str, Any]] = [
        {"schema": {"type": "string", "maxLength": 10**9}},
        {"schema": {"type": "string", "pattern": "^a{999999999}$"}},
        {"schema": {"type": "no-such-type"}},
        {"schema": {"$ref": "https://example.com/schema"}},
        {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
        {"grammar": "nothing"},
        {"grammar": 'root ::= "a"', "json_object": True},
    ]
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}}
    bad.append({"schema": deep})
    for each in bad:
        with pytest.raises(UsageError):
            tiny.prepare(Request(prompt="x", **each))
    events, _ = run(tiny, Request(prompt="x", json_object=True, n_tokens=20))
    assert text_of(events).startswith("{")


# ---- a server on the embedded model


@pytest.fixture(scope="module")
def server(tiny: EngineModel) -> Iterator[Server]:
    with serving(tiny, queue=100) as server:
        yield server


def test_every_client_gets_what_generate_gives(server: Server, tiny: EngineModel) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as of_openai:
        stream = of_openai.completions.create(model="m", prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
        said = "".join(chunk.choices[0].text for chunk in stream)
        chat = of_openai.chat.completions.create(
            model="m", messages=[{"role": "user", "content": PROMPT}], max_tokens=16, temperature=0
        )
        assert chat.choices[0].message.content == said
        told = of_openai.responses.create(model="m", input=PROMPT, max_output_tokens=16, temperature=0)
        assert told.output_text == said and told.status == "incomplete"
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as of_anthropic:
        messages: Any = [{"role": "user", "content": PROMPT}]
        with of_anthropic.messages.stream(model="m", max_tokens=16, messages=messages) as stream_of_text:
            assert "".join(stream_of_text.text_stream) == said
    of_ollama = ollama.Client(host=server.url)
    options = {"temperature": 0, "num_predict": 16}
    assert of_ollama.generate(model="m", prompt=PROMPT, options=options).response == said
    of_ollama._client.close()
    assert len(said) > 10


def test_a_client_that_leaves_in_a_long_prompt_leaves_its_prefix(server: Server, tiny: EngineModel) -> None:
    long = PROMPT * 100
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as there:
        there.sendall(raw_request("/v1/completions", {"prompt": long, "max_tokens": 400, "stream": True}))
        assert there.recv(10)
    assert server.idle()
    assert eventually(lambda: server.post("/v1/completions", {"prompt": long, "max_tokens": 1}).status_code == 200)


def test_the_picture_shows_which_experts_are_in_memory(server: Server) -> None:
    picture = server.get("/moe-edge/picture").json()
    assert sum(each["bytes"] for each in picture["memory"]) <= picture["budget_bytes"]
    assert len(picture["resident"]) == len(picture["layers"]) and picture["expert_uses"] > 0
    assert any(any(layer) for layer in picture["resident"])
    assert server.get("/moe-edge/facts").json()["n_ctx"] == 1024


def test_dozens_in_mixed_dialects_two_at_a_time_answer_as_alone(server: Server) -> None:
    prompts = [f"{PROMPT} number {n}" for n in range(4)]
    bodies: list[tuple[str, dict[str, Any]]] = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        bodies += [
            ("/v1/completions", {"prompt": prompt, "max_tokens": 12, "temperature": 0}),
            ("/v1/messages", {"messages": messages, "max_tokens": 12, "temperature": 0}),
            ("/api/chat", {"messages": messages, "stream": False, "options": {"num_predict": 12, "temperature": 0}}),
        ]

    def answer(path: str, body: dict[str, Any]) -> str:
        told = server.post(path, body).json()
        if path == "/v1/completions":
            return str(told["choices"][0]["text"])
        return str(told["content"][0]["text"] if path == "/v1/messages" else told["message"]["content"])

    alone = [answer(*each) for each in bodies]
    wrong: list[str] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(24):
            n = rng.randrange(len(bodies))
            if rng.random() < 0.3:
                sent = raw_request(bodies[n][0], bodies[n][1] | {"stream": True}, headers="Connection: close\r\n")
                exchange(server.port, sent, at_most=rng.randrange(900))
            elif (got := answer(*bodies[n])) != alone[n]:
                wrong.append(got)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


def test_characters_over_tokens_arrive_whole(tmp_path: Path) -> None:
    reply = [byte_letters()[byte] for byte in "界🙂".encode()]  # a token for each byte
    types = dict.fromkeys(reply, USER_DEFINED)
    path = write_scripted_model(tmp_path / "bytes.gguf", reply, types=types, template=TEMPLATE)
    with open_engine(path, "resident", n_ctx=64, n_threads=1) as engine:
        model = EngineModel(engine, name="bytes", defaults=Sampling(temp=0.0))
        events, _ = run(model, Request(messages=({"role": "user", "content": "Hi"},)))
        assert [event.text for event in events if isinstance(event, Text)] == ["界", "🙂"]
