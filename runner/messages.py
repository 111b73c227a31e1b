"""Messages as chat templates want them: one form for what clients send in several, others for strict templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.chatformat.format import Message

TEXT_PARTS = ("text", "input_text", "output_text")


def plain_message(message: Message) -> Message:
    """developer is system; a content is one string, as templates add strings to it: empty where it is missing, put
    together where it is a list of parts.

    Raises UsageError for a message that has no role, and for parts that are no text.
    """
    role = message.get("role")
    if not isinstance(role, str):
        raise UsageError(f"a message has the role {role!r}; it needs one of system, user, assistant, tool")
    return {**message, "role": "system" if role == "developer" else role, "content": content_text(message)}


def content_text(message: Message) -> str:
    """What a message says. Raises UsageError."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise UsageError(f"a message has {type(content).__name__} as its content; it needs a text, or a list of texts")
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part if isinstance(part, str) else part.get("text") if kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise UsageError(f"a message has a part of the type {kind!r} in its content; models here read text only")
    return text


def forms_of(messages: list[Message]) -> Iterable[list[Message]]:
    """The messages as they are, then in forms for templates that are strict.

    Arguments of tool calls are objects, then JSON text: some templates go through them, some write them as they are.
    Without a system role: its text heads the first message of the user. With strict turns: messages of one role in a
    row are one.
    """
    for given in forms_of_arguments(messages):
        yield from _forms_of_turns(given)


def _forms_of_turns(messages: list[Message]) -> Iterable[list[Message]]:
    yield messages
    merged = merge_turns(messages)
    if merged != messages:
        yield merged
    if messages and messages[0]["role"] == "system":
        rest = [dict(message) for message in messages[1:]]
        first = next((message for message in rest if message["role"] == "user"), None)
        if first is not None:
            first["content"] = f"{messages[0]['content']}\n\n{first['content']}"
            yield rest
            yield merge_turns(rest)


def forms_of_arguments(messages: list[Message]) -> Iterable[list[Message]]:
    """The messages with the arguments of tool calls as objects, then as text; once where nobody calls."""
    yield [_with_arguments(message, _as_object) for message in messages]
    if any(message.get("tool_calls") for message in messages):
        yield [_with_arguments(message, _as_text) for message in messages]


def _with_arguments(message: Message, form: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = [
        {**call, "function": {**call["function"], "arguments": form(call["function"].get("arguments"))}}
        if isinstance(call.get("function"), Mapping) else call
        for call in calls
    ]  # fmt: skip
    return {**message, "tool_calls": changed}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments  # what a model wrote that is no JSON stays what it wrote
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def shows_python(messages: Sequence[Message], prompt: str) -> bool:
    """Whether arguments of a call stand in the prompt as Python writes a dictionary: no model was trained on that."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call.get("function", {}).get("arguments")
            if isinstance(arguments, Mapping) and arguments and str(dict(arguments)) in prompt:
                return True
    return False


def with_names(messages: list[Message]) -> list[Message]:
    """Results of tools with the name of their tool, which some templates ask for and clients leave out."""
    called = {
        call.get("id"): call["function"].get("name")
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call.get("function"), Mapping)
    }
    named = []
    for message in messages:
        name = called.get(message.get("tool_call_id"))
        lacks_one = message["role"] == "tool" and not message.get("name")
        named.append({**message, "name": name} if lacks_one and name else message)
    return named


def merge_turns(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role in a row put together; those with tool calls stand alone."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        if (
            last is not None and last["role"] == message["role"] and message["role"] in ("user", "assistant", "system")
            and "tool_calls" not in last and "tool_calls" not in message
        ):  # fmt: skip
            merged[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged
