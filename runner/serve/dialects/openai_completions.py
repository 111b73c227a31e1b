"""OpenAI's /v1/completions: a text is continued. Old, but editors and evaluation harnesses still use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_edge.runner.protocol import End, Event, Request, Text, TokenLogprob
from moe_edge.runner.serve.dialects.dialect import Call, Reply, Route, dumps, gather, sse
from moe_edge.runner.serve.dialects.openai_chat import FINISH, error_json, timings_json, usage_json
from moe_edge.runner.serve.dialects.openai_parse import MOST_TOKENS, response_format, sampling_of
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
    n_tokens = f.whole("max_tokens", 0, MOST_TOKENS)
    request = Request(
        prompt=_prompt(f),
        schema=schema,
        json_object=json_object,
        grammar=f.text("grammar"),
        n_tokens=DEFAULT_TOKENS if n_tokens is None else max(1, n_tokens),
        sampling=sampling_of(f),
        stop=f.texts("stop"),
        logprobs=logprobs,
        echo=f.flag("echo"),
    )
    options = {
        "include_usage": stream_options is not None and stream_options.flag("include_usage"),
        "echo": request.prompt if request.echo and isinstance(request.prompt, str) else "",
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
        if isinstance(event, Text):
            return sse(self._head() | {"choices": [self._choice(event.text, None, event.logprobs)]})
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


ROUTES = tuple(Route(path, parse, CompletionEncoder, error_json) for path in ("/v1/completions", "/completions"))
