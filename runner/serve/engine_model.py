"""The real model behind the server: an Engine, its chat template, and stream().

run() is for the thread that decodes. Everything else only reads what does not change while the model is loaded, or
asks the engine in ways that are safe from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import ContextFull, EngineError, Stopped, UsageError
from moe_edge.models.formats.ggml_types import type_name
from moe_edge.runner.chat import chat_template
from moe_edge.runner.chatformat.format import Parser
from moe_edge.runner.chatformat.parts import Reasoning, Text, ToolEnd, ToolStart
from moe_edge.runner.chatformat.plain import PlainParser
from moe_edge.runner.engine import Engine
from moe_edge.runner.events import Piece, TokenLogprob
from moe_edge.runner.generate import Generation, stream
from moe_edge.runner.kv.prefix import shared_prefix
from moe_edge.runner.protocol import (
    Emit,
    End,
    Logprobs,
    ModelFacts,
    Prepared,
    Request,
    SamplingChoice,
    Usage,
    check_fits,
    traded_of,
)
from moe_edge.runner.sampling import Sampling, check_grammar
from moe_edge.runner.serve import grammar
from moe_edge.runner.serve.forced_call import ForcedCallParser
from moe_edge.runner.template import ChatTemplate
from moe_edge.runner.thinking import checked_settings, thinking_settings
from moe_edge.runner.tokens import find_tokens, token_bytes, tokenize
from moe_edge.runner.truncate import without_oldest

A_MESSAGE = 8  # tokens that a template puts around one
BYTES_A_TOKEN_OF_JSON = 3
BYTES_A_TOKEN = 32  # on average, which no language and no program reaches; a text of more is not even tokenized
NEW_BELOW = 16  # tokens that a prompt shares with the last one; with fewer it is taken for another conversation


@dataclass(frozen=True)
class ReplyPlan:
    """What prepare() found out for run(). parser: makes the one for this reply. stop: the request's and the end's.
    dropped: messages that were left out."""

    parser: Callable[[], Parser]
    stop: tuple[str, ...]
    sampling: Sampling
    dropped: int = 0


class EngineModel:
    """engine: loaded. name: what lists call the model. defaults: for what a request leaves open; n_tokens 0: no limit
    but the context's."""

    def __init__(self, engine: Engine, *, name: str, defaults: Sampling, n_tokens: int = 0) -> None:
        self._engine, self._defaults, self._n_tokens = engine, defaults, n_tokens
        self._template: ChatTemplate | None = chat_template(engine)
        self._tags = self._template.format.tags if self._template is not None else ()
        self._reused = 0  # tokens of prompts that were in memory or on disk
        self._visible = find_tokens(engine.llama, self._tags)
        self.facts = _facts(engine, name, self._template, defaults)

    # ---- before the turn

    def render(self, request: Request) -> str:
        return self._prompt(request)[1]

    def prepare(self, request: Request) -> Prepared:
        request, dropped = self._fitting(request)
        tokens, text = self._prompt(request)
        n_ctx = self._engine.n_ctx
        check_fits(len(tokens), n_ctx)
        if not tokens:
            raise UsageError("the prompt is empty; give at least one word")
        limit = request.n_tokens or self._n_tokens or n_ctx
        if not self._engine.options.context_shift:
            limit = min(limit, n_ctx - len(tokens))
        form = self._form(request, text)
        plan = ReplyPlan(
            self._parser(request, text, form), self._stop(request), self._sampling(request, form), dropped
        )
        return Prepared(request, tuple(tokens), limit, plan)

    def _fitting(self, request: Request) -> tuple[Request, int]:
        """The request, without the oldest turns of a conversation that is too long, if its dialect has it so; and how
        many messages were left out."""
        messages, template = request.messages, self._template
        if messages is None or template is None or not request.truncate:
            return request, 0
        n_ctx, llama = self._engine.n_ctx, self._engine.llama
        texts = [str(m.get("content") or "") + json.dumps(m.get("tool_calls") or "") for m in messages]
        sizes = [
            n_ctx if len(text) > BYTES_A_TOKEN * n_ctx
            else A_MESSAGE + len(tokenize(llama, text, special=False, add_bos=False))
            for text in texts
        ]  # fmt: skip
        tools = sum(len(json.dumps(tool)) for tool in request.tools) // BYTES_A_TOKEN_OF_JSON
        room = max(n_ctx - (request.n_tokens or self._n_tokens or n_ctx // 8), n_ctx // 2)
        kept = without_oldest(messages, sizes, tools, room, n_ctx // 2)
        return replace(request, messages=tuple(kept)), len(messages) - len(kept)

    def _prompt(self, request: Request) -> tuple[list[int], str]:
        """(tokens, text). A model without a template goes on with the contents of the messages."""
        llama = self._engine.llama
        if request.messages is None:
            if not isinstance(request.prompt, str):
                self.pieces(request.prompt)
                return list(request.prompt), ""
            self._check_length(len(request.prompt))
            return tokenize(llama, request.prompt, special=True, add_bos=True), request.prompt
        self._check_length(sum(len(message.get("content") or "") for message in request.messages))
        if self._template is None:
            if request.tools:
                raise UsageError("this model has no chat template, so it cannot be told of tools")
            text = "\n".join(message.get("content") or "" for message in request.messages)
            return tokenize(llama, text, special=False, add_bos=True), text
        return self._chat_prompt(self._template, request)

    def _check_length(self, n: int) -> None:
        """Tokens of a text of n characters are memory beside the budget. Raises ContextFull."""
        n_ctx = self._engine.n_ctx
        if n > BYTES_A_TOKEN * n_ctx:
            raise ContextFull(
                f"the prompt has {n} characters, more than {BYTES_A_TOKEN} for each of the {n_ctx} tokens that the "
                "context holds; shorten it, or start the server with a larger --ctx-size",
                None, n_ctx,
            )  # fmt: skip

    def _chat_prompt(self, template: ChatTemplate, request: Request) -> tuple[list[int], str]:
        """An answer that the last message begins is gone on with."""
        messages = [dict(message) for message in request.messages or ()]
        begun = messages[-1] if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls") else None
        if begun is not None:
            messages.pop()
        if not messages:
            raise UsageError("the conversation has nothing but the beginning of an answer; it needs a question")
        tokens, text = template.tokens(messages, request.tools, **template_kwargs(request))
        if begun is None or not begun.get("content"):
            return tokens, text
        if not template.format.thinking.can_go_on(text):
            raise UsageError("this model's answers begin with thinking, so an answer that is begun cannot be gone on")
        answer = begun["content"]
        return tokens + tokenize(self._engine.llama, answer, special=False, add_bos=False), text + answer

    def _form(self, request: Request, text: str) -> grammar.Form | None:
        """Raises UsageError for a form that this model cannot keep to."""
        template = self._template
        chat = template.format if template is not None and request.messages is not None else None
        form = grammar.reply_form(request, chat, template.text if template is not None else "", text)
        if form is not None:
            check_grammar(self._engine.llama, form.grammar, form.root)
        return form

    def _parser(self, request: Request, text: str, form: grammar.Form | None) -> Callable[[], Parser]:
        template = self._template
        if request.messages is None or template is None:
            inner: Callable[[], Parser] = PlainParser
        else:
            inner = functools.partial(template.format.parser, text, request.tools)
        in_json = form is not None and form.is_call and not form.in_own_words
        return (lambda: ForcedCallParser(inner())) if in_json else inner

    def _stop(self, request: Request) -> tuple[str, ...]:
        chat = request.messages is not None and self._template is not None
        end = self._template.eos_text if chat and self._template is not None else ""
        return (*request.stop, end) if end else request.stop

    def _sampling(self, request: Request, form: grammar.Form | None) -> Sampling:
        """Raises UsageError for a bias that names no token."""
        n_vocab = self.facts.n_vocab
        if wrong := [token for token, _ in request.sampling.logit_bias if token >= n_vocab]:
            raise UsageError(f"logit_bias names token {wrong[0]}, but the vocabulary has {n_vocab}")
        return _chosen(request.sampling, self._defaults, form, request.logprobs)

    # ---- the turn

    def run(self, prepared: Prepared, emit: Emit, should_stop: Callable[[], bool]) -> End:
        plan: ReplyPlan = prepared.extra
        if shared_prefix(self._engine.llama, prepared.tokens) < NEW_BELOW:
            self._engine.policy.new_conversation()
        reply = _Reply(emit, plan.parser(), prepared.request.one_tool)
        events = stream(
            self._engine, prepared.tokens, prepared.n_tokens, plan.sampling, stop=plan.stop, visible=self._visible,
            should_stop=lambda: should_stop() or reply.is_over,
        )  # fmt: skip
        with contextlib.closing(events):
            while True:
                try:
                    event = next(events)
                except Stopped:
                    return End("cancelled", Usage(len(prepared.tokens)))
                except StopIteration as end:
                    result: Generation = end.value
                    break
                if isinstance(event, Piece):
                    reply.add(event)
                else:
                    emit(event)
        reply.finish()
        self._reused += result.reused_tokens
        stop_text = result.stop_text if result.stop_text in prepared.request.stop else None
        return End(reply.reason(result), self._usage(result, reply, plan.dropped), stop_text)

    def _usage(self, g: Generation, reply: _Reply, dropped: int) -> Usage:
        traded = traded_of(
            hits=g.counters.hits, uses=g.counters.uses, bytes_read=g.counters.bytes_read, low=g.counters.low_uses,
            skipped=g.counters.skipped_uses, substituted=g.counters.substituted_uses, expected_kld=g.expected_kld,
            policy=self._engine.policy.name,
        )  # fmt: skip
        if self._engine.options.lossy_cache:
            traded["kv_cache"] = self._engine.options.lossy_cache
        if self._engine.options.context_shift:
            traded["context_shifted_tokens"] = g.shifted_tokens
        if dropped:
            traded["dropped_messages"] = dropped
        return Usage(
            g.prompt_tokens, g.reused_tokens, g.generated_tokens, reply.n_reasoning, 0.0, g.ttft_seconds,
            g.decode_seconds, traded,
        )  # fmt: skip

    def stop(self) -> None:
        with contextlib.suppress(EngineError):  # closed meanwhile
            self._engine.stop()

    # ---- questions

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        self._check_length(len(text))
        return tokenize(self._engine.llama, text, special=special, add_bos=add_bos)

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        n_vocab = self.facts.n_vocab
        if wrong := [token for token in tokens if not 0 <= token < n_vocab]:
            raise UsageError(f"token {wrong[0]} is not in the vocabulary, which has {n_vocab}")
        return [token_bytes(self._engine.llama, token, special=True) for token in tokens]

    def numbers(self) -> Mapping[str, float]:
        c, plan = self._engine.counters(), self._engine.plan
        return {
            "tokens": c.tokens,
            "expert_uses": c.uses,
            "expert_hits": c.hits,
            "expert_misses": c.loads,
            "expert_bytes_read": c.bytes_read,
            "expert_evictions": c.evictions,
            "stall_seconds": c.stall_seconds,
            "low_uses": c.low_uses,
            "skipped_uses": c.skipped_uses,
            "substituted_uses": c.substituted_uses,
            "prefetched": c.prefetched,
            "prefetch_useful": c.prefetch_useful,
            "prefetch_wasted": c.prefetch_wasted,
            **self._conversations(),
            "budget_bytes": plan.budget_bytes,
            "arena_bytes": plan.arena_bytes,
        }

    def _conversations(self) -> dict[str, float]:
        held = self._engine.held
        there = {"prefix_tokens_reused": float(self._reused)}
        if held is not None:
            there |= {
                "conversations_held": held.n_conversations, "held_bytes": held.nbytes,
                "conversations_restored": held.n_restored, "conversations_spilled": held.n_spilled,
            }  # fmt: skip
        return there

    def boards(self) -> Sequence[Mapping[str, Any]]:
        return self._engine.board_reports()

    def picture(self) -> Mapping[str, Any]:
        """Memory, which experts are in it, and what was read since the model was loaded."""
        engine, layout = self._engine, self._engine.layout
        fixed, c = engine.plan.fixed, engine.counters()
        resident: list[list[int]] = [[0] * n for n in layout.n_experts]
        there = set(engine.native.resident_units())
        for layer, first in enumerate(layout.first_unit):
            for expert in range(layout.n_experts[layer]):
                unit, levels = first + expert * layout.n_levels, range(layout.n_levels)
                resident[layer][expert] = sum(1 << at for at in levels if unit + at in there)
        evaluated = max(1, c.tokens)
        return {
            "budget_bytes": engine.plan.budget_bytes,
            "memory": [
                {"name": "dense weights", "bytes": fixed.dense_bytes},
                {"name": "KV cache", "bytes": fixed.kv_bytes},
                *([{"name": "conversations", "bytes": fixed.held_bytes}] if fixed.held_bytes else []),
                {"name": "compute", "bytes": fixed.compute_bytes + fixed.scratch_bytes + fixed.program_excess_bytes},
                {"name": "experts", "bytes": engine.plan.arena_bytes},
            ],
            "layers": [layer.layer for layer in engine.model.layers],
            "levels": list(engine.model.levels),
            "resident": resident,
            "policy": engine.policy.name,
            "expert_uses": c.uses,
            "expert_hits": c.hits,
            "expert_hit_rate": c.hits / c.uses if c.uses else 0.0,
            "tokens": c.tokens,
            "expert_bytes_read": c.bytes_read,
            "bytes_per_token": c.bytes_read / evaluated,
            "low_uses": c.low_uses,
            "skipped_uses": c.skipped_uses,
            "substituted_uses": c.substituted_uses,
            "boards": self._engine.board_reports(),
        }

    def recency(self) -> bytes:
        """From the policy, not from the native library: that one would make whoever asks wait for a step's reads."""
        packed = np.zeros(len(self._engine.layout.unit_bytes), np.uint8)
        units = np.array(self._engine.policy.cache.oldest_use_first(), np.int64)
        packed[units] = np.linspace(1, 255, len(units)) if len(units) > 1 else 255
        return packed.tobytes()

    def close(self) -> None:
        self._engine.close()


class _Reply:
    """Pieces in, events out, for one reply."""

    def __init__(self, emit: Emit, parser: Parser, one_tool: bool) -> None:
        self._emit, self._parser, self._one_tool = emit, parser, one_tool
        self._logprobs: list[TokenLogprob] = []  # of tokens of which nothing has been emitted yet
        self._called = False
        self.n_reasoning = 0
        self.is_over = False  # the one tool call that is allowed has ended

    def add(self, piece: Piece) -> None:
        if piece.logprob is not None:
            self._logprobs.append(piece.logprob)
        self._say(self._parser.feed(piece.text))

    def finish(self) -> None:
        self._say(self._parser.finish())

    def _say(self, parts: Sequence[Any]) -> None:
        if self.is_over:
            return
        if self._logprobs and any(isinstance(part, Text) for part in parts):
            self._emit(Logprobs(tuple(self._logprobs)))
        if parts:
            self._logprobs.clear()  # those of thinking, tags and calls are not told
        self.n_reasoning += any(isinstance(part, Reasoning) for part in parts)
        for part in parts:
            self._called |= isinstance(part, ToolStart)
            self._emit(part)
            if isinstance(part, ToolEnd) and self._one_tool:
                self.is_over = True
                return

    def reason(self, result: Generation) -> str:
        if self.is_over:
            return "tool_calls"
        if result.finish_reason == "stopped":
            return "cancelled"
        return "tool_calls" if self._called and result.finish_reason == "stop" else result.finish_reason


def template_kwargs(request: Request) -> dict[str, Any]:
    """What the template is told besides messages and tools. Raises UsageError for names that are not the client's."""
    given = checked_settings(request.template_kwargs, "chat_template_kwargs")
    return thinking_settings(request.think, request.effort) | given


def _chosen(choice: SamplingChoice, d: Sampling, form: grammar.Form | None, logprobs: int | None) -> Sampling:
    def pick(name: str) -> Any:
        value = getattr(choice, name)
        return getattr(d, name) if value is None else value

    names = (
        "temp", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    chosen = {name: pick(name) for name in names}
    sampling = Sampling(**chosen, logit_bias=choice.logit_bias, logprobs=logprobs)
    return sampling if form is None else replace(sampling, grammar=form.grammar, grammar_root=form.root)


def _facts(engine: Engine, name: str, template: ChatTemplate | None, d: Sampling) -> ModelFacts:
    import llama_cpp

    model, llama = engine.model, engine.llama
    files = {model.skeleton, *model.files}
    text = template.text if template is not None else ""
    can = ["completion"]
    if "tools" in text:
        can.append("tools")
    marks = template.format.tags if template is not None else ()
    if any(tag in text for tag in marks if "think" in tag.lower() or "channel" in tag):
        can.append("thinking")
    return ModelFacts(
        name=name,
        architecture=model.architecture,
        n_ctx=engine.n_ctx,
        n_vocab=int(llama.n_vocab()),
        size_bytes=sum(path.stat().st_size for path in files),
        n_params=int(llama_cpp.llama_model_n_params(llama.model))
        + sum(piece.cols * piece.rows for piece in model.pieces) // len(model.levels),
        quantization=type_name(model.pieces[0].type),
        template=text,
        eos_text=_token_text(engine, llama.token_eos()),
        bos_text=_token_text(engine, llama.token_bos()),
        created=int(Path(model.files[0]).stat().st_mtime),
        policy=engine.policy.name,
        capabilities=tuple(can),
        sampling={
            "temperature": d.temp, "top_k": d.top_k, "top_p": d.top_p, "min_p": d.min_p,
            "repeat_penalty": d.repeat_penalty, "presence_penalty": d.presence_penalty,
            "frequency_penalty": d.frequency_penalty,
        },
    )  # fmt: skip


def _token_text(engine: Engine, token: int) -> str:
    return token_bytes(engine.llama, token, special=True).decode(errors="replace") if token >= 0 else ""
