"""Text in, text out: one generation with its statistics.

Sampling, tokens and the KV cache are llama-cpp-python's; this module times them and reads the engine's counters.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_edge.models.errors import Stopped, UsageError
from moe_edge.models.store.watch import check_unchanged
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.memory import peak_rss_bytes
from moe_edge.runner.tokens import is_end, token_bytes, tokenize
from moe_edge.schedulers.budget import format_bytes
from moe_edge.schedulers.lookahead.around import LookAheadPolicy
from moe_edge.schedulers.policies import DEFAULTS
from moe_edge.schedulers.policies.levels import PolicyStats
from moe_edge.schedulers.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, with llama-cpp-python's names and meanings; temp 0 is greedy."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


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
    """

    text: str = ""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = "length"
    counters: Counters = field(default_factory=Counters)
    prefill_counters: Counters = field(default_factory=Counters)
    policy_stats: PolicyStats = field(default_factory=PolicyStats)
    damage_scale: float = 1.0
    lookahead: LookAheadState | None = None

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
        """Nats for each token evaluated that the calibration expects of the low and skipped uses; None without one.

        Exact expects 0.
        """
        damage = self.policy_stats.expected_damage
        return None if damage is None else self.damage_scale * damage / max(1, self.evaluated_tokens)

    def lossy_text(self) -> str:
        """What was traded, for the last line of a reply; empty when nothing was."""
        c = self.counters
        if c.low_uses + c.skipped_uses == 0:
            return ""
        total = c.uses + c.skipped_uses
        expected = "not calibrated" if self.expected_kld is None else f"{self.expected_kld:.2g} nats/token expected"
        return f", {100 * c.low_uses / total:.0f} % low, {100 * c.skipped_uses / total:.0f} % skipped ({expected})"

    def line(self) -> str:
        """The last line of a reply; another one behind it when there is look-ahead."""
        ahead = "" if self.lookahead is None else f"\n[{self.lookahead.text(self.counters)}]"
        return (
            f"[{self.generated_tokens} tokens, {self.decode_tokens_per_second:.1f} tok/s, "
            f"first token {self.ttft_seconds:.2f} s, {100 * self.hit_rate:.0f} % expert hits, "
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
            "low_precision_uses": c.low_uses,
            "skipped_uses": c.skipped_uses,
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
            "peak_rss_bytes": peak_rss_bytes(),
            "warm_start": asdict(engine.preloaded) if engine.preloaded is not None else None,
            "policy": engine.policy.name,
            "policy_options": engine.options.policy.to_json(DEFAULTS),
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
    """Generate up to n_tokens; on_text gets the text as it comes. Raises UsageError when the prompt does not fit.

    Stops at the model's end-of-generation token, at a stop text, when the context is full, when should_stop() turns
    true between tokens, or when the engine is told to stop. Raises Stopped only when no token had come by then.
    special: the names of control tokens in a prompt that is text are those tokens, as in stock create_completion.
    visible: control tokens whose names appear in the text; the others leave nothing there.
    ignore_end: go on after an end-of-generation token, for benchmarks.
    """
    engine.check_open()
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
    check_unchanged(engine.model)
    out = Generation(prompt_tokens=len(tokens))
    writer = _TextWriter(on_text, stop)
    try:
        with engine.decoding():
            out.reused_tokens = keep_prefix(engine, tokens)
            before, stats_before = engine.counters(), engine.policy.stats.copy()
            started = first = time.monotonic()
            for token in _tokens(engine, tokens, sampling or Sampling()):
                now = time.monotonic()
                if out.generated_tokens == 0:
                    first, out.ttft_seconds = now, now - started
                    out.prefill_counters = engine.counters().since(before)
                out.decode_seconds = now - first
                out.generated_tokens += 1
                ended = not ignore_end and is_end(engine.llama, token)
                if ended or writer.add(token_bytes(engine.llama, token, special=token in visible)):
                    out.finish_reason = "stop"
                    break
                if out.generated_tokens >= n_tokens or engine.llama.n_tokens + 1 >= n_ctx:
                    break
                if should_stop is not None and should_stop():
                    out.finish_reason = "stopped"
                    break
    except Stopped:
        if out.generated_tokens == 0:
            raise
        out.finish_reason = "stopped"
    out.text = writer.finish()
    check_unchanged(engine.model)
    out.counters = engine.counters().since(before)
    out.policy_stats = engine.policy.stats.since(stats_before)
    out.lookahead = LookAheadState.of(engine.policy)
    if engine.model.calibration is not None:
        out.damage_scale = engine.model.calibration.damage_scale
    return out


def _tokens(engine: Engine, tokens: list[int], s: Sampling) -> Iterator[int]:
    if s.seed is not None:
        engine.llama.set_seed(s.seed)
    generator: Iterator[int] = engine.llama.generate(
        tokens, temp=s.temp, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, repeat_penalty=s.repeat_penalty,
        presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty,
    )  # fmt: skip
    return generator


def keep_prefix(engine: Engine, tokens: Sequence[int]) -> int:
    """Cut the KV cache down to what the prompt begins with; how many tokens of it are kept.

    All but the last token at most, which is evaluated for its logits. Recurrent and hybrid models cannot forget a part:
    unless the prompt goes on where the cache ends, all of it is evaluated again.
    """
    llama = engine.llama
    n = 0
    for have, want in zip(llama.input_ids[: llama.n_tokens].tolist(), tokens[:-1], strict=False):
        if have != want:
            break
        n += 1
    if n == llama.n_tokens or (n > 0 and llama._ctx.kv_cache_seq_rm(-1, n, -1)):
        llama.n_tokens = n
        return n
    llama.reset()
    llama._ctx.kv_cache_clear()
    return 0


class _TextWriter:
    """Bytes of tokens in, whole characters out; holds back what might be the start of a stop text."""

    def __init__(self, on_text: Callable[[str], None] | None, stop: Sequence[str]) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._on_text = on_text
        self._stop = [s for s in stop if s]
        self._text = ""
        self._shown = 0

    def add(self, data: bytes) -> bool:
        """True when a stop text has come; the text then ends before it."""
        self._text += self._decode(data)
        for s in self._stop:
            at = self._text.find(s, max(0, self._shown - len(s)))
            if at >= 0:
                self._text = self._text[:at]
                return True
        hold = max((n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n])), default=0)
        self._show(len(self._text) - hold)
        return False

    def _show(self, to: int) -> None:
        if to > self._shown and self._on_text is not None:
            self._on_text(self._text[self._shown : to])
        self._shown = max(self._shown, to)

    def finish(self) -> str:
        self._text += self._decode(b"", True)
        self._show(len(self._text))
        return self._text
