"""OpenAI's /v1/responses, on the way back: output items, and the events that build them.

Every event has content_index, output_index and item_id where OpenAI's has: the SDK breaks without them. A delta comes
only after its item was added, and the last event has the whole answer under the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolStart
from moe_edge.runner.protocol import End, Event, Usage
from moe_edge.runner.serve.dialects.dialect import Reply, sse
from moe_edge.runner.serve.fields import ApiError

PART_OF = {"message": "output_text", "reasoning": "reasoning_text"}
PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
        "moe_edge": dict(usage.traded),
    }


class ResponsesEncoder:
    """One response. Items are made one after the other: thinking, answer, calls."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._sequence = 0
        self._output: list[dict[str, Any]] = []  # items, the last one perhaps still open
        self._text = ""  # of the open item
        self._open = False

    # ---- the stream

    def opening(self) -> str:
        response = self._response("in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def event(self, event: Event) -> str:
        if isinstance(event, Text):
            return self._piece("message", event.text)
        if isinstance(event, Reasoning):
            return self._piece("reasoning", event.text)
        if isinstance(event, ToolStart):
            call = {"call_id": self._reply.tool_id(event.index), "name": event.name, "arguments": ""}
            return self._close() + self._begin("function_call", call)
        if isinstance(event, ToolArguments):
            self._text += event.text
            return self._event("response.function_call_arguments.delta", **self._at(), delta=event.text)
        return self._ending(event) if isinstance(event, End) else ""

    def failed(self, error: ApiError) -> str:
        said = {"code": error.code or "server_error", "message": error.message}
        response = self._response("failed", None) | {"error": said}
        last = {"code": said["code"], "message": error.message, "param": error.param}
        return self._event("response.failed", response=response) + self._event("error", **last)

    def keep_alive(self) -> str:
        return ": still evaluating the prompt\n\n"

    def _event(self, kind: str, /, **fields: Any) -> str:
        value = {"type": kind, "sequence_number": self._sequence} | fields
        self._sequence += 1
        return sse(value, kind)

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _piece(self, kind: str, text: str) -> str:
        said = ""
        if not self._open or self._output[-1]["type"] != kind:
            said = self._close() + self._begin(kind, {"role": "assistant"} if kind == "message" else {"summary": []})
            part = self._part(kind, "")
            said += self._event("response.content_part.added", **self._at(), content_index=0, part=part)
        self._text += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        name = f"response.{PART_OF[kind]}.delta"
        return said + self._event(name, **self._at(), content_index=0, delta=text, **more)

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
        return {"type": PART_OF[kind], "text": text} | more

    def _begin(self, kind: str, fields: dict[str, Any]) -> str:
        item = {"type": kind, "id": f"{PREFIX[kind]}_{self._reply.id}{len(self._output):02d}", "status": "in_progress"}
        if kind in PART_OF:
            item |= {"content": []}  # type: ignore[dict-item]
        self._output.append(item | fields)
        self._text, self._open = "", True
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=self._output[-1])

    def _close(self) -> str:
        if not self._open:
            return ""
        self._open = False
        item = self._output[-1]
        kind, said = item["type"], ""
        item = item | {"status": "completed"}
        if kind in PART_OF:
            part = self._part(kind, self._text)
            more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            name = f"response.{PART_OF[kind]}.done"
            said += self._event(name, **self._at(), content_index=0, text=self._text, **more)
            said += self._event("response.content_part.done", **self._at(), content_index=0, part=part)
            item["content"] = [part]
        else:
            item["arguments"] = self._text or "{}"
            done = self._at() | {"name": item["name"], "arguments": item["arguments"]}
            said += self._event("response.function_call_arguments.done", **done)
        self._output[-1] = item
        return said + self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _ending(self, end: End) -> str:
        said = self._close()
        status = "incomplete" if end.reason in ("length", "cancelled") else "completed"
        return said + self._event(f"response.{status}", response=self._response(status, end.usage))

    # ---- the whole

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        end = End("stop", Usage())
        for event in events:
            self.event(event)
            end = event if isinstance(event, End) else end
        status = "incomplete" if end.reason in ("length", "cancelled") else "completed"
        return self._response(status, end.usage)

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        r = self._reply
        return {
            "id": f"resp_{r.id}",
            "object": "response",
            "created_at": r.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": r.options["instructions"],
            "metadata": r.options["metadata"],
            "model": r.model,
            "output": list(self._output),
            "parallel_tool_calls": r.options["parallel_tool_calls"],
            "previous_response_id": None,
            "store": False,
            "temperature": None,
            "text": {"format": {"type": "text"}},
            "tool_choice": r.options["tool_choice"],
            "tools": r.options["tools"],
            "top_p": None,
            "truncation": r.options["truncation"],
            "usage": None if usage is None else usage_json(usage),
        }
