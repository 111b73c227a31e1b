"""The Python face: load(), and the Model it gives. What is public here is what `import moe_edge` offers.

A model decodes on one thread of its own, whoever asks: llama.cpp's OpenMP threads belong to the thread that starts
them, and a reply can be left at any moment without leaving a lock behind.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_edge.models.embedded import tiny_model_path
from moe_edge.models.errors import EngineError, UsageError
from moe_edge.runner.chat import chat_template
from moe_edge.runner.chatformat.parts import Part, Reasoning, Text, ToolArguments, ToolEnd, ToolStart
from moe_edge.runner.chatformat.plain import PlainParser
from moe_edge.runner.conversation import Conversation
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.generate import Generation, Sampling, generate
from moe_edge.runner.tokens import find_tokens
from moe_edge.schedulers.budget import MemoryPlan, parse_bytes
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies import KNOBS

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
N_TOKENS = 512
_SAMPLING = frozenset(each.name for each in fields(Sampling))
_POLL_SECONDS = 0.02  # between two attempts to stop a decode that may only be about to begin


@dataclass(frozen=True)
class Reply:
    """What a model said, and what it took.

    text: the answer, without the thinking. reasoning: the thinking, of models that show it. tool_calls: (name,
    arguments as JSON text). finish_reason: stop, length, stopped.
    cached_tokens: of the prompt, were in the KV cache already. seconds: from the request to the first token, and from
    there to the last. bytes_read: of experts, from disk.
    low_uses, skipped_uses: what a lossy policy traded, in expert uses; substituted_uses: of all tokens, uses that went
    to another expert than the router's own choice; expected_kld: nats a token that it expects to
    have cost, None where the model is not calibrated.
    """

    text: str
    reasoning: str
    tool_calls: tuple[tuple[str, str], ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_seconds: float
    decode_seconds: float
    tokens_per_second: float
    expert_hit_rate: float
    bytes_read: int
    low_uses: int
    skipped_uses: int
    substituted_uses: int
    expected_kld: float | None
    policy: str


@dataclass(frozen=True)
class Done:
    """The last event of a stream."""

    reply: Reply


Event = Text | Reasoning | ToolStart | ToolArguments | ToolEnd | Done


@dataclass
class _Said:
    """A reply in the making: its parts, put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)

    def add(self, part: Part) -> None:
        if isinstance(part, Text):
            self.text += part.text
        elif isinstance(part, Reasoning):
            self.reasoning += part.text
        elif isinstance(part, ToolStart):
            self.calls.append([part.name, ""])
        elif isinstance(part, ToolArguments) and self.calls:
            self.calls[-1][1] += part.text


def load(
    path: str | Path | None = None,
    *,
    ram: str | int | None = None,
    n_ctx: int = 0,
    n_threads: int = 0,
    policy: str = "exact",
    cache: str = "auto",
    lookahead: str = "off",
    max_kld: float | None = None,
    warm_start: bool = False,
    repack: str = "auto",
    verify: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    **knobs: Any,
) -> Model:
    """Load a model: a stock GGUF, or a converted one; None is the tiny one that moe-edge brings.

    ram: all memory the model may take, in bytes or as "6GiB"; None: what is free. n_ctx: tokens; 0: 4096, or what the
    model was trained for if that is less. n_threads 0: one for each core. policy and knobs: as `moe-edge chat --help`
    names them, like policy="dymoe", retention=0.75. repack: auto, on or off, see runner/dense_repack.py. tell: called
    with lines about warm starts.
    Raises UsageError for a name that is none, BudgetTooSmall, MissingFile, BadFile and its kind, CannotRun with
    llama.cpp's reason.
    """
    unknown = [name for name in knobs if name not in KNOBS]
    if unknown:
        raise UsageError(f"load() has no option '{unknown[0]}'; policies know: {', '.join(sorted(KNOBS))}")
    options = EngineOptions(
        ram_bytes=parse_bytes(ram) if isinstance(ram, str) else ram, n_ctx=n_ctx, n_threads=n_threads,
        policy=PolicyOptions(policy, cache=cache, lookahead=lookahead, max_kld=max_kld, **knobs),
        warm_start=warm_start, repack=repack,
    )  # fmt: skip
    return Model(Engine(path or tiny_model_path(), options, verify=verify, tell=tell))


class Model:
    """A loaded model. Use it in `with`, or close() it. Any thread may ask; replies are made one after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, "moe-edge")
        self._stopping: Callable[[], None] | None = None
        try:
            self._thread.submit(engine.load).result()
            self._template = self._thread.submit(chat_template, engine).result()
        except BaseException:
            self.close()
            raise

    @property
    def llama(self) -> Any:
        """llama-cpp-python's own `Llama`. While a reply is made it belongs to that."""
        return self.engine.llama

    @property
    def plan(self) -> MemoryPlan:
        """How the memory is split, in bytes."""
        return self.engine.plan

    @property
    def stats(self) -> Mapping[str, float]:
        """Counts since the model was loaded, by name; times in seconds. See native/capi.h for what is counted."""
        counters = self.engine.counters()
        return {name: getattr(counters, name) for name in counters.__dataclass_fields__}

    def generate(self, prompt: str | Sequence[int], max_tokens: int = N_TOKENS, **options: Any) -> Reply:
        """Continue a text, or token ids. options: as for stream()."""
        return self._last(self.stream(prompt, max_tokens, **options))

    def chat(self, messages: Sequence[Message], max_tokens: int = N_TOKENS, **options: Any) -> Reply:
        """Answer messages, each with `role` and `content`, through the model's own template."""
        return self._last(self.stream(messages, max_tokens, **options))

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = N_TOKENS,
        *,
        stop: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        **sampling: Any,
    ) -> Iterator[Event]:
        """The parts of a reply as they come, and a Done with the whole. Leaving the loop stops the decode.

        prompt: a text or token ids to continue, or messages to answer. stop: texts that end the reply. tools: as OpenAI
        describes them, for templates that take them. sampling: temp, top_k, top_p, min_p, repeat_penalty,
        presence_penalty, frequency_penalty, seed.
        Raises UsageError for options that are none, for a prompt that does not fit, and for messages that the template
        refuses or that the model has no template for.
        """
        unknown = set(sampling) - _SAMPLING
        if unknown:
            raise UsageError(f"there is no option '{min(unknown)}'; known: {', '.join(sorted(_SAMPLING))}, stop, tools")
        return self._events(prompt, max_tokens, Sampling(**sampling), tuple(stop), tuple(tools))

    def close(self) -> None:
        """Stop what runs, and free everything. Again: nothing."""
        self.engine.close()
        self._thread.shutdown()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last(self, events: Iterator[Event]) -> Reply:
        for event in events:
            if isinstance(event, Done):
                return event.reply
        raise EngineError("the reply ended without its statistics")

    def _events(
        self, prompt: Prompt, n_tokens: int, sampling: Sampling, stop: tuple[str, ...], tools: tuple[Any, ...]
    ) -> Iterator[Event]:
        """Run the reply on the model's thread, and hand its parts over."""
        self.engine.check_open()
        parts: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        left = threading.Event()

        def make() -> Reply:
            try:
                if left.is_set():
                    raise EngineError("nobody waits for this reply any more")
                return self._reply(prompt, n_tokens, sampling, stop, tools, parts.put, left.is_set)
            finally:
                parts.put(None)

        made = self._thread.submit(make)
        try:
            while (part := parts.get()) is not None:
                yield part
            yield Done(made.result())
        finally:
            left.set()
            self._end(made)

    def _end(self, made: Future[Reply]) -> None:
        """Stop a reply that nobody reads any more, and wait for its end."""
        while not made.done():
            self.engine.stop()
            wait([made], _POLL_SECONDS)

    def _reply(
        self,
        prompt: Prompt,
        n_tokens: int,
        sampling: Sampling,
        stop: tuple[str, ...],
        tools: tuple[Any, ...],
        put: Callable[[Part], None],
        should_stop: Callable[[], bool],
    ) -> Reply:
        said, engine = _Said(), self.engine
        tokens, parser, visible, ends = self._prepared(prompt, n_tokens, tools)

        def show(found: Sequence[Part]) -> None:
            for part in found:
                said.add(part)
                put(part)

        result = generate(
            engine, tokens, n_tokens, sampling, on_text=lambda text: show(parser.feed(text)), stop=(*stop, *ends),
            visible=visible, should_stop=should_stop,
        )  # fmt: skip
        show(parser.finish())
        return _reply_of(said, result, engine)

    def _prepared(self, prompt: Prompt, n_tokens: int, tools: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
        """(what to evaluate, the parser of the reply, control tokens that it must see, texts that end the reply)."""
        if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
            return prompt, PlainParser(), frozenset(), ()
        if self._template is None:
            raise UsageError(f"{self.engine.name} has no chat template; use generate() to continue a text")
        messages = [dict(each) for each in prompt if isinstance(each, Mapping)]
        conversation = Conversation(self.engine, self._template, messages, tools=tools)
        asked = conversation.prompt(n_tokens)
        format_ = self._template.format
        return asked.tokens, format_.parser(asked.text, tools), find_tokens(self.engine.llama, format_.tags), asked.stop


def _reply_of(said: _Said, result: Generation, engine: Engine) -> Reply:
    return Reply(
        text=said.text,
        reasoning=said.reasoning,
        tool_calls=tuple((name, arguments) for name, arguments in said.calls),
        finish_reason=result.finish_reason,
        prompt_tokens=result.prompt_tokens,
        cached_tokens=result.reused_tokens,
        generated_tokens=result.generated_tokens,
        ttft_seconds=result.ttft_seconds,
        decode_seconds=result.decode_seconds,
        tokens_per_second=result.decode_tokens_per_second,
        expert_hit_rate=result.hit_rate,
        bytes_read=result.counters.bytes_read,
        low_uses=result.counters.low_uses,
        skipped_uses=result.counters.skipped_uses,
        substituted_uses=result.counters.substituted_uses,
        expected_kld=result.expected_kld,
        policy=engine.policy.name,
    )
