"""What a front (server, chat, a program) needs of a model: a request in, events out, and a way to stop.

Fronts import this and nothing of the engine. runner/serve/engine_model.py is the real one, runner/fake.py one without
a model, for tests of fronts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_edge.models.errors import UsageError


class ContextFull(UsageError):
    """The prompt does not fit. prompt_tokens, n_ctx: what it has, and what the context holds."""

    def __init__(self, message: str, prompt_tokens: int, n_ctx: int) -> None:
        super().__init__(message)
        self.prompt_tokens, self.n_ctx = prompt_tokens, n_ctx


@dataclass(frozen=True)
class SamplingChoice:
    """How tokens are drawn; None: the server's default. Names and meanings are llama.cpp's.

    logit_bias: token id -> what is added to its logit.
    """

    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ToolChoice:
    """mode: auto, none, required; name: the one tool that must be called, with mode required."""

    mode: str = "auto"
    name: str | None = None


@dataclass(frozen=True)
class Request:
    """One reply that is asked for, in no dialect.

    messages: OpenAI's form, content always a string or None; None for a text completion of `prompt`, which is text or
    token ids. schema: a JSON schema that the reply must follow; json_object: any JSON object. n_tokens None: up to the
    end of the context. logprobs: how many alternatives of each token to tell, None: none at all.
    think: whether a model that can is to think; None: the template's own default. effort: low, medium, high.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    one_tool: bool = False
    schema: Mapping[str, Any] | None = None
    json_object: bool = False
    grammar: str | None = None
    n_tokens: int | None = None
    sampling: SamplingChoice = SamplingChoice()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    think: bool | None = None
    effort: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was drawn: its bytes, natural logarithm of its probability, and the most likely ones beside it."""

    token: int
    data: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


# ---- events, in the order they may come: Progress*, (Text | Reasoning | Tool*)*, End


@dataclass(frozen=True)
class Progress:
    """Of the prompt. done counts the tokens that were in the KV cache already."""

    done: int
    total: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer; whole characters."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """A piece of the thinking that some models show before their answer."""

    text: str


@dataclass(frozen=True)
class ToolStart:
    """A tool call begins. index: from 0, in this reply. id: made by us."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """A piece of the call's arguments, which together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolEnd:
    index: int


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of a reply. cached_tokens of the prompt were not evaluated. traded: see traded_of()."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    reasoning_tokens: int = 0
    queue_seconds: float = 0.0
    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0
    traded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True)
class End:
    """The reply is over. reason: stop, length, tool_calls, cancelled. stop_text: the one that ended it."""

    reason: str
    usage: Usage
    stop_text: str | None = None


Event = Progress | Text | Reasoning | ToolStart | ToolArguments | ToolEnd | End
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class ModelFacts:
    """What a front tells about the model."""

    name: str
    architecture: str
    n_ctx: int
    size_bytes: int = 0
    n_params: int = 0
    quantization: str = ""
    template: str = ""
    created: int = 0
    policy: str = "exact"
    capabilities: tuple[str, ...] = ("completion",)


@dataclass(frozen=True)
class Prepared:
    """A request as tokens, ready to run. extra: what the model wants to know again in run()."""

    request: Request
    tokens: tuple[int, ...]
    n_tokens: int
    extra: Any = None


class Model(Protocol):
    """One loaded model. prepare, tokenize, pieces and render may be called from any thread; run from one only."""

    @property
    def facts(self) -> ModelFacts: ...

    def prepare(self, request: Request) -> Prepared:
        """Render and tokenize. Raises ContextFull, UsageError."""
        ...

    def run(self, prepared: Prepared, emit: Emit) -> End:
        """Generate; every event but the End is emitted, the End is returned. Raises what the engine raises.

        After stop() it returns an End with the reason cancelled, within a micro-batch.
        """
        ...

    def stop(self) -> None:
        """End the present run; from any thread."""
        ...

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]: ...

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each token, special ones included. Raises UsageError for an id that is none."""
        ...

    def render(self, request: Request) -> str:
        """The prompt as text, template applied."""
        ...

    def numbers(self) -> Mapping[str, float]:
        """Counters and gauges since the model was loaded, for /metrics: name without prefix -> value."""
        ...

    def picture(self) -> Mapping[str, Any]:
        """What the console draws: the split of the memory, and which experts are in it."""
        ...

    def close(self) -> None: ...


def traded_of(
    *, hits: int, uses: int, bytes_read: int, low: int, skipped: int, expected_kld: float | None, policy: str
) -> dict[str, Any]:
    """What a reply cost and what was traded for speed, as every dialect reports it."""
    return {
        "policy": policy,
        "expert_uses": uses,
        "expert_hits": hits,
        "expert_hit_rate": hits / uses if uses else 0.0,
        "expert_bytes_read": bytes_read,
        "low_uses": low,
        "skipped_uses": skipped,
        "expected_kld_per_token": expected_kld,
    }
