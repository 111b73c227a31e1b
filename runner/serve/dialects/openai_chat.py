"""OpenAI's /v1/chat/completions, as the openai SDK, LangChain, Open WebUI and most agents speak it.

A tool call's id, type and name come in its first chunk only: the SDK joins repeats together. Facts: docs/SERVER.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolStart
from moe_edge.runner.events import TokenLogprob
from moe_edge.runner.protocol import End, Event, Logprobs, Request, Usage
from moe_edge.runner.serve.dialects.dialect import Call, Reply, Route, dumps, gather, sse
from moe_edge.runner.serve.dialects.openai_parse import (
    EFFORTS,
    FLAG,
    MOST_TOKENS,
    OBJECT,
    OBJECTS,
    SAMPLING_FIELDS,
    TEXT,
    TEXT_OR_TEXTS,
    WHOLE,
    chat_messages,
    chat_tools,
    response_format,
    sampling_of,
    tool_choice_of,
)
from moe_edge.runner.serve.fields import ApiError, Fields

FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "length"}


def parse(body: Mapping[str, Any]) -> Call:
    """Raises ApiError naming the field."""
    f = Fields(body)
    if (f.whole("n", 1, 128) or 1) != 1:
        f.refuse("n", "one answer a request")
    if "audio" in f or "audio" in f.texts("modalities"):
        f.refuse("audio", "this server answers in text")
    tools = chat_tools(f)
    names = tuple(tool["function"]["name"] for tool in tools)
    choice = tool_choice_of(f, names)
    schema, json_object = response_format(f.object("response_format"))
    logprobs = None
    if f.flag("logprobs"):
        logprobs = f.whole("top_logprobs", 0, 20) or 0
    elif f.whole("top_logprobs", 0, 20):
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    kwargs = f.object("chat_template_kwargs")
    stream_options = f.object("stream_options")
    request = Request(
        messages=chat_messages(f),
        tools=tools if choice.mode != "none" else (),
        tool_choice=choice,
        one_tool=not f.flag("parallel_tool_calls", True),
        schema=schema,
        json_object=json_object,
        grammar=f.text("grammar"),
        n_tokens=f.whole("max_completion_tokens", 1, MOST_TOKENS) or f.whole("max_tokens", 1, MOST_TOKENS),
        sampling=sampling_of(f),
        stop=f.texts("stop"),
        logprobs=logprobs,
        think=f.values["think"] if isinstance(f.get("think"), bool) else None,
        effort=f.text("reasoning_effort", choices=EFFORTS),
        template_kwargs=dict(kwargs.values) if kwargs else {},
    )
    options = {"include_usage": stream_options is not None and stream_options.flag("include_usage"),
               "logprobs": logprobs is not None}  # fmt: skip
    return Call(request, f.text("model") or "", f.flag("stream"), options)


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, and under moe_edge what was traded."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "moe_edge": dict(usage.traded),
    }


def timings_json(usage: Usage) -> dict[str, Any]:
    """llama-server's `timings`."""
    evaluated = usage.prompt_tokens - usage.cached_tokens
    after_first = max(0, usage.generated_tokens - 1)
    return {
        "prompt_n": evaluated,
        "prompt_ms": 1000 * usage.ttft_seconds,
        "prompt_per_second": evaluated / usage.ttft_seconds if usage.ttft_seconds > 0 else 0.0,
        "predicted_n": usage.generated_tokens,
        "predicted_ms": 1000 * usage.decode_seconds,
        "predicted_per_second": after_first / usage.decode_seconds if usage.decode_seconds > 0 else 0.0,
        "cache_n": usage.cached_tokens,
    }


def logprobs_json(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(each.data, each.logprob) | {"top_logprobs": [entry(data, value) for _, data, value in each.top]}
            for each in logprobs
        ]
    }


def error_json(error: ApiError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


class ChatEncoder:
    """chat.completion, and chat.completion.chunk."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._logprobs: tuple[TokenLogprob, ...] = ()  # of the next Text

    def _head(self, kind: str) -> dict[str, Any]:
        r = self._reply
        return {"id": f"chatcmpl-{r.id}", "object": kind, "created": r.created, "model": r.model,
                "system_fingerprint": f"moe-edge-{r.facts.policy}"}  # fmt: skip

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
        logprobs = more.pop("logprobs", None)
        if self._reply.options["logprobs"]:
            choice["logprobs"] = logprobs
        return sse(self._head("chat.completion.chunk") | {"choices": [choice]} | more)

    def opening(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def event(self, event: Event) -> str:
        if isinstance(event, Logprobs):
            self._logprobs += event.tokens
            return ""
        if isinstance(event, Text):
            known, self._logprobs = self._logprobs, ()
            return self._chunk({"content": event.text}, logprobs=logprobs_json(known) if known else None)
        if isinstance(event, Reasoning):
            return self._chunk({"reasoning_content": event.text})
        if isinstance(event, ToolStart):
            function = {"name": event.name, "arguments": ""}
            id_ = self._reply.tool_id(event.index)
            call = {"index": event.index, "id": id_, "type": "function", "function": function}
            return self._chunk({"tool_calls": [call]})
        if isinstance(event, ToolArguments):
            return self._chunk({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})
        return self._ending(event) if isinstance(event, End) else ""

    def _ending(self, end: End) -> str:
        last = self._chunk({}, FINISH.get(end.reason, "stop"), timings=timings_json(end.usage))
        if self._reply.options["include_usage"]:
            head = self._head("chat.completion.chunk")
            last += sse(head | {"choices": [], "usage": usage_json(end.usage)})
        return last + "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> str:
        return f"data: {dumps(error_json(error))}\n\n"

    def keep_alive(self) -> str:
        return ": still evaluating the prompt\n\n"

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        got = gather(events)
        message: dict[str, Any] = {"role": "assistant", "content": got.text if got.text or not got.tools else None}
        if got.reasoning:
            message["reasoning_content"] = got.reasoning
        if got.tools:
            message["tool_calls"] = [
                {
                    "id": self._reply.tool_id(index), "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for index, (name, arguments) in enumerate(got.tools)
            ]  # fmt: skip
        choice: dict[str, Any] = {
            "index": 0, "message": message, "finish_reason": FINISH.get(got.end.reason, "stop"), "logprobs": None,
        }  # fmt: skip
        if self._reply.options["logprobs"]:
            choice["logprobs"] = logprobs_json(got.logprobs)
        usage = got.end.usage
        return self._head("chat.completion") | {
            "choices": [choice], "usage": usage_json(usage), "timings": timings_json(usage),
        }  # fmt: skip


FIELDS = {
    "model": TEXT, "messages": OBJECTS, "stream": FLAG, "stream_options": OBJECT, "max_tokens": WHOLE,
    "max_completion_tokens": WHOLE, "stop": TEXT_OR_TEXTS, "n": WHOLE, "logprobs": FLAG, "top_logprobs": WHOLE,
    "tools": OBJECTS, "tool_choice": {"anyOf": [TEXT, OBJECT]}, "parallel_tool_calls": FLAG, "response_format": OBJECT,
    "grammar": TEXT, "reasoning_effort": TEXT, "chat_template_kwargs": OBJECT,
} | SAMPLING_FIELDS  # fmt: skip
ROUTES = tuple(
    Route(path, parse, ChatEncoder, error_json, fields=FIELDS, needed=("messages",), words="OpenAI: answer messages")
    for path in ("/v1/chat/completions", "/chat/completions")
)
