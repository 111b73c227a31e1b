"""Dialects, grammars and fields without a server: bodies in, events out."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gbnf_walk import Walk
from moe_edge.runner.chatformat import FORMATS
from moe_edge.runner.chatformat.gbnf import BLANKS, until
from moe_edge.runner.chatformat.harmony import HarmonyParser
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.chatformat.plain import PlainParser
from moe_edge.runner.chatformat.think import ThinkParser
from moe_edge.runner.fake import FakeModel
from moe_edge.runner.protocol import End, Event, Request, ToolChoice, Usage
from moe_edge.runner.serve import dialects
from moe_edge.runner.serve.dialects import all_questions, all_routes
from moe_edge.runner.serve.dialects.anthropic_parse import without_billing
from moe_edge.runner.serve.dialects.dialect import Reply, Route
from moe_edge.runner.serve.fields import ApiError, Fields, parse_json
from moe_edge.runner.serve.forced_call import ForcedCallParser
from moe_edge.runner.serve.grammar import form_of, reply_form
from moe_edge.runner.serve.guards import host_name, may_ask
from serving import events_of

ROUTES = {route.path: route for route in all_routes()}
USER = [{"role": "user", "content": "Hi"}]


def parsed(path: str, body: dict[str, Any]) -> Request:
    return ROUTES[path].parse(body).request


def refused(path: str, body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as raised:
        ROUTES[path].parse(body)
    return raised.value


def reply_to(route: Route, body: dict[str, Any]) -> Reply:
    call = route.parse(body)
    return Reply("0123456789abcdef", 1_700_000_000, call.model, FakeModel().facts, call.options, 5)


# ---- OpenAI on the way in


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": USER, "temperature": "hot"}, "temperature"),
        ({"messages": USER, "temperature": True}, "temperature"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": USER, "n": 2}, "n"),
        ({"messages": USER, "audio": {"voice": "x"}}, "audio"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": USER, "tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
        ({"messages": USER, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": USER, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": USER, "stop": [1]}, "stop"),
        ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": USER, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"messages": USER, "stream": "yes"}, "stream"),
        ({"messages": USER, "reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    error = refused("/v1/chat/completions", body)
    assert error.status == 400 and error.param == param and param.split("[")[0] in error.message


def test_unknown_fields_are_left_alone_and_nulls_are_absent() -> None:
    names = ("temperature", "tools", "tool_choice", "stop", "n", "stream", "response_format", "logit_bias", "seed")
    body = {"messages": USER, "frobnicate": {"x": [1]}, "user": "me", "store": True} | dict.fromkeys(names)
    assert parsed("/v1/chat/completions", body) == parsed("/v1/chat/completions", {"messages": USER})


def test_the_second_turn_of_an_agent_is_understood() -> None:
    call = {"id": "abc", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "abc", "content": None},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": False,
        "max_tokens": 5,
        "max_completion_tokens": 7.0,
    }
    request = parsed("/v1/chat/completions", body)
    first, second, third = request.messages or ()
    assert first["content"] == "ab" and second["content"] is None and second["reasoning_content"] == "hm"
    assert json.loads(second["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert third == {"role": "tool", "content": "", "tool_call_id": "abc"}
    assert request.tools[0]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert request.one_tool and request.n_tokens == 7 and request.tool_choice == ToolChoice("auto")


def test_tool_choice_none_hides_the_tools() -> None:
    body = {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}
    assert parsed("/v1/chat/completions", body).tools == ()


def test_prompts_of_completions() -> None:
    assert parsed("/v1/completions", {"prompt": [1, 2]}).prompt == (1, 2)
    assert parsed("/v1/completions", {"prompt": ["one"]}).prompt == "one"
    assert parsed("/v1/completions", {"prompt": [[3]]}).prompt == (3,)
    assert parsed("/v1/completions", {"prompt": "x"}).n_tokens == 16
    prompts: list[Any] = [None, ["a", "b"], [1, "a"], [True], [-1], {}, 5]
    for wrong in prompts:
        assert refused("/v1/completions", {"prompt": wrong}).param == "prompt"


# ---- Anthropic and Ollama on the way in


def test_the_billing_line_goes_and_what_is_behind_it_stays() -> None:
    assert without_billing("x-anthropic-billing-header: cch=1;") == ""
    assert without_billing("x-anthropic-billing-header: cch=1;\n\nYou are X.") == "You are X."
    assert without_billing("You are X.\nx-anthropic-billing-header: no") == "You are X.\nx-anthropic-billing-header: no"


def test_anthropic_blocks_become_messages() -> None:
    content = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "1"}], "is_error": True},
        {"type": "tool_result", "tool_use_id": "b"},
        {"type": "text", "text": "So?"},
        {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
    ]
    request = parsed("/v1/messages", {"messages": [{"role": "user", "content": content}], "max_tokens": 5})
    assert request.messages == (
        {"role": "tool", "tool_call_id": "a", "content": "Error: 1"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": "So?\n\nWell?"},
    )


def test_anthropic_tool_choice_and_thinking() -> None:
    tools = [{"name": "f", "input_schema": {}}, {"type": "web_search_20250305", "name": "web_search"}]
    body = {"messages": USER, "max_tokens": 5, "tools": tools}
    assert len(parsed("/v1/messages", body).tools) == 1
    forced = parsed("/v1/messages", body | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
    assert forced.tool_choice == ToolChoice("required") and forced.one_tool
    named = body | {"tool_choice": {"type": "tool", "name": "f"}}
    assert parsed("/v1/messages", named).tool_choice == ToolChoice("required", "f")
    assert refused("/v1/messages", body | {"tool_choice": {"type": "tool", "name": "g"}}).param == "tool_choice"
    for kind, think in (("enabled", True), ("disabled", False), ("adaptive", None)):
        assert parsed("/v1/messages", body | {"thinking": {"type": kind}}).think is think
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    assert refused("/v1/messages", {"messages": image}).param == "messages[0].content[0].type"


def test_ollama_options_and_loading() -> None:
    options = {"temperature": 0, "num_predict": -1, "stop": "x", "num_ctx": 10, "mirostat": 1}
    request = parsed("/api/chat", {"messages": USER, "options": options, "think": "high", "format": "json"})
    assert request.sampling.temp == 0 and request.n_tokens is None and request.stop == ("x",)
    assert request.think is True and request.effort == "high" and request.json_object
    assert refused("/api/chat", {"messages": USER, "think": "a lot"}).param == "think"
    assert refused("/api/chat", {"messages": USER, "format": "xml"}).param == "format"
    assert refused("/api/generate", {"prompt": "x", "suffix": "y"}).param == "suffix"
    for body, reason in (({}, "load"), ({"keep_alive": 0}, "unload")):
        for path in ("/api/chat", "/api/generate"):
            answer = ROUTES[path].parse(body).answer
            assert answer is not None and answer["done_reason"] == reason and answer["done"] is True


# ---- on the way back


EVENTS: list[Event] = [
    Reasoning("hm"), Text("one "), Text("two"), ToolStart(0, "call_0", "f"), ToolArguments(0, '{"x":'),
    ToolArguments(0, " 1}"), ToolEnd(0), ToolStart(1, "call_1", "g"), ToolEnd(1),
    End("tool_calls", Usage(9, 4, 6, 1, 0.0, 0.5, 0.25)),
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "stream_options": {"include_usage": True}},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": USER},
    "/api/chat": {"messages": USER},
}


def streamed(path: str, events: list[Event]) -> str:
    encoder = ROUTES[path].encoder(reply_to(ROUTES[path], BODIES[path]))
    return encoder.opening() + "".join(encoder.event(event) for event in events)


def test_a_chat_stream_word_for_word() -> None:
    chunks = events_of(streamed("/v1/chat/completions", EVENTS))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    first = {"index": 0, "id": "012345600", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "one "},
        {"content": "two"},
        {"tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
        {"tool_calls": [first | {"index": 1, "id": "012345601", "function": {"name": "g", "arguments": ""}}]},
        {},
    ]
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    timings = chunks[-2]["timings"]
    assert (timings["prompt_n"], timings["cache_n"], timings["predicted_n"]) == (5, 4, 6)
    assert timings["prompt_ms"] == 500 and timings["predicted_per_second"] == 20


def test_a_message_stream_has_blocks_without_a_gap() -> None:
    events = events_of(streamed("/v1/messages", EVENTS))
    open_block: int | None = None
    seen: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None and event["index"] == len(seen)
            open_block = event["index"]
            seen.append(event["content_block"]["type"])
        elif event["type"] in ("content_block_delta", "content_block_stop"):
            assert event["index"] == open_block
            open_block = None if event["type"].endswith("stop") else open_block
    assert seen == ["thinking", "text", "tool_use", "tool_use"] and open_block is None
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["input_tokens"] == 5 and events[-2]["usage"]["cache_read_input_tokens"] == 4


def test_a_response_stream_builds_what_it_ends_with() -> None:
    events = events_of(streamed("/v1/responses", EVENTS))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["status"] for item in output] == ["completed"] * 4 and output[3]["arguments"] == "{}"
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == output
    for event in events:
        if event["type"].endswith((".delta", "_part.added", "_part.done", "_text.done")):
            assert {"item_id", "output_index"} <= set(event)
    assert len({item["id"] for item in output}) == 4


def test_ollama_sends_a_call_when_it_is_whole() -> None:
    lines = [json.loads(line) for line in streamed("/api/chat", EVENTS).splitlines()]
    calls = [line["message"]["tool_calls"][0]["function"] for line in lines if "tool_calls" in line["message"]]
    assert [(call["name"], call["arguments"]) for call in calls] == [("f", {"x": 1}), ("g", {})]
    assert lines[-1]["done"] and lines[-1]["eval_count"] == 6 and lines[-1]["prompt_eval_duration"] == 500_000_000


@pytest.mark.parametrize("path", BODIES)
def test_the_whole_answer_is_what_the_stream_adds_up_to(path: str) -> None:
    encoder = ROUTES[path].encoder(reply_to(ROUTES[path], BODIES[path]))
    whole = json.dumps(encoder.whole(EVENTS))
    for words in ("one two", "hm", '"f"', '"g"'):
        assert words in whole
    cut = ROUTES[path].encoder(reply_to(ROUTES[path], BODIES[path])).whole([*EVENTS[:5], End("length", Usage())])
    assert "length" in json.dumps(cut) or "max_" in json.dumps(cut)


def test_dialects_know_no_server_no_thread_and_no_engine() -> None:
    pure = {"__future__", "collections.abc", "dataclasses", "datetime", "importlib", "json", "pkgutil", "types"}
    pure.add("typing")
    ours = ("chatformat.parts", "events", "protocol", "serve.dialects", "serve.fields")
    for path in Path(dialects.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                known = tuple(f"moe_edge.runner.{each}" for each in ours)
                assert name in pure or (name or "").startswith(known), f"{path.name} imports {name}"


def test_no_two_paths_are_one_and_each_says_what_it_is_for() -> None:
    paths = [route.path for route in all_routes()] + [question.path for question in all_questions()]
    assert len(paths) == len(set(paths))
    assert all(route.words and route.fields for route in all_routes())
    assert all(question.words for question in all_questions())


# ---- bodies, fields, names


def test_bodies_that_are_no_json_objects() -> None:
    for data in (b"", b"{", b"[]", b"5", b"\xff", b'{"a": NaN}', b'{"a": 1e999}x', b"[" * 100_000):
        with pytest.raises(ApiError) as raised:
            parse_json(data)
        assert raised.value.status == 400 and len(raised.value.message) < 300


def test_numbers_that_are_none() -> None:
    values: list[Any] = [float("inf"), 10**400, -1, True, "1", [], {}]
    for value in values:
        with pytest.raises(ApiError):
            Fields({"x": value}).number("x", 0, 10)
        with pytest.raises(ApiError):
            Fields({"x": value}).whole("x", 0, 10)
    assert Fields({"x": 3.0}).whole("x", 0, 10) == 3


def test_hosts_and_origins() -> None:
    assert host_name("localhost:8080") == "localhost" and host_name("[::1]:80") == "::1" and host_name("[") == ""
    assert may_ask("http://localhost:1", "localhost:1", ()) and not may_ask("http://localhost:1", "localhost:2", ())
    assert may_ask("http://x", "y", ("*",)) and may_ask("http://x", "y", ("http://x",))
    assert not may_ask("null", "y", ()) and not may_ask("http://[", "y", ()) and not may_ask("null", "", ())


# ---- grammars and forced calls


def takes(rules: list[str], text: str) -> bool:
    """Whether the automaton of until() takes exactly this text; read back from its GBNF."""
    rows = Walk("\n".join(rules)).rules
    state = "t-0"
    for at, character in enumerate(text):
        for way in rows[state][1]:
            kind, *what = way[0]
            if what[0] == character if kind == "text" else all(character != low for low, _ in what[1]):
                state = way[1][1] if len(way) > 1 else ""
                break
        else:
            return False
        if state == "":
            return at == len(text) - 1
    return False


@pytest.mark.parametrize("mark", ["</think>", "<|end|>", "aab", "abcabd", "[/THINK]", "^-]"])
def test_any_text_up_to_the_mark_and_nothing_behind_it(mark: str) -> None:
    rules = until("t", mark)
    for before in ("", "x", "<", "<<", mark[:-1], mark[:2] * 3, "aa", "a" * 5, "ab</thin", "<|en<|end"):
        text = before + mark
        if text.index(mark) == len(text) - len(mark):
            assert takes(rules, text), text
            assert not takes(rules, text[:-1]) and not takes(rules, text + "x")


def test_a_text_up_to_a_mark_has_nothing_forbidden_in_it() -> None:
    rules = until("t", "<|close|>x", ("<|close|>", "<|open|>", "ab"))
    taken = ("<|close|>x", "a<|<|close|>x", "<|opena<|close|>x")
    for text, there in [(text, True) for text in taken] + [
        (text + "<|close|>x", False) for text in ("<|close|>y", "<|open|>", "aab")
    ]:
        assert takes(rules, text) == there, text


def test_forms_begin_where_the_answer_does() -> None:
    schema, question = Request(messages=(), json_object=True), "</think>"
    lines = {
        name: reply_form(schema, FORMATS[name], question, prompt).grammar.splitlines()[0]  # type: ignore[union-attr]
        for name, prompt in (("plain", ""), ("think", "<think>\n"), ("seed", "<seed:think>"), ("harmony", ""))
    }
    assert lines["plain"] == "moe-edge-reply ::= root"
    assert lines["think"] == f"moe-edge-reply ::= moe-edge-think-0 {BLANKS} root" == lines["seed"]
    assert '"<|channel|>final<|message|>" root' in lines["harmony"]
    assert form_of(Request()) is None and "root ::=" in (form_of(Request(json_object=True)) or "")


@pytest.mark.parametrize("cut", [1, 2, 3, 1000])
def test_a_forced_call_in_pieces(cut: int) -> None:
    arguments = '{"a": "}\\"{", "b": [{}, 1]}'
    raw = '<think>\nhm</think>\n\n{ "name": "f\\"g", "arguments": ' + arguments + " } "
    parser = ForcedCallParser(ThinkParser(False))
    parts: list[Part] = []
    for at in range(0, len(raw), cut):
        parts += parser.feed(raw[at : at + cut])
    parts += parser.finish()
    assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == "hm"
    assert [part.name for part in parts if isinstance(part, ToolStart)] == ['f"g']
    assert "".join(part.text for part in parts if isinstance(part, ToolArguments)) == arguments
    assert [type(part) for part in parts][-1] is ToolEnd and sum(isinstance(part, ToolEnd) for part in parts) == 1
    assert not any(isinstance(part, Text) for part in parts)


def test_a_forced_call_behind_harmonys_channels() -> None:
    parser = ForcedCallParser(HarmonyParser())
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    raw = thought + '<|channel|>final<|message|>{"name": "f", "arguments": {}}'
    parts = [*parser.feed(raw), *parser.finish()]
    assert parts == [Reasoning("hm"), ToolStart(0, "call_0", "f"), ToolArguments(0, "{}"), ToolEnd(0)]


def test_a_forced_call_that_is_cut_off_loses_nothing() -> None:
    early = ForcedCallParser(PlainParser())
    assert early.feed('{"name": "f') == [] and early.finish() == [Text('{"name": "f')]
    late = ForcedCallParser(PlainParser())
    parts = [*late.feed('{"name": "f", "arguments": {"a": 1'), *late.finish()]
    assert parts == [ToolStart(0, "call_0", "f"), ToolArguments(0, '{"a": 1'), ToolEnd(0)]


def test_ids_of_calls_are_what_every_template_takes() -> None:
    reply = reply_to(ROUTES["/v1/chat/completions"], {"messages": USER})
    ids = [reply.tool_id(n) for n in range(20)]
    assert all(re.fullmatch("[a-z0-9]{9}", each) for each in ids) and len(set(ids)) == 20
