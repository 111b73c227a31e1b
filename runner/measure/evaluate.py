"""Perplexity of a text, and how far a policy's predictions are from a reference's: `moe-edge eval`.

The arithmetic is that of llama.cpp's tools/perplexity/perplexity.cpp, so that its numbers and ours can stand in one
table: llama-perplexity of llama-cpp-python 0.3.36 printed the same digits on the embedded model and between two random
ones (PPL 84.6133 ± 5.33610; KLD 0.104396 ± 0.006588, same top 86.961 %; 2026-11-22, -b 512 --no-repack -fa off). Logits
go from llama.cpp's output buffer through numpy a few rows at a time; a reference's logits wait in a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from moe_edge.models.errors import EngineError, UsageError, printable
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.gguf import read_gguf
from moe_edge.models.store.store import open_model
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.measure.logits import (
    BLOCK_VALUES,
    PassWork,
    ReferenceLogits,
    bos_token,
    cut_chunks,
    kld_of_rows,
    logits_pass,
    nll_of_rows,
    read_text,
    scored_positions,
    standard_error,
    tokenize_text,
)
from moe_edge.runner.sizes import sizes_of
from moe_edge.schedulers.budget import MIB, format_bytes
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policies import DEFAULTS
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

OUTPUT_BYTES = 64 * MIB  # logits of one micro-batch; 512 rows of 151,936 would be 297 MiB
MIN_CHUNK = 8


@dataclass(frozen=True)
class Evaluation:
    """What `eval` measured. nll and KLD in nats per scored token; the names are those of the JSON.

    tokens: evaluated by the pass under test, n_chunks x n_ctx; scored_tokens of them count for nll and KLD.
    text_chunks: how many the text has. reference: `exact`, a model's path, or None: then so are the kld_* fields,
    top1_agreement and reference_nll. expert_bytes_per_token, expert_hit_rate, tok_s: of the pass under test, decoding
    only; it begins with no expert in memory.
    """

    model: str
    text_sha256: str
    policy: str
    policy_options: dict[str, Any]
    ram_budget_bytes: int
    arena_bytes: int
    one_by_one: bool
    n_ctx: int
    n_ubatch: int
    flash_attn: bool
    n_chunks: int
    text_chunks: int
    tokens: int
    scored_tokens: int
    nll: float
    nll_se: float
    reference: str | None
    reference_nll: float | None
    kld_mean: float | None
    kld_se: float | None
    kld_median: float | None
    kld_p99: float | None
    kld_max: float | None
    top1_agreement: float | None
    expert_bytes_per_token: float
    expert_hit_rate: float
    tok_s: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))  # e^709 is the last float64

    @property
    def perplexity_se(self) -> float:
        """As perplexity.cpp has it: to first order."""
        return self.perplexity * self.nll_se

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": self.perplexity, "perplexity_se": self.perplexity_se}

    def text(self) -> str:
        """A few lines for people."""
        fed = "one token at a time" if self.one_by_one else f"micro-batches of {self.n_ubatch}"
        lines = [
            f"model       {printable(str(self.model))}",
            f"text        {self.n_chunks} of {self.text_chunks} chunks of {self.n_ctx} tokens, {self.scored_tokens} "
            f"scored; {fed}; sha256 {self.text_sha256[:16]}",
            f"policy      {self.policy}{_knobs(self.policy_options)} at --ram {format_bytes(self.ram_budget_bytes)}",
            f"perplexity  {self.perplexity:.4f} ± {self.perplexity_se:.4f}  (nll {self.nll:.5f} ± {self.nll_se:.5f})",
        ]
        if self.kld_mean is None:
            why = "exact is not compared with itself" if self.policy == "exact" else "no reference was asked for"
            lines.append(f"KLD         none: {why}; --reference MODEL names one")
        else:
            lines += [
                f"KLD         mean {self.kld_mean:.6f} ± {self.kld_se:.6f}, median {self.kld_median:.6f}, "
                f"99 % {self.kld_p99:.6f}, max {self.kld_max:.6f}  (nats per token, against {self.reference})",
                f"same top-1  {100 * (self.top1_agreement or 0):.2f} %",
            ]
        lines += [
            f"read        {format_bytes(int(self.expert_bytes_per_token))}/token, "
            f"{100 * self.expert_hit_rate:.0f} % expert hits",
            f"speed       {self.tok_s:.1f} tok/s",
        ]
        return "\n".join(lines)


def _knobs(options: dict[str, Any]) -> str:
    """The knobs that are not at their default."""
    default = PolicyOptions().to_json(DEFAULTS)
    set_ = [f"{k} {v}" for k, v in options.items() if k != "name" and v != default.get(k)]
    return f" ({', '.join(set_)})" if set_ else ""


def evaluate(
    model: str | Path,
    text: str | Path,
    options: EngineOptions | None = None,
    *,
    reference: str | Path | None = "exact",
    n_ctx: int = 512,
    n_chunks: int | None = None,
    one_by_one: bool = False,
    verify: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Perplexity of a text file under options.policy, and its KLD from a reference.

    reference: `exact`, the same model under the exact policy, on an engine of its own before; nothing is compared when
    options.policy is exact itself. A path: that model, exact, at --ram auto, loaded and closed before. None: nothing.
    n_ctx: tokens of a chunk, which is the context; options.n_ctx and logits_all are not looked at. n_chunks: at most so
    many. one_by_one: every token is a step of its own, so that policy, speed and bytes per token are those of decode.
    Micro-batches are chosen such that their logits stay below 64 MiB (96 tokens at a vocabulary of 151,936) unless
    options.n_ubatch says otherwise; the reference gets the same micro-batches and the same attention, but
    no warm start, so that the pass under test does not start from the usage of its own text.
    verify: as of Engine. tell: called with a line of progress after each chunk, and as by Engine.
    Raises UsageError for a text shorter than a chunk, a bad n_ctx or n_chunks, models that differ in vocabulary;
    MissingFile; DiskFull when the temporary folder cannot hold the reference's logits; whatever the engine raises.
    """
    data = read_text(text)
    o = eval_options(model, options or EngineOptions(), n_ctx, one_by_one=one_by_one)
    other = None if reference is None or str(reference) == "exact" else Path(reference)
    compare = other is not None or (reference is not None and o.policy.name != "exact")
    n_vocab = vocabulary_size(model)
    if other is not None:
        _check_same_size(model, other)
    with ReferenceLogits() as kept:
        run = _Run(data, n_ctx, n_chunks, one_by_one, n_vocab, kept, tell)
        tokens_of_other: list[int] = []
        if other is not None:
            theirs = replace(o, policy=PolicyOptions(), ram_bytes=None, warm_start=False)
            with Engine(other, theirs, verify=verify) as engine:
                tokens_of_other = run.tokenize(engine)
                run.keep_reference(engine)
        elif compare:  # on an engine of its own: what it leaves in memory would serve the pass under test
            with Engine(model, replace(o, policy=PolicyOptions(), warm_start=False), verify=verify) as engine:
                engine.check_policy(o.policy)
                run.tokenize(engine)
                run.keep_reference(engine)
        if compare:  # what the reference's run left in this process is not the tested model's
            o = replace(o, charge_program=False)
        with Engine(model, o, verify=verify, tell=tell) as engine:
            if run.tokenize(engine) != tokens_of_other and other is not None:
                raise UsageError(f"{model} and {other} make different tokens of {text}; their vocabularies differ")
            return run.score(engine, str(model), str(reference) if compare else None)


def eval_options(model: str | Path, options: EngineOptions, n_ctx: int, *, one_by_one: bool = False) -> EngineOptions:
    """Options for an engine whose context is one chunk, with micro-batch and attention settled.

    one_by_one: the memory is that of decode, one row of logits. Raises UsageError for a chunk that cannot be.
    """
    if n_ctx < MIN_CHUNK or n_ctx % 2:
        raise UsageError(f"chunks of {n_ctx} tokens: an even number of at least {MIN_CHUNK} is needed")
    sizes = sizes_of(model, replace(options, n_ctx=n_ctx, logits_all=False))
    if n_ctx > sizes.trained_context:
        raise UsageError(
            f"chunks of {n_ctx} tokens do not fit: {model} was trained for {sizes.trained_context}; use shorter ones"
        )
    n_ubatch, flash_attn = sizes.n_ubatch, sizes.flash_attn
    if not one_by_one and not options.n_ubatch:
        fits = OUTPUT_BYTES // (4 * vocabulary_size(model))
        n_ubatch = min(n_ubatch, max(32, fits // 32 * 32))
    return replace(options, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=flash_attn, logits_all=not one_by_one)


def vocabulary_size(path: str | Path) -> int:
    """Number of tokens, from the header: rows of the token embedding, which llama.cpp requires to be as many."""
    return read_gguf(open_model(Path(path)).skeleton).tensors["token_embd.weight"].shape[1]


def _check_same_size(model: str | Path, other: Path) -> None:
    ours, theirs = vocabulary_size(model), vocabulary_size(other)
    if ours != theirs:
        raise UsageError(
            f"{model} has a vocabulary of {ours} tokens but {other} has {theirs}; only equal ones can be compared"
        )


class _Run:
    """One evaluation in progress: its chunks, and the reference's rows and scores."""

    def __init__(
        self, data: bytes, n_ctx: int, n_chunks: int | None, one_by_one: bool, n_vocab: int, kept: ReferenceLogits,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.data, self.n_ctx, self.n_chunks, self.one_by_one = data, n_ctx, n_chunks, one_by_one
        self.n_vocab, self.kept, self.tell = n_vocab, kept, tell
        self.text_chunks = 0
        self.chunks: IntArray = np.empty((0, n_ctx), np.int32)
        self.reference_nll: float | None = None

    def tokenize(self, engine: Engine) -> list[int]:
        """The tokens scored, chunk after chunk."""
        tokens = tokenize_text(engine, self.data)
        self.text_chunks = len(tokens) // self.n_ctx
        self.chunks = cut_chunks(tokens, self.n_ctx, n_chunks=self.n_chunks, bos=bos_token(engine))
        return [int(t) for t in self.chunks.ravel()]

    def keep_reference(self, engine: Engine) -> None:
        """Run the reference and keep its logits."""
        self.kept.check_room(len(self.chunks) * len(scored_positions(self.n_ctx)), self.n_vocab)
        nll = self._nll(engine, "reference", PassWork(), self.kept.write)
        self.kept.rewind()
        self.reference_nll = float(nll.mean())

    def score(self, engine: Engine, model: str, reference: str | None) -> Evaluation:
        """Run the pass under test. reference: its name when its logits were kept."""
        work, before = PassWork(), engine.counters()
        kld: list[DoubleArray] = []
        same = 0

        def compare(rows: FloatArray) -> None:
            nonlocal same
            theirs = self.kept.read(*rows.shape)
            kld.append(kld_of_rows(theirs, rows))
            same += int((theirs.argmax(-1) == rows.argmax(-1)).sum())

        nll = self._nll(engine, engine.policy.name, work, compare if reference is not None else lambda _: None)
        counters = engine.counters().since(before)
        all_kld = np.concatenate(kld) if kld else None
        return Evaluation(
            model=model,
            text_sha256=hashlib.sha256(self.data).hexdigest(),
            policy=engine.policy.name,
            policy_options=engine.options.policy.to_json(DEFAULTS),
            ram_budget_bytes=engine.plan.budget_bytes,
            arena_bytes=engine.plan.arena_bytes,
            one_by_one=self.one_by_one,
            n_ctx=self.n_ctx,
            n_ubatch=1 if self.one_by_one else engine.n_ubatch,
            flash_attn=engine.flash_attn,
            n_chunks=len(self.chunks),
            text_chunks=self.text_chunks,
            tokens=work.tokens,
            scored_tokens=len(nll),
            nll=float(nll.mean()),
            nll_se=standard_error(nll),
            reference=reference,
            reference_nll=self.reference_nll,
            kld_mean=None if all_kld is None else float(all_kld.mean()),
            kld_se=None if all_kld is None else standard_error(all_kld),
            kld_median=None if all_kld is None else float(np.median(all_kld)),
            kld_p99=None if all_kld is None else float(np.quantile(all_kld, 0.99)),
            kld_max=None if all_kld is None else float(all_kld.max()),
            top1_agreement=None if all_kld is None else same / len(all_kld),
            expert_bytes_per_token=counters.bytes_read / work.tokens,
            expert_hit_rate=counters.hits / counters.uses if counters.uses else 0.0,
            tok_s=work.tokens / work.seconds,
        )

    def _nll(self, engine: Engine, what: str, work: PassWork, use: Callable[[FloatArray], None]) -> DoubleArray:
        """Run a pass; the nll of every scored token. use() gets the rows of logits, a few at a time, in order."""
        n = max(1, BLOCK_VALUES // self.n_vocab)
        last = scored_positions(self.n_ctx).stop
        nll: list[DoubleArray] = []
        with contextlib.closing(logits_pass(engine, self.chunks, one_by_one=self.one_by_one, work=work)) as blocks:
            for block in blocks:
                next_tokens = self.chunks[block.chunk, block.position + 1 :]
                for at in range(0, len(block.rows), n):
                    rows = block.rows[at : at + n]
                    nll.append(_finite(nll_of_rows(rows, next_tokens[at : at + len(rows)])))
                    use(rows)
                if block.position + len(block.rows) == last:
                    mean = float(np.concatenate(nll).mean())
                    self.tell(
                        f"{what}: chunk {block.chunk + 1} of {len(self.chunks)}, "
                        f"perplexity {math.exp(min(mean, 700)):.4f}"
                    )
        return np.concatenate(nll)


def _finite(nll: DoubleArray) -> DoubleArray:
    """Raises EngineError when the model's logits make no probability of a token."""
    if not np.isfinite(nll).all():
        raise EngineError("the model gave logits that are not finite numbers; its weights may be damaged (--verify)")
    return nll
