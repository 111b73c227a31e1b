"""OpenAI's /v1/responses, on the way in. Codex speaks nothing else; openai_responses_out.py has the way back.

Nothing is stored here: the client sends the whole history each time, as Codex does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_edge.runner.protocol import Request
from moe_edge.runner.serve.dialects.dialect import Call, Route
from moe_edge.runner.serve.dialects.openai_chat import error_json
from moe_edge.runner.serve.dialects.openai_parse import (
    EFFORTS,
    FLAG,
    MOST_TOKENS,
    OBJECT,
    OBJECTS,
    SAMPLING_FIELDS,
    TEXT,
    WHOLE,
    content_text,
    response_format,
    sampling_of,
    tool_choice_of,
    tool_of,
)
from moe_edge.runner.serve.dialects.openai_responses_out import ResponsesEncoder
from moe_edge.runner.serve.fields import ApiError, Fields

STATELESS = "this server keeps no answers; send the whole conversation as input"


def parse(body: Mapping[str, Any]) -> Call:
    """Raises ApiError naming the field."""
    f = Fields(body)
    for name in ("previous_response_id", "conversation"):
        if name in f:
            f.refuse(name, STATELESS)
    if f.flag("background"):
        f.refuse("background", "answers are made while the client waits")
    if "prompt" in f:
        f.refuse("prompt", "there are no stored prompts; give instructions and input")
    text, reasoning, metadata = f.object("text"), f.object("reasoning"), f.object("metadata")
    schema, json_object = response_format(text.object("format") if text else None, None)
    tools = _tools(f)
    choice = tool_choice_of(f, tuple(tool["function"]["name"] for tool in tools))
    instructions = f.text("instructions")
    messages = _messages(f)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    request = Request(
        messages=tuple(messages),
        tools=tools if choice.mode != "none" else (),
        tool_choice=choice,
        one_tool=not f.flag("parallel_tool_calls", True),
        schema=schema,
        json_object=json_object,
        n_tokens=f.whole("max_output_tokens", 1, MOST_TOKENS),
        truncate=f.text("truncation", choices=("auto", "disabled")) == "auto",
        sampling=sampling_of(f),
        effort=reasoning.text("effort", choices=EFFORTS) if reasoning else None,
    )
    options = {
        "instructions": instructions,
        "metadata": dict(metadata.values) if metadata else {},
        "truncation": "auto" if request.truncate else "disabled",
        "parallel_tool_calls": not request.one_tool,
        "tools": [each for each in f.items("tools") if isinstance(each, Mapping) and each.get("type") == "function"],
        "tool_choice": f.get("tool_choice") or "auto",
    }
    return Call(request, f.text("model") or "", f.flag("stream"), options)


def _tools(f: Fields) -> tuple[dict[str, Any], ...]:
    """Functions only. Codex lists tools of other kinds too, which would be the server's to run: they are left out."""
    found = []
    for tool in f.objects("tools"):
        if tool.text("type") == "function":
            parameters = tool.object("parameters")
            found.append(
                tool_of(tool.needed_text("name"), tool.text("description"), parameters.values if parameters else None)
            )
    return tuple(found)


def _messages(f: Fields) -> list[dict[str, Any]]:
    """`input`: a text, or the items of a conversation, as messages. Raises ApiError."""
    value = f.get("input")
    if isinstance(value, str):
        return [{"role": "user", "content": f.needed_text("input")}]
    if not isinstance(value, list) or not value:
        raise f.wrong("input", "a string or a list of items")
    history = _History()
    for item in f.objects("input"):
        history.add(item)
    return history.finished()


class _History:
    """Items in, messages out: what an assistant thought, said and called in a row is one message."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._thinking = ""

    def add(self, item: Fields) -> None:
        kind = item.text("type") or "message"
        if kind == "message":
            self._message(item)
        elif kind == "function_call":
            self._call(item)
        elif kind == "function_call_output":
            output = _output_text(item)
            self._messages.append(
                {"role": "tool", "content": output, "tool_call_id": item.text("call_id") or ""}
            )
        elif kind == "reasoning":
            parts = item.objects("content") or item.objects("summary")
            self._thinking += "".join(part.text("text") or "" for part in parts)
        elif kind == "item_reference":
            item.refuse("type", STATELESS)
        # what other tools of the client's said of themselves is not for this model

    def _message(self, item: Fields) -> None:
        role = item.text("role", "user", choices=("user", "assistant", "system", "developer"))
        content = content_text(item)
        if role == "assistant":
            self._assistant()["content"] = (self._assistant()["content"] or "") + (content or "")
        else:
            self._messages.append({"role": role, "content": content})

    def _call(self, item: Fields) -> None:
        call = {
            "id": item.text("call_id") or item.text("id") or "",
            "type": "function",
            "function": {"name": item.needed_text("name"), "arguments": item.text("arguments") or "{}"},
        }
        self._assistant().setdefault("tool_calls", []).append(call)

    def _assistant(self) -> dict[str, Any]:
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._messages.append({"role": "assistant", "content": None})
        if self._thinking:
            self._messages[-1]["reasoning_content"], self._thinking = self._thinking, ""
        return self._messages[-1]

    def finished(self) -> list[dict[str, Any]]:
        if not self._messages:
            raise ApiError(400, "input has no messages", param="input")
        return self._messages


def _output_text(item: Fields) -> str:
    """What a function gave: a text, parts, or any other JSON."""
    value = item.get("output")
    if isinstance(value, str | list):
        return content_text(item, "output") or ""
    return json.dumps(value, ensure_ascii=False)


FIELDS = {
    "model": TEXT, "input": {"anyOf": [TEXT, OBJECTS]}, "instructions": TEXT, "stream": FLAG,
    "max_output_tokens": WHOLE, "tools": OBJECTS, "tool_choice": {"anyOf": [TEXT, OBJECT]},
    "parallel_tool_calls": FLAG, "text": OBJECT, "reasoning": OBJECT, "metadata": OBJECT, "truncation": TEXT,
    "previous_response_id": TEXT, "background": FLAG,
} | SAMPLING_FIELDS  # fmt: skip
ROUTES = tuple(
    Route(path, parse, ResponsesEncoder, error_json, fields=FIELDS, needed=("input",), words="OpenAI: as Codex asks")
    for path in ("/v1/responses", "/responses")
)
