"""Ollama's /api/chat and /api/generate: lines of JSON, streamed unless the client says otherwise.

A tool's arguments are an object here, so a call is sent when it is whole. Times are in nanoseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.protocol import End, Event, Request, SamplingChoice, Usage
from moe_edge.runner.serve.dialects.dialect import NDJSON, Call, Reply, Route, arguments_object, dumps, gather
from moe_edge.runner.serve.dialects.openai_parse import (
    FLAG,
    MOST_TOKENS,
    OBJECT,
    OBJECTS,
    TEXT,
    chat_tools,
    sampling_of,
)
from moe_edge.runner.serve.fields import ApiError, Fields

ROLES = ("system", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")


def timestamp(seconds: float) -> str:
    """RFC 3339, as Ollama writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def parse_chat(body: Mapping[str, Any]) -> Call:
    """Raises ApiError naming the field."""
    f = Fields(body)
    if not f.items("messages"):
        return _nothing_to_say(f, {"message": {"role": "assistant", "content": ""}})
    tools = chat_tools(f)
    messages = tuple(_message(each) for each in f.objects("messages"))
    return _call(f, Request(messages=messages, tools=tools, **_common(f)))


def parse_generate(body: Mapping[str, Any]) -> Call:
    """Raises ApiError naming the field."""
    f = Fields(body)
    prompt = f.text("prompt")
    for name, why in (
        ("suffix", "filling in the middle"),
        ("context", "the form of the conversation is /api/chat"),
        ("images", "this server reads text only"),
        ("template", "the model's own template is used; with raw there is none"),
    ):
        if f.get(name):
            f.refuse(name, why)
    if not prompt:
        return _nothing_to_say(f, {"response": ""})
    if f.flag("raw"):
        return _call(f, Request(prompt=prompt, **_common(f)))
    system = f.text("system")
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    return _call(f, Request(messages=tuple(messages), **_common(f)))


def _nothing_to_say(f: Fields, empty: dict[str, Any]) -> Call:
    """A request without a question: Ollama's way to load a model, or with keep_alive 0 to let it go. It stays."""
    reason = "unload" if f.get("keep_alive") in (0, "0", "0s") else "load"
    model = f.text("model") or f.text("name") or ""
    return Call(
        Request(), model, False,
        answer={"model": model, "created_at": timestamp(0), **empty, "done": True, "done_reason": reason},
    )  # fmt: skip


def _call(f: Fields, request: Request) -> Call:
    return Call(request, f.text("model") or f.text("name") or "", f.flag("stream", True))


def _common(f: Fields) -> dict[str, Any]:
    """What both paths have: options, format, thinking."""
    o = f.object("options") or Fields({}, "options.")
    think, effort = f.get("think"), None
    if isinstance(think, str):
        effort, think = f.text("think", choices=EFFORTS), True
    elif think is not None:
        think = f.flag("think")
    schema, json_object = None, False
    form = f.get("format")
    if isinstance(form, Mapping):
        schema = form
    elif form not in (None, ""):
        json_object = f.text("format", choices=("json",)) == "json"
    limit = o.whole("num_predict", -2, MOST_TOKENS)
    sampling: SamplingChoice = sampling_of(o)
    return {
        "sampling": sampling, "stop": o.texts("stop"), "n_tokens": limit if limit and limit > 0 else None,
        "think": think, "effort": effort, "schema": schema, "json_object": json_object,
        "truncate": f.flag("truncate", True),
    }  # fmt: skip


def _message(m: Fields) -> dict[str, Any]:
    role = m.text("role", choices=ROLES)
    if role is None:
        raise ApiError(400, f"{m.where}role is missing", param=f"{m.where}role")
    if m.get("images"):
        m.refuse("images", "this server reads text only")
    message: dict[str, Any] = {"role": role, "content": m.text("content")}
    if thinking := m.text("thinking"):
        message["reasoning_content"] = thinking
    calls = m.objects("tool_calls") if role == "assistant" else []
    if calls:
        message["tool_calls"] = [_tool_call(each, at) for at, each in enumerate(calls)]
    if role == "tool":
        message |= {"content": message["content"] or "", "tool_call_id": m.text("tool_call_id") or ""}
        if name := m.text("tool_name") or m.text("name"):
            message["name"] = name
    return message


def _tool_call(c: Fields, at: int) -> dict[str, Any]:
    function = c.object("function")
    if function is None:
        raise ApiError(400, f"{c.where}function is missing", param=f"{c.where}function")
    arguments = function.object("arguments")
    text = json.dumps(arguments.values if arguments else {}, ensure_ascii=False)
    return {
        "id": c.text("id") or f"call{at:05d}",
        "type": "function",
        "function": {"name": function.needed_text("name"), "arguments": text},
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    """Ollama's counts; the cached part of the prompt is counted too, and named beside it."""
    total = usage.queue_seconds + usage.ttft_seconds + usage.decode_seconds
    return {
        "total_duration": int(1e9 * total),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int(1e9 * usage.ttft_seconds),
        "eval_count": usage.generated_tokens,
        "eval_duration": int(1e9 * usage.decode_seconds),
        "moe_edge": {"cached_tokens": usage.cached_tokens, **usage.traded},
    }


def error_json(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}


class OllamaEncoder:
    """Lines of /api/chat."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._calls: dict[int, tuple[str, str]] = {}  # begun and not yet sent: name, arguments

    def _said(self, text: str, **more: Any) -> dict[str, Any]:
        """What of a line holds the answer."""
        return {"message": {"role": "assistant", "content": text} | more}

    def _line(self, value: Mapping[str, Any], done: bool = False) -> str:
        r = self._reply
        return dumps({"model": r.model, "created_at": timestamp(r.created), **value, "done": done}) + "\n"

    def opening(self) -> str:
        return ""

    def event(self, event: Event) -> str:
        if isinstance(event, Text):
            return self._line(self._said(event.text))
        if isinstance(event, Reasoning):
            return self._line(self._said("", thinking=event.text))
        if isinstance(event, ToolStart):
            self._calls[event.index] = (event.name, "")
        elif isinstance(event, ToolArguments):
            name, arguments = self._calls[event.index]
            self._calls[event.index] = (name, arguments + event.text)
        elif isinstance(event, ToolEnd):
            return self._send([event.index])
        elif isinstance(event, End):
            return self._send(list(self._calls)) + self._line(self._ending(event, self._said("")), done=True)
        return ""

    def _send(self, indices: Sequence[int]) -> str:
        """Lines of calls that are whole, or that the reply's end has cut."""
        said = ""
        for index in indices:
            name, arguments = self._calls.pop(index)
            said += self._line(self._said("", tool_calls=[self._call(index, name, arguments)]))
        return said

    def _call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"index": index, "name": name, "arguments": arguments_object(arguments)}
        return {"id": self._reply.tool_id(index), "function": function}

    def _ending(self, end: End, said: dict[str, Any]) -> dict[str, Any]:
        reason = "length" if end.reason in ("length", "cancelled") else "stop"
        return {**said, "done_reason": reason, **usage_json(end.usage)}

    def failed(self, error: ApiError) -> str:
        return dumps(error_json(error)) + "\n"

    def keep_alive(self) -> str:
        return self._line(self._said(""))

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        got, r = gather(events), self._reply
        more: dict[str, Any] = {"thinking": got.reasoning} if got.reasoning else {}
        if got.tools:
            more["tool_calls"] = [
                self._call(index, name, arguments) for index, (name, arguments) in enumerate(got.tools)
            ]
        ending = self._ending(got.end, self._said(got.text, **more))
        return {"model": r.model, "created_at": timestamp(r.created), **ending, "done": True}


class GenerateEncoder(OllamaEncoder):
    """Lines of /api/generate."""

    def _said(self, text: str, **more: Any) -> dict[str, Any]:
        return {"response": text} | more


FIELDS = {"model": TEXT, "stream": FLAG, "options": OBJECT, "format": {"anyOf": [TEXT, OBJECT]},
          "think": {"anyOf": [FLAG, TEXT]}, "keep_alive": TEXT, "truncate": FLAG}  # fmt: skip
ROUTES = (
    Route("/api/chat", parse_chat, OllamaEncoder, error_json, NDJSON,
          fields=FIELDS | {"messages": OBJECTS, "tools": OBJECTS}, words="Ollama: answer messages"),
    Route("/api/generate", parse_generate, GenerateEncoder, error_json, NDJSON,
          fields=FIELDS | {"prompt": TEXT, "system": TEXT, "raw": FLAG}, words="Ollama: answer a prompt"),
)  # fmt: skip
