"""The programs people use, against a running server: their own libraries, on a model that is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.fake import FakeModel
from moe_edge.runner.protocol import Request
from pydantic import BaseModel, SecretStr
from serving import Server, serving

ANSWER = "Grüße, 世界 🙂 and so on."
WEATHER = {
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def script(request: Request) -> list[Any]:
    """Calls the tool first when it has one, answers when the result is there; JSON when a schema is asked for."""
    if request.schema is not None:
        return [Text('{"name": "Ada", '), Text('"age": 36}')]
    if request.tools and not any(message["role"] == "tool" for message in request.messages or ()):
        arguments = [ToolArguments(0, '{"city": '), ToolArguments(0, '"Köln"}')]
        call = [ToolStart(0, "call_0", "weather"), *arguments, ToolEnd(0)]
        return [Reasoning("Let me "), Reasoning("look."), Text("One moment."), *call]
    return [Text(ANSWER[at : at + 2]) for at in range(0, len(ANSWER), 2)]


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel(script)


@pytest.fixture(scope="module")
def server(model: FakeModel) -> Iterator[Server]:
    with serving(model) as server:
        yield server


class Person(BaseModel):
    name: str
    age: int


# ---- OpenAI


@pytest.fixture(scope="module")
def of_openai(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def openai_tool() -> Any:
    return {"type": "function", "function": WEATHER}


def test_openai_answers_plainly_and_in_a_stream(of_openai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    whole = of_openai.chat.completions.create(model="any-name", messages=messages)
    assert whole.choices[0].message.content == ANSWER and whole.choices[0].finish_reason == "stop"
    assert whole.model == "any-name" and whole.usage is not None and whole.usage.total_tokens > 0
    stream = of_openai.chat.completions.create(
        model="any-name", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == ANSWER and chunks[-1].usage is not None and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_calls_a_tool_and_is_given_its_result(of_openai: openai.OpenAI, model: FakeModel) -> None:
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Weather in Köln?"}]
    first = of_openai.chat.completions.create(model="m", messages=messages, tools=[openai_tool()])
    calls: Any = first.choices[0].message.tool_calls
    call = calls[0]
    assert first.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Köln"}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "rain"}]},
    ]
    second = of_openai.chat.completions.create(model="m", messages=messages, tools=[openai_tool()])
    assert second.choices[0].message.content == ANSWER
    seen = model.requests[-1].messages or ()
    assert seen[2]["tool_calls"][0]["id"] == seen[3]["tool_call_id"] and seen[3]["content"] == "rain"


def test_openai_streams_a_tool_call_without_repeating_its_name(of_openai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Weather?"}]
    kinds = []
    with of_openai.chat.completions.stream(model="m", messages=messages, tools=[openai_tool()]) as stream:
        for event in stream:
            kinds.append(event.type)
        message = stream.get_final_completion().choices[0].message
    call = (message.tool_calls or [])[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Köln"}
    assert message.content == "One moment." and "tool_calls.function.arguments.done" in kinds
    assert len(call.id) == 9


def test_openai_thinking_is_an_extra_field(of_openai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Weather?"}]
    whole: Any = of_openai.chat.completions.create(model="m", messages=messages, tools=[openai_tool()])
    assert whole.choices[0].message.reasoning_content == "Let me look."
    stream: Any = of_openai.chat.completions.create(model="m", messages=messages, tools=[openai_tool()], stream=True)
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in stream)
    assert thought == "Let me look."


def test_openai_parses_into_a_class(of_openai: openai.OpenAI, model: FakeModel) -> None:
    messages: Any = [{"role": "user", "content": "Who?"}]
    parsed = of_openai.chat.completions.parse(model="m", messages=messages, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
    assert model.requests[-1].schema == Person.model_json_schema() | {"additionalProperties": False}


def test_openai_logprobs(of_openai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    whole = of_openai.chat.completions.create(model="m", messages=messages, logprobs=True, top_logprobs=2)
    content = (whole.choices[0].logprobs or pytest.fail("no logprobs")).content or []
    assert "".join(each.token for each in content) == ANSWER and len(content[0].top_logprobs) == 2
    stream = of_openai.chat.completions.create(model="m", messages=messages, logprobs=True, stream=True)
    told = [each for chunk in stream if (known := chunk.choices[0].logprobs) for each in known.content or []]
    assert [each.token for each in told] == [each.token for each in content]


def test_openai_completions_and_models(of_openai: openai.OpenAI, model: FakeModel) -> None:
    whole = of_openai.completions.create(model="m", prompt="Once", max_tokens=400, echo=True, logprobs=1)
    assert whole.choices[0].text == "Once" + ANSWER
    stream = of_openai.completions.create(model="m", prompt="Once", max_tokens=400, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER
    assert [each.id for each in of_openai.models.list()] == ["fake"]
    assert of_openai.models.retrieve("some/other").id == "some/other"


def test_openai_errors_name_the_field(of_openai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.BadRequestError) as raised:
        of_openai.chat.completions.create(model="m", messages=messages, n=2)
    assert raised.value.param == "n" and "one answer" in str(raised.value)
    with pytest.raises(openai.BadRequestError) as raised:
        of_openai.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 5000}])
    assert raised.value.code == "context_length_exceeded" and "5" in str(raised.value)
    with pytest.raises(openai.NotFoundError):
        of_openai.embeddings.create(model="m", input="x")


# ---- OpenAI responses


def test_responses_plain_stream_and_parse(of_openai: openai.OpenAI) -> None:
    whole = of_openai.responses.create(model="m", input="Hello", instructions="Be kind.")
    assert whole.output_text == ANSWER and whole.status == "completed"
    kinds = []
    with of_openai.responses.stream(model="m", input="Hello") as stream:
        for event in stream:
            kinds.append(event.type)
        final = stream.get_final_response()
    assert final.output_text == ANSWER and final.usage is not None and final.usage.output_tokens > 0
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.index("response.output_item.added") < kinds.index("response.output_text.delta")
    parsed = of_openai.responses.parse(model="m", input="Who?", text_format=Person)
    assert parsed.output_parsed == Person(name="Ada", age=36)


def codex_tools() -> list[Any]:
    """Functions, and kinds that are not ours to know."""
    others = [{"type": "web_search"}, {"type": "namespace", "name": "x"}]
    return [{"type": "function", "strict": False, **WEATHER}, *others]


def test_responses_two_turns_with_a_tool_as_codex_sends_them(of_openai: openai.OpenAI, model: FakeModel) -> None:
    question: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}
    common: dict[str, Any] = {
        "model": "m", "tools": codex_tools(), "tool_choice": "auto", "parallel_tool_calls": False, "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "reasoning": {"effort": "medium"},
    }  # fmt: skip
    items: list[Any] = []
    for event in of_openai.responses.create(input=[question], stream=True, **common):
        if event.type == "response.output_item.done":
            items.append(event.item)
    assert [item.type for item in items] == ["reasoning", "message", "function_call"]
    call = items[2]
    assert call.name == "weather" and json.loads(call.arguments) == {"city": "Köln"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    history = [question, *(item.model_dump(exclude_none=True) for item in items), result]
    second = of_openai.responses.create(input=history, **common)
    assert second.output_text == ANSWER
    seen = model.requests[-1]
    assert [message["role"] for message in seen.messages or ()] == ["user", "assistant", "tool"]
    assistant = (seen.messages or ())[1]
    assert assistant["content"] == "One moment." and assistant["reasoning_content"] == "Let me look."
    assert len(seen.tools) == 1 and seen.one_tool and seen.effort == "medium"


def test_responses_refuse_what_they_would_have_to_remember(of_openai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        of_openai.responses.create(model="m", input="x", previous_response_id="resp_1")
    assert raised.value.param == "previous_response_id"


# ---- Anthropic


@pytest.fixture(scope="module")
def of_anthropic(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def anthropic_tool() -> Any:
    return {"name": "weather", "description": "The weather.", "input_schema": WEATHER["parameters"]}


def test_anthropic_answers_plainly_and_in_a_stream(of_anthropic: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    whole: Any = of_anthropic.messages.create(model="claude-any", max_tokens=100, messages=messages)
    assert whole.content[0].text == ANSWER and whole.stop_reason == "end_turn" and whole.model == "claude-any"
    with of_anthropic.messages.stream(model="claude-any", max_tokens=100, messages=messages) as stream:
        assert "".join(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert final.usage.output_tokens == whole.usage.output_tokens > 0
    assert final.usage.input_tokens == whole.usage.input_tokens > 0


def test_anthropic_two_turns_with_a_tool(of_anthropic: anthropic.Anthropic, model: FakeModel) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Weather?"}]}]
    system = [{"type": "text", "text": "S"}]
    common: Any = {"model": "c", "max_tokens": 100, "tools": [anthropic_tool()], "system": system}
    with of_anthropic.messages.stream(messages=messages, **common) as stream:
        first: Any = stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    assert first.stop_reason == "tool_use" and first.content[2].input == {"city": "Köln"}
    plain: Any = of_anthropic.messages.create(messages=messages, **common)
    assert [block.model_dump(exclude={"id"}) for block in plain.content] == [
        block.model_dump(exclude={"id"}) for block in first.content
    ]
    result = {"type": "tool_result", "tool_use_id": first.content[2].id, "content": [{"type": "text", "text": "rain"}]}
    messages += [
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    second: Any = of_anthropic.messages.create(messages=messages, **common)
    assert second.content[0].text == ANSWER
    seen = model.requests[-1].messages or ()
    assert [message["role"] for message in seen] == ["system", "user", "assistant", "tool", "user"]
    assert seen[2]["tool_calls"][0]["id"] == seen[3]["tool_call_id"]


def test_anthropic_counts_tokens(of_anthropic: anthropic.Anthropic, model: FakeModel) -> None:
    before = len(model.requests)
    counted = of_anthropic.messages.count_tokens(model="c", messages=[{"role": "user", "content": "Hello"}])
    whole = of_anthropic.messages.create(model="c", max_tokens=9, messages=[{"role": "user", "content": "Hello"}])
    assert counted.input_tokens == whole.usage.input_tokens and len(model.requests) == before + 1


def test_anthropic_stop_sequence_and_errors(of_anthropic: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    cut: Any = of_anthropic.messages.create(model="c", max_tokens=100, messages=messages, stop_sequences=["世"])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == "世" and cut.content[0].text == "Grüße, "
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        of_anthropic.messages.create(model="c", max_tokens=9, messages=[{"role": "user", "content": "x" * 5000}])


def test_claude_codes_billing_line_does_not_reach_the_prompt(server: Server, model: FakeModel) -> None:
    for cch in ("a5145", "b6256"):
        system = [{"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={cch};"},
                  {"type": "text", "text": "You are Claude Code."}]  # fmt: skip
        body = {"model": "c", "max_tokens": 9, "system": system, "messages": [{"role": "user", "content": "Hi"}]}
        assert server.post("/v1/messages?beta=true", body).status_code == 200
    assert model.requests[-1].messages == model.requests[-2].messages
    assert (model.requests[-1].messages or ())[0]["content"] == "You are Claude Code."
    assert server.get("/").status_code == 200


# ---- Ollama


@pytest.fixture(scope="module")
def of_ollama(server: Server) -> Iterator[ollama.Client]:
    client = ollama.Client(host=server.url)
    yield client
    client._client.close()


def test_ollama_chat_and_generate(of_ollama: ollama.Client) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    whole = of_ollama.chat(model="m", messages=messages)
    assert whole.message.content == ANSWER and whole.done and whole.done_reason == "stop"
    lines = list(of_ollama.chat(model="m", messages=messages, stream=True))
    assert "".join(line.message.content or "" for line in lines) == ANSWER
    assert lines[-1].done and lines[-1].eval_count == whole.eval_count
    assert of_ollama.generate(model="m", prompt="Hi", system="S").response == ANSWER
    assert "".join(line.response or "" for line in of_ollama.generate(model="m", prompt="Hi", stream=True)) == ANSWER


def test_ollama_two_turns_with_a_tool(of_ollama: ollama.Client, model: FakeModel) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    tool: Any = {"type": "function", "function": WEATHER}
    for streamed in (False, True):
        answer: Any = of_ollama.chat(model="m", messages=messages, tools=[tool], stream=streamed, think=True)
        lines = list(answer) if streamed else [answer]
        calls = [call for line in lines for call in line.message.tool_calls or []]
        assert [call.function.name for call in calls] == ["weather"]
        assert calls[0].function.arguments == {"city": "Köln"}
        assert "".join(line.message.thinking or "" for line in lines) == "Let me look."
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call.model_dump() for call in calls]},
        {"role": "tool", "content": "rain", "tool_name": "weather"},
    ]
    assert of_ollama.chat(model="m", messages=messages, tools=[tool]).message.content == ANSWER
    assert model.requests[-1].think is None and model.requests[-2].think is True


def test_ollama_format_and_options(of_ollama: ollama.Client, model: FakeModel) -> None:
    answer = of_ollama.chat(
        model="m", messages=[{"role": "user", "content": "Who?"}], format=Person.model_json_schema(),
        options={"temperature": 0.2, "num_predict": 50, "num_ctx": 99999, "stop": ["zzz"]}, keep_alive="5m",
    )  # fmt: skip
    assert Person.model_validate_json(answer.message.content or "").age == 36
    request = model.requests[-1]
    assert request.sampling.temp == 0.2 and request.n_tokens == 50 and request.stop == ("zzz",)


def test_ollama_lists(of_ollama: ollama.Client, server: Server) -> None:
    assert [each.model for each in of_ollama.list().models] == ["fake"]
    assert [each.name for each in of_ollama.ps().models] == ["fake"]
    shown = of_ollama.show("fake")
    assert shown.modelinfo and shown.modelinfo["fakemoe.context_length"] == 4096
    assert server.get("/api/version").json()["version"]
    assert of_ollama.generate(model="m", prompt="").done_reason == "load"
    for line in server.post("/api/show", {"name": "fake"}).json()["parameters"].splitlines():
        name, value = line.split()  # Continue's rule
        assert name == "num_ctx" and int(value) == 4096
    with pytest.raises(ollama.ResponseError, match="text only"):
        of_ollama.chat(model="m", messages=[{"role": "user", "content": "x", "images": [b"abc"]}])


# ---- LangChain


def test_langchain_answers_streams_and_calls(server: Server) -> None:
    key = SecretStr("none")
    chat = ChatOpenAI(model="m", base_url=server.url + "/v1", api_key=key, max_retries=0, stream_usage=True)
    assert chat.invoke([HumanMessage("Hello")]).content == ANSWER
    chunks = list(chat.stream([HumanMessage(content=[{"type": "text", "text": "Hello"}])]))
    assert "".join(str(chunk.content) for chunk in chunks) == ANSWER
    assert any(chunk.usage_metadata for chunk in chunks)
    bound = chat.bind_tools([openai_tool()])
    asked = bound.invoke([HumanMessage("Weather?")])
    assert isinstance(asked, AIMessage) and asked.tool_calls[0]["args"] == {"city": "Köln"}
    told = bound.invoke([HumanMessage("Weather?"), asked, ToolMessage("rain", tool_call_id=asked.tool_calls[0]["id"])])
    assert told.content == ANSWER
    person = chat.with_structured_output(Person, method="json_schema").invoke("Who?")
    assert person == Person(name="Ada", age=36)
    chat.root_client.close()
