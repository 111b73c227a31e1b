"""What OpenAI's endpoints share on the way in: messages, tools, response formats, sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_edge.runner.protocol import SamplingChoice, ToolChoice
from moe_edge.runner.serve.fields import ApiError, Fields

MOST_TOKENS = 2**31 - 1
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def sampling_of(f: Fields) -> SamplingChoice:
    """OpenAI's knobs, and llama-server's beside them under their own names."""
    return SamplingChoice(
        temp=f.number("temperature", 0, 100),
        top_k=f.whole("top_k", -1, MOST_TOKENS),
        top_p=f.number("top_p", 0, 1),
        min_p=f.number("min_p", 0, 1),
        repeat_penalty=f.number("repeat_penalty", 0.01, 100),
        presence_penalty=f.number("presence_penalty", -100, 100),
        frequency_penalty=f.number("frequency_penalty", -100, 100),
        seed=_seed(f),
        logit_bias=_logit_bias(f),
    )


def _seed(f: Fields) -> int | None:
    seed = f.whole("seed", -(2**63), 2**64 - 1)
    return None if seed is None or seed == -1 else seed % 2**32


def _logit_bias(f: Fields) -> tuple[tuple[int, float], ...]:
    biases = f.object("logit_bias")
    if biases is None:
        return ()
    found = []
    for key in biases.values:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise ApiError(400, f"logit_bias has {key!r}, which is no token id", param="logit_bias")
        bias = biases.number(key, -100, 100)
        if bias is not None:
            found.append((int(key), bias))
    return tuple(found)


def content_text(f: Fields, name: str = "content") -> str | None:
    """Text of a message: a string, a list of text parts, or None. Raises ApiError for pictures and sound."""
    value = f.get(name)
    if value is None or isinstance(value, str):
        return f.text(name)
    if not isinstance(value, list):
        raise f.wrong(name, "a string or a list of parts")
    texts = []
    for part in f.objects(name):
        kind = part.text("type") or "text"
        if kind in ("text", "input_text", "output_text"):
            texts.append(part.needed_text("text"))
        elif kind == "refusal":
            texts.append(part.text("refusal") or "")
        else:
            part.refuse("type", f"'{kind}' parts; this server reads text only")
    return "".join(texts)


def chat_messages(f: Fields) -> tuple[dict[str, Any], ...]:
    """`messages` as the templates want them: content a string or None. Raises ApiError."""
    found = f.objects("messages")
    if not found:
        raise ApiError(400, "messages is missing or empty", param="messages")
    return tuple(_message(each) for each in found)


def _message(m: Fields) -> dict[str, Any]:
    role = m.needed_text("role")
    if role not in ROLES:
        raise m.wrong("role", f"one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role, "content": content_text(m)}
    thinking = m.text("reasoning_content") or m.text("reasoning")
    if thinking:
        message["reasoning_content"] = thinking
    if role == "assistant" and m.get("tool_calls"):
        message["tool_calls"] = [_tool_call(each, at) for at, each in enumerate(m.objects("tool_calls"))]
    if role in ("tool", "function"):
        message["role"] = "tool"
        message["content"] = message["content"] or ""
        message["tool_call_id"] = m.text("tool_call_id") or ""
        if (name := m.text("name")) is not None:
            message["name"] = name
    return message


def _tool_call(c: Fields, at: int) -> dict[str, Any]:
    function = c.object("function")
    if function is None:
        raise ApiError(400, f"{c.where}function is missing", param=f"{c.where}function")
    arguments = function.get("arguments")
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else function.text("arguments")
    return {
        "id": c.text("id") or f"call_{at}",
        "type": "function",
        "function": {"name": function.needed_text("name"), "arguments": text or "{}"},
    }


def tool_of(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool as templates want it, with every field that one may look for."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description or "",
            "parameters": parameters or {"type": "object", "properties": {}},
        },
    }


def chat_tools(f: Fields) -> tuple[dict[str, Any], ...]:
    """`tools`, functions only. Raises ApiError for the old `functions`, and for other kinds of tools."""
    if f.get("functions"):
        f.refuse("functions", "it is the old form; use tools")
    found = []
    for tool in f.objects("tools"):
        kind = tool.text("type") or "function"
        if kind != "function":
            tool.refuse("type", f"'{kind}' tools")
        function = tool.object("function")
        if function is None:
            raise ApiError(400, f"{tool.where}function is missing", param=f"{tool.where}function")
        parameters = function.object("parameters")
        found.append(
            tool_of(
                function.needed_text("name"), function.text("description"), parameters.values if parameters else None
            )
        )
    return tuple(found)


# ---- JSON schemas of fields, for /openapi.json

NUMBER, WHOLE, TEXT, FLAG = {"type": "number"}, {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
OBJECT = {"type": "object"}
OBJECTS = {"type": "array", "items": OBJECT}
TEXTS = {"type": "array", "items": TEXT}
TEXT_OR_TEXTS = {"anyOf": [TEXT, TEXTS]}
SAMPLING_FIELDS = {
    "temperature": NUMBER, "top_k": WHOLE, "top_p": NUMBER, "min_p": NUMBER, "repeat_penalty": NUMBER,
    "presence_penalty": NUMBER, "frequency_penalty": NUMBER, "seed": WHOLE, "logit_bias": OBJECT,
}  # fmt: skip


# ---- what both chat endpoints do with tools


def tool_choice_of(f: Fields, names: tuple[str, ...]) -> ToolChoice:
    """auto, none, required, or one tool by name, in OpenAI's two spellings."""
    value = f.get("tool_choice")
    if value is None:
        return ToolChoice("auto" if names else "none")
    if isinstance(value, str):
        mode = f.text("tool_choice", choices=("auto", "none", "required"))
        if mode == "required" and not names:
            raise ApiError(400, "tool_choice is required but there are no tools", param="tool_choice")
        return ToolChoice(mode or "auto")
    choice = Fields(value, "tool_choice.")
    if (choice.text("type") or "function") != "function":
        choice.refuse("type", "only functions can be chosen")
    inner = choice.object("function")
    name = inner.needed_text("name") if inner is not None else choice.needed_text("name")
    if name not in names:
        raise ApiError(400, f"tool_choice names '{name}', which is not among the tools", param="tool_choice")
    return ToolChoice("required", name)


def response_format(f: Fields | None, schema_at: str | None = "json_schema") -> tuple[Mapping[str, Any] | None, bool]:
    """(schema, any JSON object). schema_at: the field that holds the schema's wrapper; None: it stands beside type."""
    if f is None:
        return None, False
    kind = f.text("type", choices=("text", "json_object", "json_schema"))
    if kind == "json_object":
        inner = f.object("schema")  # llama-server's way
        return (inner.values, False) if inner is not None else (None, True)
    if kind != "json_schema":
        return None, False
    holder = f.object(schema_at) if schema_at else f
    if holder is None:
        raise ApiError(400, f"{f.where}{schema_at} is missing", param=f"{f.where}{schema_at}")
    schema = holder.object("schema")
    return (schema.values, False) if schema is not None else (None, True)
