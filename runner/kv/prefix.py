"""How much of a prompt is in the KV cache already, and how the rest gets there.

A model with a recurrent state gets a checkpoint at three places: where this prompt goes on from what was evaluated
before it, which is before a user's message; where it parted from it, such as after a system prompt that two
conversations share; and a few tokens before its end, since the next prompt often differs from there on: templates drop
the thinking of earlier replies, and close the turn in another way than they opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_edge.models.errors import Stopped
from moe_edge.runner.kv.rollback import BEFORE_END, Checkpoints
from moe_edge.runner.llama import clear_memory, cut_memory

WORTH_TOKENS = 32  # a shared beginning of fewer tokens is no place for a checkpoint


def shared_prefix(llama: Any, tokens: Sequence[int]) -> int:
    """How many tokens at the beginning of a prompt are in the KV cache; not the last one, which gives the logits."""
    n = 0
    for have, want in zip(llama.input_ids[: llama.n_tokens].tolist(), tokens[:-1], strict=False):
        if have != want:
            break
        n += 1
    return n


def keep_prefix(llama: Any, checkpoints: Checkpoints, tokens: Sequence[int], most: int | None = None) -> int:
    """Cut the KV cache down to what the prompt begins with, or to `most` tokens of that; how many tokens are kept.

    A recurrent state goes back to the last checkpoint before the place where they part; without one, and for a state
    that llama.cpp refuses, everything is evaluated again.
    """
    n = shared_prefix(llama, tokens)
    if most is not None:
        n = min(n, most)
    kept = _cut(llama, checkpoints, n)
    checkpoints.follow(kept, len(tokens), int(llama.n_batch))
    return kept


def _cut(llama: Any, checkpoints: Checkpoints, n: int) -> int:
    checkpoints.parted_at = n if n < llama.n_tokens else 0
    if n == llama.n_tokens:
        checkpoints.take()
        return n
    if n > 0 and (cut_memory(llama, n) or checkpoints.go_back(n)):
        checkpoints.forget_after(llama.n_tokens)
        return int(llama.n_tokens)
    clear_memory(llama)
    checkpoints.clear()
    return 0


def prefill(
    llama: Any, checkpoints: Checkpoints, tokens: Sequence[int], should_stop: Callable[[], bool]
) -> Iterator[int]:
    """Evaluate what the KV cache lacks of the prompt, a micro-batch at a time; after each, how many tokens it has.

    Micro-batches end at checkpoints; a model that needs none has the micro-batches it always had. Raises Stopped when
    should_stop() turns true between two of them.
    """
    places = _places(checkpoints, len(tokens))
    yield llama.n_tokens
    while llama.n_tokens < len(tokens):
        if should_stop():
            raise Stopped("stopped")
        at = llama.n_tokens
        end = min([at + llama.n_batch, *(place for place in places if place > at)])
        llama.eval(tokens[at:end])
        if llama.n_tokens in places:
            checkpoints.take()
        yield llama.n_tokens


def _places(checkpoints: Checkpoints, n_prompt: int) -> list[int]:
    """After how many tokens of a prompt a checkpoint is taken."""
    if not checkpoints.are_needed:
        return []
    parted, near_end = checkpoints.parted_at, n_prompt - BEFORE_END
    return [parted] * (WORTH_TOKENS <= parted < near_end) + [near_end] * (near_end > 0)


def keep_evaluated(llama: Any, checkpoints: Checkpoints) -> None:
    """After a decode that failed: the micro-batches before it stay in the KV cache, the rest is forgotten.

    A recurrent state goes back to its last checkpoint. What cannot be forgotten in part is forgotten whole.
    """
    llama._requires_eval = True  # the logits are of no use
    if not llama._ctx.kv_cache_seq_rm(-1, llama.n_tokens, -1) and not checkpoints.go_back(llama.n_tokens):
        clear_memory(llama)
        checkpoints.clear()
