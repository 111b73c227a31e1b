"""What a dialect is: a pair of pure converters, request JSON to Request, and events to what the client reads.

A dialect is one file of this folder that ends with its ROUTES; __init__.py finds them there. Nothing here knows HTTP
servers, threads or the engine, so every dialect is tested without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolArguments, ToolStart
from moe_edge.runner.events import TokenLogprob
from moe_edge.runner.protocol import End, Event, Logprobs, ModelFacts, Request, Usage
from moe_edge.runner.serve.fields import ApiError

SSE = "text/event-stream; charset=utf-8"
NDJSON = "application/x-ndjson"


@dataclass(frozen=True)
class Reply:
    """What is the same in all parts of one answer. id: without a dialect's prefix. created: seconds since 1970.

    model: the name the client used, which is echoed. options: what the parser keeps for the encoder. prompt_tokens: of
    the prompt, the cached ones included.
    """

    id: str
    created: int
    model: str
    facts: ModelFacts
    options: Mapping[str, Any]
    prompt_tokens: int = 0

    def tool_id(self, index: int) -> str:
        """The id of a tool call of this reply. Nine letters and digits, which is all that Mistral's templates take."""
        return f"{self.id[:7]}{index % 100:02d}"


@dataclass(frozen=True)
class Call:
    """A parsed body. answer: what to say at once, where nothing is to be generated."""

    request: Request
    model: str
    stream: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None


class Encoder(Protocol):
    """The way back. In a stream: opening(), then event() for each, the End last; failed() in place of the rest."""

    def opening(self) -> str: ...

    def event(self, event: Event) -> str: ...

    def failed(self, error: ApiError) -> str: ...

    def keep_alive(self) -> str:
        """Something that every client skips, while a prompt is evaluated; empty where the dialect has no such thing."""
        ...

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The answer in one piece."""
        ...


@dataclass(frozen=True)
class Route:
    """One path that generates, by POST.

    error: an ApiError as this dialect's JSON. media_type: of a stream. counts_only: prompt tokens -> the answer, where
    nothing is generated. fields: the request's properties as JSON schema, for /openapi.json. needed: those that must be
    there. words: what the path is for.
    """

    path: str
    parse: Callable[[Mapping[str, Any]], Call]
    encoder: Callable[[Reply], Encoder]
    error: Callable[[ApiError], dict[str, Any]]
    media_type: str = SSE
    counts_only: Callable[[int], dict[str, Any]] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Question:
    """One path that is answered from what is known of the model.

    answer: (facts, the body or nothing, the rest of the path where it ends with `{name}`) -> JSON. Raises ApiError.
    """

    path: str
    answer: Callable[[ModelFacts, Mapping[str, Any], str], dict[str, Any]]
    method: str = "GET"
    words: str = ""


@dataclass
class Gathered:
    """The parts of a finished answer."""

    text: str = ""
    reasoning: str = ""
    tools: tuple[tuple[str, str], ...] = ()  # name, arguments
    logprobs: tuple[TokenLogprob, ...] = ()
    end: End = field(default_factory=lambda: End("stop", Usage()))


def gather(events: Sequence[Event]) -> Gathered:
    """All events of a reply put together."""
    got = Gathered()
    text, reasoning = [], []
    logprobs: list[TokenLogprob] = []
    tools: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, Text):
            text.append(event.text)
        elif isinstance(event, Logprobs):
            logprobs += event.tokens
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, ToolStart):
            tools[event.index] = [event.name, ""]
        elif isinstance(event, ToolArguments):
            tools[event.index][1] += event.text
        elif isinstance(event, End):
            got.end = event
    got.text, got.reasoning = "".join(text), "".join(reasoning)
    got.logprobs = tuple(logprobs)
    got.tools = tuple((each[0], each[1]) for _, each in sorted(tools.items()))
    return got


def dumps(value: Any) -> str:
    """Compact JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def sse(value: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {dumps(value)}\n\n"


def arguments_object(text: str) -> dict[str, Any]:
    """A tool call's arguments as the object that some dialects want; what is none comes back under `arguments`."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = text
    return value if isinstance(value, dict) else {"arguments": value}
