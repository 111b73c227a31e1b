"""OpenAI's /v1/completions: a text is continued. Old, but editors and evaluation harnesses still use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.chatformat.parts import Text
from moe_edge.runner.events import TokenLogprob
from moe_edge.runner.protocol import End, Event, Logprobs, Request
from moe_edge.runner.serve.dialects.dialect import Call, Reply, Route, dumps, gather, sse
from moe_edge.runner.serve.dialects.openai_chat import FINISH, error_json, timings_json, usage_json
from moe_edge.runner.serve.dialects.openai_parse import (
    FLAG,
    MOST_TOKENS,
    OBJECT,
    SAMPLING_FIELDS,
    TEXT,
    TEXT_OR_TEXTS,
    WHOLE,
    response_format,
    sampling_of,
)
from moe_edge.runner.serve.fields import ApiError, Fields

DEFAULT_TOKENS = 16  # OpenAI's


def parse(body: Mapping[str, Any]) -> Call:
    """Raises ApiError naming the field."""
    f = Fields(body)
    for name in ("n", "best_of"):
        if (f.whole(name, 1, 128) or 1) != 1:
            f.refuse(name, "one answer a request")
    if f.get("suffix"):
        f.refuse("suffix", "filling in the middle")
    stream_options = f.object("stream_options")
    logprobs = f.whole("logprobs", 0, 20)
    schema, json_object = response_format(f.object("response_format"))
    n_tokens = f.whole("max_tokens", 1, MOST_TOKENS)
    request = Request(
        prompt=_prompt(f),
        schema=schema,
        json_object=json_object,
        grammar=f.text("grammar"),
        n_tokens=n_tokens or DEFAULT_TOKENS,
        sampling=sampling_of(f),
        stop=f.texts("stop"),
        logprobs=logprobs,
    )
    if f.flag("echo") and not isinstance(request.prompt, str):
        f.refuse("echo", "a prompt of token ids; give it as text")
    options = {
        "include_usage": stream_options is not None and stream_options.flag("include_usage"),
        "echo": request.prompt if f.flag("echo") else "",
        "logprobs": logprobs is not None,
    }
    return Call(request, f.text("model") or "", f.flag("stream"), options)


def _prompt(f: Fields) -> str | tuple[int, ...]:
    """A text, token ids, or a list that holds one of either."""
    value = f.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return Fields({"prompt": value}).needed_text("prompt")
    if value is None:
        raise ApiError(400, "prompt is missing", param="prompt")
    if isinstance(value, list) and value and all(type(each) is int and 0 <= each < 2**31 for each in value):
        return tuple(value)
    if isinstance(value, list) and len(value) > 1 and all(isinstance(each, str | list) for each in value):
        f.refuse("prompt", "several prompts in one request")
    raise f.wrong("prompt", "a string or a list of token ids")


def _logprobs_json(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [each.data.decode(errors="replace") for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{d.decode(errors="replace"): value for _, d, value in each.top} for each in logprobs],
    }


class CompletionEncoder:
    """text_completion."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._logprobs: tuple[TokenLogprob, ...] = ()  # of the next Text

    def _head(self) -> dict[str, Any]:
        r = self._reply
        return {"id": f"cmpl-{r.id}", "object": "text_completion", "created": r.created, "model": r.model}

    def _choice(self, text: str, finish: str | None, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        known = _logprobs_json(logprobs) if self._reply.options["logprobs"] and logprobs else None
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": known}

    def opening(self) -> str:
        echo = self._reply.options["echo"]
        return sse(self._head() | {"choices": [self._choice(echo, None, ())]}) if echo else ""

    def event(self, event: Event) -> str:
        if isinstance(event, Logprobs):
            self._logprobs += event.tokens
        if isinstance(event, Text):
            known, self._logprobs = self._logprobs, ()
            return sse(self._head() | {"choices": [self._choice(event.text, None, known)]})
        if not isinstance(event, End):
            return ""
        choice = self._choice("", FINISH.get(event.reason, "stop"), ())
        last = sse(self._head() | {"choices": [choice], "timings": timings_json(event.usage)})
        if self._reply.options["include_usage"]:
            last += sse(self._head() | {"choices": [], "usage": usage_json(event.usage)})
        return last + "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> str:
        return f"data: {dumps(error_json(error))}\n\n"

    def keep_alive(self) -> str:
        return ": still evaluating the prompt\n\n"

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        got = gather(events)
        text = self._reply.options["echo"] + got.text
        choice = self._choice(text, FINISH.get(got.end.reason, "stop"), got.logprobs)
        usage = got.end.usage
        return self._head() | {"choices": [choice], "usage": usage_json(usage), "timings": timings_json(usage)}


FIELDS = {
    "model": TEXT, "prompt": {"anyOf": [TEXT, {"type": "array", "items": WHOLE}]}, "stream": FLAG,
    "stream_options": OBJECT, "max_tokens": WHOLE, "stop": TEXT_OR_TEXTS, "n": WHOLE, "logprobs": WHOLE, "echo": FLAG,
    "response_format": OBJECT, "grammar": TEXT,
} | SAMPLING_FIELDS  # fmt: skip
ROUTES = tuple(
    Route(path, parse, CompletionEncoder, error_json, fields=FIELDS, needed=("prompt",), words="OpenAI: go on a text")
    for path in ("/v1/completions", "/completions")
)
