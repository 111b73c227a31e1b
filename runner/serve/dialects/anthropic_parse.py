"""Anthropic's /v1/messages, on the way in: as Claude Code and the anthropic SDK send it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_edge.runner.protocol import Request, SamplingChoice, ToolChoice
from moe_edge.runner.serve.dialects.dialect import Call
from moe_edge.runner.serve.dialects.openai_parse import MOST_TOKENS, response_format, tool_of
from moe_edge.runner.serve.fields import ApiError, Fields

# Claude Code's first block of the system prompt. It differs from request to request, and nothing behind it could be
# found in the KV cache again.
BILLING = "x-anthropic-billing-header:"


def parse(body: Mapping[str, Any]) -> Call:
    """Raises ApiError naming the field."""
    f = Fields(body)
    if "mcp_servers" in f and f.items("mcp_servers"):
        f.refuse("mcp_servers", "tools are the client's to run")
    tools = _tools(f)
    choice, one_tool = _tool_choice(f, tuple(tool["function"]["name"] for tool in tools))
    thinking, output = f.object("thinking"), f.object("output_config")
    kind = thinking.text("type", choices=("enabled", "disabled", "adaptive")) if thinking else None
    form = output.object("format") if output else None
    schema, json_object = response_format(form or f.object("output_format"), None)
    request = Request(
        messages=(*_system(f), *_messages(f)),
        tools=tools if choice.mode != "none" else (),
        tool_choice=choice,
        one_tool=one_tool,
        schema=schema,
        json_object=json_object,
        n_tokens=f.whole("max_tokens", 1, MOST_TOKENS),
        sampling=SamplingChoice(
            temp=f.number("temperature", 0, 2), top_k=f.whole("top_k", -1, MOST_TOKENS), top_p=f.number("top_p", 0, 1)
        ),
        stop=f.texts("stop_sequences"),
        think={"enabled": True, "disabled": False}.get(kind or ""),
        effort=output.text("effort") if output else None,
    )
    return Call(request, f.text("model") or "", f.flag("stream"))


def _system(f: Fields) -> list[dict[str, Any]]:
    value = f.get("system")
    if value is None:
        return []
    texts = [f.needed_text("system")] if isinstance(value, str) else [_block_text(each) for each in f.objects("system")]
    kept = [text for text in (without_billing(text) for text in texts) if text]
    return [{"role": "system", "content": "\n\n".join(kept)}] if kept else []


def without_billing(text: str) -> str:
    """A block of the system prompt without Claude Code's billing line, which changes each time."""
    if not text.startswith(BILLING):
        return text
    _, _, rest = text.partition("\n")
    return rest.lstrip("\n")


def _block_text(block: Fields) -> str:
    kind = block.text("type") or "text"
    if kind != "text":
        block.refuse("type", f"'{kind}' blocks here; this server reads text only")
    return block.needed_text("text")


def _messages(f: Fields) -> list[dict[str, Any]]:
    found = f.objects("messages")
    if not found:
        raise ApiError(400, "messages is missing or empty", param="messages")
    return [message for each in found for message in _message(each)]


def _message(m: Fields) -> list[dict[str, Any]]:
    """One of Anthropic's messages as messages of OpenAI's form: results of tools are messages of their own there."""
    role = m.needed_text("role")
    if role not in ("user", "assistant", "system"):
        raise m.wrong("role", "user or assistant")
    content = m.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": m.needed_text("content")}]
    if not isinstance(content, list):
        raise m.wrong("content", "a string or a list of blocks")
    return _assistant(m) if role == "assistant" else _user(m, role)


def _assistant(m: Fields) -> list[dict[str, Any]]:
    text, thinking, calls = "", "", []
    for block in m.objects("content"):
        kind = block.text("type")
        if kind == "text":
            text += block.needed_text("text")
        elif kind == "thinking":
            thinking += block.text("thinking") or ""
        elif kind == "tool_use":
            given = block.object("input")
            arguments = json.dumps(given.values if given else {}, ensure_ascii=False)
            function = {"name": block.needed_text("name"), "arguments": arguments}
            calls.append({"id": block.text("id") or "", "type": "function", "function": function})
        elif kind != "redacted_thinking":
            block.refuse("type", f"'{kind}' blocks of an assistant")
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    return [message]


def _user(m: Fields, role: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for block in m.objects("content"):
        if block.text("type") == "tool_result":
            messages.append(
                {"role": "tool", "tool_call_id": block.text("tool_use_id") or "", "content": _result(block)}
            )
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + _block_text(block)
        else:
            messages.append({"role": role, "content": _block_text(block)})
    return messages or [{"role": role, "content": ""}]


def _result(block: Fields) -> str:
    value = block.get("content")
    if value is None or isinstance(value, str):
        text = block.text("content") or ""
    else:
        text = "\n".join(_block_text(each) for each in block.objects("content"))
    return f"Error: {text}" if block.flag("is_error") else text


def _tools(f: Fields) -> tuple[dict[str, Any], ...]:
    """The client's own tools. Those that Anthropic's servers would run have a type and no schema: they are left out."""
    found = []
    for tool in f.objects("tools"):
        if (tool.text("type") or "custom") == "custom":
            schema = tool.object("input_schema")
            found.append(
                tool_of(tool.needed_text("name"), tool.text("description"), schema.values if schema else None)
            )
    return tuple(found)


def _tool_choice(f: Fields, names: tuple[str, ...]) -> tuple[ToolChoice, bool]:
    """(choice, at most one call)."""
    c = f.object("tool_choice")
    if c is None:
        return ToolChoice("auto" if names else "none"), False
    kind, one = c.text("type", "auto", choices=("auto", "any", "tool", "none")), c.flag("disable_parallel_tool_use")
    if kind in ("any", "tool") and not names:
        raise ApiError(400, f"tool_choice is {kind} but there are no tools", param="tool_choice")
    if kind == "tool":
        name = c.needed_text("name")
        if name not in names:
            raise ApiError(400, f"tool_choice names '{name}', which is not among the tools", param="tool_choice")
        return ToolChoice("required", name), one
    return ToolChoice({"any": "required", "none": "none"}.get(kind or "", "auto")), one
