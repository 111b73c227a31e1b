"""Checkpoints: copies of a recurrent state at some positions of the conversation, to go back to.

Attention can forget the end of a conversation; a recurrent state, as qwen3next and the other hybrid models have beside
their attention, cannot: without a copy the whole prompt is evaluated again. A copy is taken where the next prompt is
likely to part from this one, see runner/kv/prefix.py, and is valid while the KV cache still holds the tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_edge.runner.llama import cannot_go_back, partial_state, set_partial_state
from moe_edge.schedulers.budget import MIB

BEFORE_END = 4  # tokens before a prompt's end where a checkpoint is taken; as in llama.cpp's server
FEWEST, MOST = 2, 8
SHARE_BYTES = 256 * MIB  # of all copies together, if FEWEST are not more


def how_many(state_bytes: int) -> int:
    """How many copies are kept of a state of so many bytes. It follows from the model alone, never from the budget."""
    return max(FEWEST, min(MOST, SHARE_BYTES // max(1, state_bytes)))


def checkpoints_bytes(state_bytes: int) -> int:
    """The bound that the memory plan counts, in bytes; 0 for a model without a recurrent state."""
    return how_many(state_bytes) * state_bytes if state_bytes > 0 else 0


@dataclass(frozen=True)
class Checkpoint:
    """The state after n_tokens. copy: a ctypes array of bytes."""

    n_tokens: int
    copy: Any


class Checkpoints:
    """Of one loaded Llama. For a model that can go back by itself there are none, and take() does nothing."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self.are_needed = cannot_go_back(llama)
        self.kept: list[Checkpoint] = []  # by n_tokens, ascending
        self.parted_at = 0  # where the present prompt parted from what was evaluated before it
        self.prompt_tokens = 0  # of the last prompt, or of the one that runs
        self.aligned = 0  # tokens at the beginning that lie in the micro-batches of a prompt evaluated whole

    def take(self) -> None:
        """Copy the state as it is now, unless there is a copy of this position, or nothing was evaluated.

        When there are as many as are kept, the one goes whose neighbours are the closest: a long conversation keeps
        some of its beginning, which other conversations may share, and the last two always stay.
        """
        n = self._llama.n_tokens
        if not self.are_needed or n == 0 or any(each.n_tokens == n for each in self.kept):
            return
        size = len(self.kept[0].copy) if self.kept else 0
        if size and len(self.kept) >= how_many(size):
            self._drop_one()
        self.kept.append(Checkpoint(n, partial_state(self._llama)))
        self.kept.sort(key=lambda each: each.n_tokens)

    def _drop_one(self) -> None:
        """Before the copy is made: two states too many would be over the bound."""
        ends = [0, *(each.n_tokens for each in self.kept)]
        gaps = [(ends[at + 2] - ends[at], at) for at in range(len(self.kept) - 1)]
        del self.kept[min(gaps)[1]]

    def follow(self, n_kept: int, n_prompt: int, n_ubatch: int) -> None:
        """A prompt of n_prompt tokens goes on after n_kept of them."""
        self.prompt_tokens = n_prompt
        if n_kept > self.aligned or n_kept % n_ubatch:
            self.aligned = min(self.aligned, n_kept) // n_ubatch * n_ubatch
            return
        whole = n_prompt - BEFORE_END if self.are_needed else n_prompt  # micro-batches end there, too
        if self.are_needed and self.parted_at % n_ubatch and n_kept < self.parted_at < whole:
            whole = self.parted_at
        self.aligned = max(0, whole) // n_ubatch * n_ubatch

    def before(self, n_tokens: int) -> int:
        """The longest prefix of at most n_tokens that can be gone back to; 0 when there is none."""
        return max((each.n_tokens for each in self.kept if each.n_tokens <= n_tokens), default=0)

    def go_back(self, n_tokens: int) -> bool:
        """Go back to the longest prefix of at most n_tokens; False when there is none, or llama.cpp refuses it."""
        self.forget_after(n_tokens)
        return bool(self.kept) and set_partial_state(self._llama, self.kept[-1].copy, self.kept[-1].n_tokens)

    def forget_after(self, n_tokens: int) -> None:
        """The conversation goes on differently after n_tokens, so later copies are of another one."""
        self.kept = [each for each in self.kept if each.n_tokens <= n_tokens]

    def clear(self) -> None:
        self.kept = []
        self.prompt_tokens = self.aligned = 0
