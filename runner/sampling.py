"""How a token is drawn: llama.cpp's samplers in one chain, a grammar that the reply must follow, and probabilities.

generate.py decodes and asks this module for the next token. Nothing here evaluates anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import EngineError, UsageError
from moe_edge.runner.events import TokenLogprob
from moe_edge.runner.llama import captured_log
from moe_edge.runner.reason import reason
from moe_edge.runner.tokens import token_bytes

ROOT = "root"  # the rule that a grammar begins with
LAST_TOKENS = 64  # that the penalties look at; llama.cpp's default
NOTHING_ALLOWED = "the grammar allows no token here; it may ask for characters that the model lacks"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, with llama-cpp-python's names and meanings; temp 0 is greedy.

    logit_bias: (token id, what is added to its logit). grammar: GBNF that the reply must follow, from grammar_root on.
    logprobs: how many of the most likely tokens to tell beside each one; None: tell no probabilities at all.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    grammar_root: str = ROOT
    logprobs: int | None = None


class Sampler:
    """Draws the tokens of one reply. Close it, or use it in `with`.

    llama: llama-cpp-python's Llama. Raises UsageError when llama.cpp does not take the grammar, or when the bias names
    a token that the vocabulary does not have.
    """

    def __init__(self, llama: Any, sampling: Sampling) -> None:
        self._llama, self._sampling = llama, sampling
        self._grammar: Any = None if sampling.grammar is None else make_grammar(
            llama, sampling.grammar, sampling.grammar_root
        )
        self._chain = _chain(llama, sampling)
        self._candidates: Candidates | None = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what llama.cpp holds for it."""
        import llama_cpp

        if self._grammar is not None:
            llama_cpp.llama_sampler_free(self._grammar)
            self._grammar = None
        self._chain.close()

    def draw(self) -> int:
        """The next token, from the logits of the last decode.

        Raises UsageError when the grammar allows no token of this vocabulary.
        """
        if self._grammar is None:
            return int(self._chain.sample(self._llama._ctx, -1))
        return self._draw_with_grammar()

    def _draw_with_grammar(self) -> int:
        """Draw freely, and draw again among what the grammar allows only if that token is not: the grammar looks at
        every token of the vocabulary, which takes longer than all else. llama.cpp's own programs do the same."""
        import llama_cpp

        if self._candidates is None:
            self._candidates = Candidates(self._llama.n_vocab())
        candidates, logits = self._candidates, last_logits(self._llama)
        token = candidates.choose(logits, [self._chain.sampler])
        if not candidates.allows(self._grammar, token):
            token = candidates.choose(logits, [self._grammar, self._chain.sampler])
            if not candidates.allows(self._grammar, token):  # a bias may forbid all that the grammar allows
                raise UsageError(NOTHING_ALLOWED)
        llama_cpp.llama_sampler_accept(self._chain.sampler, token)
        llama_cpp.llama_sampler_accept(self._grammar, token)
        return token

    def logprob(self, token: int) -> TokenLogprob | None:
        """What the last decode thought of this token; None when the sampling asks for no probabilities."""
        n = self._sampling.logprobs
        if n is None:
            return None
        logprobs = log_softmax(last_logits(self._llama))
        top = most_likely(logprobs, n)
        return TokenLogprob(
            token, self._bytes(token), float(logprobs[token]),
            tuple((each, self._bytes(each), float(logprobs[each])) for each in top),
        )  # fmt: skip

    def _bytes(self, token: int) -> bytes:
        return token_bytes(self._llama, token, special=True)


def make_grammar(llama: Any, text: str, root: str = ROOT) -> Any:
    """llama.cpp's sampler of a grammar, which the caller frees. Raises UsageError when llama.cpp refuses it."""
    import llama_cpp

    with captured_log() as log:
        sampler = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, text.encode(), root.encode())
    if not sampler:
        raise UsageError(f"llama.cpp cannot use this grammar: {reason(log) or 'it names no fault'}")
    return sampler


def check_grammar(llama: Any, text: str, root: str = ROOT) -> None:
    """Raises UsageError when llama.cpp does not take the grammar."""
    import llama_cpp

    llama_cpp.llama_sampler_free(make_grammar(llama, text, root))


def _chain(llama: Any, s: Sampling) -> Any:
    """llama-cpp-python's LlamaSampler, with the samplers in the order of its own create_completion."""
    from llama_cpp import _internals

    n_vocab = llama.n_vocab()
    if wrong := [token for token, _ in s.logit_bias if not 0 <= token < n_vocab]:
        raise UsageError(f"logit_bias names token {wrong[0]}, but the vocabulary has {n_vocab}")
    chain = _internals.LlamaSampler()
    if s.logit_bias:
        chain.add_logit_bias(n_vocab, dict(s.logit_bias))
    chain.add_penalties(n_vocab, LAST_TOKENS, s.repeat_penalty, s.frequency_penalty, s.presence_penalty)
    if s.temp == 0.0:
        chain.add_greedy()
        return chain
    chain.add_top_k(s.top_k)
    chain.add_top_p(s.top_p, 1)
    chain.add_min_p(s.min_p, 1)
    chain.add_temp(s.temp)
    chain.add_dist(llama._seed if s.seed is None else s.seed)
    return chain


class Candidates:
    """llama.cpp's list of the tokens that may come next, over an array of our own."""

    def __init__(self, n_vocab: int) -> None:
        import llama_cpp

        self._rows = np.zeros(n_vocab, np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._one = np.zeros(1, self._rows.dtype)
        self._lib = llama_cpp

    def _list_of(self, rows: npt.NDArray[Any]) -> Any:
        data = rows.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data))
        return self._lib.llama_token_data_array(data, len(rows), -1, False)

    def choose(self, logits: npt.NDArray[np.float32], samplers: Sequence[Any]) -> int:
        """The token that these samplers pick, one after the other. logits: (n_vocab,).

        Raises UsageError when they leave none: a grammar that is given a token it does not allow ends the process.
        """
        self._rows["id"], self._rows["logit"] = self._ids, logits
        array = self._list_of(self._rows)
        for sampler in samplers:
            if not np.isfinite(self._rows["logit"]).any():
                break
            self._lib.llama_sampler_apply(sampler, ctypes.byref(array))
        if array.selected < 0:
            raise UsageError(NOTHING_ALLOWED)
        return int(array.data[array.selected].id)

    def allows(self, grammar: Any, token: int) -> bool:
        """Whether a grammar's sampler lets this token pass."""
        self._one[0] = (token, 0.0, 0.0)
        self._lib.llama_sampler_apply(grammar, ctypes.byref(self._list_of(self._one)))
        return bool(np.isfinite(self._one["logit"][0]))


def last_logits(llama: Any) -> npt.NDArray[np.float32]:
    """(n_vocab,) of the last decode; llama.cpp's own memory, good until the next one."""
    import llama_cpp

    row = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
    if not row:
        raise EngineError("llama.cpp has no logits of the last token")
    return np.ctypeslib.as_array(row, shape=(llama.n_vocab(),))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Natural logarithms of the probabilities; the shape stays."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum(dtype=np.float64)), np.float32)


def most_likely(logprobs: npt.NDArray[np.float32], n: int) -> list[int]:
    """The ids of the n largest values, the largest first."""
    n = min(n, len(logprobs))
    if n == 0:
        return []
    some = np.argpartition(logprobs, -n)[-n:]
    return [int(each) for each in some[np.argsort(-logprobs[some], kind="stable")]]
