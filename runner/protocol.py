"""What a server needs of a model: a request in, events out, and a way to stop.

The server imports this and nothing of the engine. runner/serve/engine_model.py is the real one, runner/fake.py one
without a model, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_edge.models.errors import ContextFull
from moe_edge.runner.chatformat.parts import Part
from moe_edge.runner.events import Progress, TokenLogprob


def check_fits(n_tokens: int, n_ctx: int) -> None:
    """Raises ContextFull when a prompt of so many tokens leaves no room for a reply."""
    if n_tokens >= n_ctx:
        raise ContextFull(
            f"the prompt has {n_tokens} tokens but the context holds {n_ctx}, and a reply needs one more; "
            f"shorten it, or start the server with --ctx-size {n_tokens + 512} or more",
            n_tokens, n_ctx,
        )  # fmt: skip


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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ToolChoice:
    """mode: auto, none, required. name: the one tool that must be called, with mode required."""

    mode: str = "auto"
    name: str | None = None


@dataclass(frozen=True)
class Request:
    """One reply that is asked for, in no dialect.

    messages: OpenAI's form, content always a string or None; None for a text completion of `prompt`, which is text or
    token ids. one_tool: at most one tool call. schema: a JSON schema that the reply must follow; json_object: any JSON
    object; grammar: GBNF. n_tokens None: the server's default. logprobs: how many alternatives of each token to tell;
    None: tell none at all. think: whether a model that can is to think; None: the template's own default. effort: low,
    medium, high. template_kwargs: passed to the chat template as they are. truncate: the oldest messages may be left
    out of a conversation that does not fit.
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
    truncate: bool = False


# ---- events, in the order they may come: Progress*, (Logprobs | Part)*, End


@dataclass(frozen=True)
class Logprobs:
    """The probabilities of the tokens that the next Text is made of."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of a reply. cached_tokens of the prompt were not evaluated. traded: see traded_of().

    reasoning_tokens: how many of the generated ones were thinking; those of the tags around it may be counted or not.
    queue_seconds: how long it waited for its turn. ttft_seconds: from its turn to the first token. decode_seconds: from
    there to the last one.
    """

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

    @property
    def tokens_per_second(self) -> float:
        """After the first token, which is the prefill's."""
        after_first = max(0, self.generated_tokens - 1)
        return after_first / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class End:
    """The reply is over. reason: stop, length, tool_calls, cancelled. stop_text: of the request, the one that came."""

    reason: str
    usage: Usage
    stop_text: str | None = None


Event = Progress | Part | Logprobs | End
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class ModelFacts:
    """What a server tells about its model. created: seconds since 1970. capabilities: Ollama's words."""

    name: str
    architecture: str
    n_ctx: int
    n_vocab: int = 0
    size_bytes: int = 0
    n_params: int = 0
    quantization: str = ""
    template: str = ""
    eos_text: str = ""
    bos_text: str = ""
    created: int = 0
    policy: str = "exact"
    capabilities: tuple[str, ...] = ("completion",)
    sampling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A request as tokens, ready to run. extra: what the model wants to know again in run()."""

    request: Request
    tokens: tuple[int, ...]
    n_tokens: int
    extra: Any = None


class ServedModel(Protocol):
    """One loaded model. run() is for one thread alone; everything else may be called from any thread meanwhile."""

    @property
    def facts(self) -> ModelFacts: ...

    def prepare(self, request: Request) -> Prepared:
        """Render and tokenize. Raises ContextFull, and UsageError for what the model or its template cannot do."""
        ...

    def run(self, prepared: Prepared, emit: Emit, should_stop: Callable[[], bool]) -> End:
        """Generate; every event but the End is emitted, the End is returned. Raises what the engine raises.

        Ends with the reason `cancelled` soon after should_stop() turns true, sooner if stop() is called too.
        """
        ...

    def stop(self) -> None:
        """End what runs at the next expert; should_stop() must be true by then. Nothing when nothing runs."""
        ...

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]: ...

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each token, special ones included. Raises UsageError for an id that is none."""
        ...

    def render(self, request: Request) -> str:
        """The prompt as text, template applied. Raises UsageError."""
        ...

    def numbers(self) -> Mapping[str, float]:
        """Counters and gauges since the model was loaded, for /metrics. See NUMBERS in runner/serve/metrics.py."""
        ...

    def boards(self) -> Sequence[Mapping[str, Any]]:
        """A report of each board that computes layers, see BoardsEngine.board_reports(); none on one machine."""
        ...

    def picture(self) -> Mapping[str, Any]:
        """What the console draws. See docs/SERVER.md, /moe-edge/picture."""
        ...

    def recency(self) -> bytes:
        """A byte for each level of each expert of each MoE layer, in this order: 0 when it is not in memory, else 1 to
        255, the one that was used or read last having the highest."""
        ...

    def close(self) -> None: ...


def traded_of(
    *, hits: int, uses: int, bytes_read: int, low: int, skipped: int, substituted: int, expected_kld: float | None,
    policy: str,
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
        "substituted_uses": substituted,
        "expected_kld_per_token": expected_kld,
    }
