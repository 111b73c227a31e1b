"""Text in, text out: one generation with its statistics.

Samplers, tokens and the KV cache are llama.cpp's; this module times them and reads the engine's counters. stream() is
an iterator of what comes, generate() runs it to its end.
"""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_edge.models.errors import Stopped, UsageError
from moe_edge.models.store.watch import check_unchanged
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.events import Piece, Progress
from moe_edge.runner.kv.prefix import prefill
from moe_edge.runner.kv.shift import forget_shifted, shift
from moe_edge.runner.memory import peak_rss_bytes
from moe_edge.runner.sampling import Sampler
from moe_edge.runner.sampling import Sampling as Sampling
from moe_edge.runner.tokens import is_end, token_bytes, tokenize
from moe_edge.schedulers.budget import format_bytes
from moe_edge.schedulers.lookahead.around import LookAheadPolicy
from moe_edge.schedulers.policies import DEFAULTS
from moe_edge.schedulers.policies.levels import PolicyStats
from moe_edge.schedulers.policy import Policy


@dataclass(frozen=True)
class LookAheadState:
    """How look-ahead stands. The last three are those of the controller of `auto`, None for the other rules.

    pays: what its last trial found, and so whether it is on between trials. settings: (depth, width) of each group of
    layers, shallow first: how many layers ahead, and how many experts of each.
    """

    name: str
    pays: bool | None = None
    trials: int | None = None
    settings: tuple[tuple[int, int], ...] | None = None

    @staticmethod
    def of(policy: Policy) -> LookAheadState | None:
        """None when look-ahead is off, or the model has one MoE layer."""
        if not isinstance(policy, LookAheadPolicy):
            return None
        if policy.lookahead != "auto":
            return LookAheadState(policy.lookahead)
        c = policy.controller  # made after the first token
        settings = tuple((s.depth, s.width) for s in c.settings) if c else ()
        return LookAheadState("auto", c is not None and c.pays, c.trials if c else 0, settings)

    def text(self, c: Counters) -> str:
        """One line: what it is set to, and what became of the experts it read."""
        controller = ""
        if self.pays is not None:
            settings = " ".join(f"{depth}x{width}" for depth, width in self.settings or ())
            of_groups = f", depth x width {settings}" if self.pays else ""
            trials = f"{self.trials} trial{'' if self.trials == 1 else 's'}"
            controller = f" ({'on' if self.pays else 'off'} after {trials}{of_groups})"
        return (
            f"look-ahead {self.name}{controller}: {c.prefetched} experts prefetched, {c.prefetch_useful} useful "
            f"({c.prefetch_late} late), {c.prefetch_wasted} wasted, {c.prefetch_cancelled} cancelled, "
            f"{c.prefetch_failed} failed; {format_bytes(c.prefetch_bytes)} prefetched, "
            f"{format_bytes(c.wasted_bytes)} wasted"
        )


@dataclass
class Generation:
    """What one generation did. Times in seconds; `counters` are this generation's share.

    prompt_tokens: tokens of the prompt; reused_tokens of them were in the KV cache already and not evaluated.
    lookahead: at the end; of the experts prefetched, some may have been asked for by an earlier generation, and some
    may be settled by a later one.
    shifted_tokens: that a full context has forgotten, see runner/kv/shift.py.
    finish_reason: stop, length, or stopped by whoever asked for it. stop_text: the one that ended it.
    """

    text: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = "length"
    stop_text: str | None = None
    counters: Counters = field(default_factory=Counters)
    prefill_counters: Counters = field(default_factory=Counters)
    policy_stats: PolicyStats = field(default_factory=PolicyStats)
    damage_scale: float = 1.0
    lookahead: LookAheadState | None = None
    lossy_cache: str = ""
    shifted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        evaluated = self.prompt_tokens - self.reused_tokens
        return evaluated / self.ttft_seconds if self.ttft_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """After the first token: that one is the prefill's."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.generated_tokens > 1 else 0.0

    @property
    def hit_rate(self) -> float:
        return self.counters.hits / self.counters.uses if self.counters.uses else 0.0

    @property
    def evaluated_tokens(self) -> int:
        """Prompt and generated."""
        return self.prompt_tokens - self.reused_tokens + max(0, self.generated_tokens - 1)

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes read for each token evaluated."""
        return self.counters.bytes_read / self.evaluated_tokens if self.evaluated_tokens else 0.0

    @property
    def expected_kld(self) -> float | None:
        """Nats for each token evaluated that the calibration expects of what was traded; None without one.

        Exact expects 0.
        """
        damage = self.policy_stats.expected_damage
        return None if damage is None else self.damage_scale * damage / max(1, self.evaluated_tokens)

    def lossy_text(self) -> str:
        """What was traded, for the last line of a reply; empty when nothing was."""
        c, cache = self.counters, f", {self.lossy_cache}" if self.lossy_cache else ""
        if self.shifted_tokens:
            cache += f", {self.shifted_tokens} tokens of the context forgotten"
        if c.low_uses + c.skipped_uses + c.substituted_uses == 0:
            return cache
        total = c.uses + c.skipped_uses
        expected = "not calibrated" if self.expected_kld is None else f"{self.expected_kld:.2g} nats/token expected"
        experts = f", {100 * c.low_uses / total:.0f} % low, {100 * c.skipped_uses / total:.0f} % skipped"
        if c.substituted_uses:  # of tokens, where the others are of the distinct experts of a micro-batch
            experts += f", {c.substituted_uses} uses substituted"
        return f"{experts} ({expected}){cache}"

    def packed_text(self) -> str:
        """The uses whose expert was packed in memory, whole or in part; empty when there were none."""
        c = self.counters
        of_parts = c.exponent_hits + c.mantissa_hits
        if c.packed_hits + of_parts == 0:
            return ""
        parts = f", {100 * of_parts / c.uses:.0f} % in part" if of_parts else ""
        return f", {100 * c.packed_hits / c.uses:.0f} % packed{parts}"

    def line(self) -> str:
        """The last line of a reply; another one behind it when there is look-ahead."""
        ahead = "" if self.lookahead is None else f"\n[{self.lookahead.text(self.counters)}]"
        return (
            f"[{self.generated_tokens} tokens, {self.decode_tokens_per_second:.1f} tok/s, "
            f"first token {self.ttft_seconds:.2f} s, {100 * self.hit_rate:.0f} % expert hits{self.packed_text()}, "
            f"{format_bytes(int(self.bytes_per_token))}/token read{self.lossy_text()}]{ahead}"
        )

    def to_json(self, engine: Engine) -> dict[str, Any]:
        c = self.counters
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "load_s": engine.load_seconds,
            "ttft_s": self.ttft_seconds,
            "prefill_tok_s": self.prefill_tokens_per_second,
            "decode_tok_s": self.decode_tokens_per_second,
            "expert_uses": c.uses,
            "expert_hit_rate": self.hit_rate,
            "expert_loads": c.loads,
            "expert_evictions": c.evictions,
            "expert_bytes_read": c.bytes_read,
            "expert_bytes_per_token": self.bytes_per_token,
            "stall_s": c.stall_seconds,
            "compute_s": c.compute_seconds,
            "schedule_s": c.schedule_seconds,
            "packed_hits": c.packed_hits,
            "exponent_hits": c.exponent_hits,
            "mantissa_hits": c.mantissa_hits,
            "packed_unread_bytes": c.unread_bytes,
            "low_precision_uses": c.low_uses,
            "skipped_uses": c.skipped_uses,
            "substituted_uses": c.substituted_uses,
            "prefetched": c.prefetched,
            "prefetch_useful": c.prefetch_useful,
            "prefetch_late": c.prefetch_late,
            "prefetch_wasted": c.prefetch_wasted,
            "prefetch_cancelled": c.prefetch_cancelled,
            "prefetch_failed": c.prefetch_failed,
            "prefetch_bytes": c.prefetch_bytes,
            "wasted_bytes": c.wasted_bytes,
            "lookahead": asdict(self.lookahead) if self.lookahead is not None else None,
            "expected_kld_per_token": self.expected_kld,
            "ram_budget_bytes": engine.plan.budget_bytes,
            "arena_bytes": engine.plan.arena_bytes,
            "packed_cache_bytes": engine.plan.packed_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "warm_start": asdict(engine.preloaded) if engine.preloaded is not None else None,
            "context_shifted_tokens": self.shifted_tokens,
            "cache_type_k": engine.options.cache_type_k,
            "cache_type_v": engine.options.cache_type_v,
            "policy": engine.policy.name,
            "policy_options": engine.options.policy.to_json(DEFAULTS),
            "boards": engine.board_reports(),
        }


def generate(
    engine: Engine,
    prompt: str | Sequence[int],
    n_tokens: int,
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    stop: Sequence[str] = (),
    special: bool = True,
    visible: Collection[int] = (),
    should_stop: Callable[[], bool] | None = None,
    ignore_end: bool = False,
) -> Generation:
    """Generate up to n_tokens; on_text gets the text as it comes. The other arguments are those of stream()."""
    events = stream(
        engine, prompt, n_tokens, sampling, stop=stop, special=special, visible=visible, should_stop=should_stop,
        ignore_end=ignore_end,
    )  # fmt: skip
    with contextlib.closing(events):  # gives the turn to decode back, whatever on_text raises
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                result: Generation = end.value
                return result
            if isinstance(event, Piece) and event.text and on_text is not None:
                on_text(event.text)


def stream(
    engine: Engine,
    prompt: str | Sequence[int],
    n_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    special: bool = True,
    visible: Collection[int] = (),
    should_stop: Callable[[], bool] | None = None,
    ignore_end: bool = False,
) -> Generator[Progress | Piece, None, Generation]:
    """Progress for each micro-batch of the prompt, then a Piece for each token; returns the Generation.

    It has the engine's turn to decode until it ends or is closed, and must be iterated by one thread.

    Stops at the model's end-of-generation token, at a stop text, when the context is full (unless it is to shift), when
    should_stop() turns true (asked before every micro-batch and every token), or when the engine is told to stop.
    special: the names of control tokens in a prompt that is text are those tokens, as in stock create_completion.
    visible: control tokens whose names appear in the text; the others leave nothing there.
    ignore_end: go on after an end-of-generation token, for benchmarks.
    Raises UsageError when the prompt does not fit, Stopped when no token had come before a stop. What was evaluated of
    the prompt by then stays in the KV cache.
    """
    engine.check_open()
    tokens = prompt_tokens(engine, prompt, n_tokens, special=special)
    check_unchanged(engine.model)
    out = Generation(prompt_tokens=len(tokens), lossy_cache=engine.options.lossy_cache)
    writer = _TextWriter(stop)
    asked = should_stop or (lambda: False)
    try:
        with engine.decoding(), _whole_memory(engine, out), Sampler(engine.llama, sampling or Sampling()) as sampler:
            out.reused_tokens = engine.keep_prefix(tokens)
            before, stats_before = engine.counters(), engine.policy.stats.copy()
            started = first = time.monotonic()
            for done in prefill(engine.llama, engine.checkpoints, tokens, asked):
                yield Progress(done, len(tokens))
            while True:
                token = sampler.draw()
                now = time.monotonic()
                if out.generated_tokens == 0:
                    first, out.ttft_seconds = now, now - started
                    out.prefill_counters = engine.counters().since(before)
                    if engine.prompts is not None:
                        engine.prompts.measure(out.ttft_seconds, len(tokens) - out.reused_tokens)
                out.decode_seconds = now - first
                out.generated_tokens += 1
                logprob = sampler.logprob(token)
                if not ignore_end and is_end(engine.llama, token):
                    out.finish_reason = "stop"
                    break
                text = writer.add(token_bytes(engine.llama, token, special=token in visible))
                yield Piece(text, token, logprob)
                if writer.found is not None:
                    out.finish_reason, out.stop_text = "stop", writer.found
                    break
                if out.generated_tokens >= n_tokens:
                    break
                if engine.llama.n_tokens + 1 >= engine.n_ctx:
                    if not engine.options.context_shift:
                        break
                    out.shifted_tokens += shift(engine.llama)
                if asked():
                    out.finish_reason = "stopped"
                    break
                engine.llama.eval([token])
    except Stopped:
        if out.generated_tokens == 0:
            raise
        out.finish_reason = "stopped"
    if rest := writer.finish():
        yield Piece(rest, token)
    out.text = writer.text
    check_unchanged(engine.model)
    out.counters = engine.counters().since(before)
    out.policy_stats = engine.policy.stats.since(stats_before)
    out.lookahead = LookAheadState.of(engine.policy)
    if engine.model.calibration is not None:
        out.damage_scale = engine.model.calibration.damage_scale
    return out


@contextlib.contextmanager
def _whole_memory(engine: Engine, out: Generation) -> Iterator[None]:
    """However a reply ends, no later prompt goes on with a context that was shifted."""
    try:
        yield
    finally:
        if out.shifted_tokens:
            forget_shifted(engine.llama)


def prompt_tokens(engine: Engine, prompt: str | Sequence[int], n_tokens: int, *, special: bool) -> list[int]:
    """The prompt as token ids. Raises UsageError when there are none, or more than the context holds."""
    if isinstance(prompt, str):
        tokens = tokenize(engine.llama, prompt, special=special, add_bos=True)
    else:
        tokens = list(prompt)
    n_ctx = engine.n_ctx  # what was asked for; llama.cpp rounds it up for its buffers
    if not tokens:
        raise UsageError("the prompt is empty; give at least one word")
    if len(tokens) >= n_ctx:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens but the context holds {n_ctx}; "
            f"try --ctx-size {len(tokens) + n_tokens}"
        )
    return tokens


class _TextWriter:
    """Bytes of tokens in, whole characters out; holds back what might be the start of a stop text.

    text: all that came so far, up to the stop text. found: the stop text that came.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._stop = [s for s in stop if s]
        self._shown = 0
        self.text = ""
        self.found: str | None = None

    def add(self, data: bytes) -> str:
        """What can be shown now. When a stop text has come, `found` is set and the text ends before it."""
        self.text += self._decode(data)
        places = [(at, s) for s in self._stop if (at := self.text.find(s, max(0, self._shown - len(s)))) >= 0]
        if places:
            at, self.found = min(places)
            self.text = self.text[:at]
            return self._show(at)
        hold = max((n for s in self._stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        return self._show(len(self.text) - hold)

    def _show(self, to: int) -> str:
        at, self._shown = self._shown, max(self._shown, to)
        return self.text[at : self._shown]

    def finish(self) -> str:
        """What was held back; nothing after a stop text."""
        if self.found is None:
            self.text += self._decode(b"", True)
        return self._show(len(self.text))
