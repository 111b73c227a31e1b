"""Anthropic's /v1/messages and /v1/messages/count_tokens, on the way back.

Every event has its `event:` line, blocks are numbered without a gap, and no delta comes before its block: the SDK
breaks otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolStart
from moe_edge.runner.protocol import End, Event, Usage
from moe_edge.runner.serve.dialects.anthropic_parse import parse
from moe_edge.runner.serve.dialects.dialect import Reply, Route, arguments_object, gather, sse
from moe_edge.runner.serve.dialects.openai_parse import FLAG, NUMBER, OBJECT, OBJECTS, TEXT, TEXTS, WHOLE
from moe_edge.runner.serve.fields import CONTEXT_CODE, ApiError

STOP_REASON = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "cancelled": "max_tokens"}
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
         429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip


def usage_json(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was found in the cache apart from the rest of the prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.generated_tokens,
        "moe_edge": dict(usage.traded),
    }


def error_json(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    # Claude Code makes its conversation shorter when it reads these words.
    prefix = "prompt is too long: " if error.code == CONTEXT_CODE else ""
    return {"type": "error", "error": {"type": kind, "message": prefix + error.message}}


def stop_reason(end: End) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence)."""
    if end.stop_text is not None:
        return "stop_sequence", end.stop_text
    return STOP_REASON.get(end.reason, "end_turn"), None


class MessagesEncoder:
    """One message, in blocks."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._n = 0  # blocks that were begun
        self._open: str | None = None  # the kind of the last one, while it is open

    def _message(self) -> dict[str, Any]:
        r = self._reply
        return {"id": f"msg_{r.id}", "type": "message", "role": "assistant", "model": r.model, "content": [],
                "stop_reason": None, "stop_sequence": None}  # fmt: skip

    def opening(self) -> str:
        usage = usage_json(Usage(prompt_tokens=self._reply.prompt_tokens))
        return self._event("message_start", message=self._message() | {"usage": usage})

    def _event(self, name: str, **fields: Any) -> str:
        return sse({"type": name} | fields, name)

    def _begin(self, kind: str, block: dict[str, Any]) -> str:
        said = self._close()
        self._open, self._n = kind, self._n + 1
        return said + self._event("content_block_start", index=self._n - 1, content_block={"type": kind} | block)

    def _close(self) -> str:
        if self._open is None:
            return ""
        said = self._delta(type="signature_delta", signature="") if self._open == "thinking" else ""
        self._open = None
        return said + self._event("content_block_stop", index=self._n - 1)

    def _delta(self, **delta: Any) -> str:
        return self._event("content_block_delta", index=self._n - 1, delta=delta)

    def event(self, event: Event) -> str:
        if isinstance(event, Text):
            said = "" if self._open == "text" else self._begin("text", {"text": ""})
            return said + self._delta(type="text_delta", text=event.text)
        if isinstance(event, Reasoning):
            said = "" if self._open == "thinking" else self._begin("thinking", {"thinking": "", "signature": ""})
            return said + self._delta(type="thinking_delta", thinking=event.text)
        if isinstance(event, ToolStart):
            return self._begin("tool_use", {"id": self._reply.tool_id(event.index), "name": event.name, "input": {}})
        if isinstance(event, ToolArguments):
            return self._delta(type="input_json_delta", partial_json=event.text)
        return self._ending(event) if isinstance(event, End) else ""

    def _ending(self, end: End) -> str:
        reason, text = stop_reason(end)
        delta = {"stop_reason": reason, "stop_sequence": text}
        last = self._event("message_delta", delta=delta, usage=usage_json(end.usage))
        return self._close() + last + self._event("message_stop")

    def failed(self, error: ApiError) -> str:
        return sse(error_json(error), "error")

    def keep_alive(self) -> str:
        return self._event("ping")

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        got = gather(events)
        content: list[dict[str, Any]] = []
        if got.reasoning:
            content.append({"type": "thinking", "thinking": got.reasoning, "signature": ""})
        if got.text:
            content.append({"type": "text", "text": got.text})
        for index, (name, arguments) in enumerate(got.tools):
            given = arguments_object(arguments)
            content.append({"type": "tool_use", "id": self._reply.tool_id(index), "name": name, "input": given})
        reason, text = stop_reason(got.end)
        return self._message() | {
            "content": content, "stop_reason": reason, "stop_sequence": text, "usage": usage_json(got.end.usage),
        }  # fmt: skip


FIELDS = {
    "model": TEXT, "messages": OBJECTS, "max_tokens": WHOLE, "system": {"anyOf": [TEXT, OBJECTS]}, "stream": FLAG,
    "temperature": NUMBER, "top_k": WHOLE, "top_p": NUMBER, "stop_sequences": TEXTS, "tools": OBJECTS,
    "tool_choice": OBJECT, "thinking": OBJECT, "output_config": OBJECT, "mcp_servers": OBJECTS,
}  # fmt: skip
ROUTES = (
    Route("/v1/messages", parse, MessagesEncoder, error_json, fields=FIELDS, needed=("messages",),
          words="Anthropic: answer messages"),
    Route("/v1/messages/count_tokens", parse, MessagesEncoder, error_json, fields=FIELDS, needed=("messages",),
          counts_only=lambda n: {"input_tokens": n}, words="Anthropic: how long a prompt is"),
)  # fmt: skip
