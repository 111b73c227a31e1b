"""Conversations of several clients in memory, beside the one that the KV cache has: copies of their states.

llama.cpp can keep several sequences in one cache, but then a reply's bits depend on its neighbours: flash attention
splits the cells among the threads, whoever they belong to (docs/LOG.md, 2026-11-27). A copy that is put back gives the
bits that it had, takes the bytes of its tokens and no more, and is the same for every kind of memory. The copies have a
bound of their own in the memory plan. The conversation used longest ago goes to the disk, if that pays, when another
one needs its room.

The copy of a sliding window has the cells that the window has left, too, so it can be cut where a template drops the
thinking. Models whose copies lack them are not held, see runner/llama.py, window_is_kept().
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_edge.runner.kv.prefix import keep_prefix
from moe_edge.runner.kv.prompt_cache import LEAST_TOKENS, PromptCache
from moe_edge.runner.kv.reuse import Known, Reuse, reuse_of
from moe_edge.runner.kv.rollback import Checkpoint, Checkpoints
from moe_edge.runner.kv.state_file import StateFile, write_copy
from moe_edge.runner.llama import (
    clear_memory,
    copy_sequence,
    first_position,
    partial_bytes,
    sequence_bytes,
    set_sequence,
    sliding_window,
    window_is_kept,
)

SHARE = 8  # of the memory above the floor, the part that `auto` holds conversations in, if the KV cache is not less


def auto_bytes(kv_bytes: int, spare_bytes: int) -> int:
    """How many bytes conversations may take when nobody has said: as much as the KV cache, or a share of the memory
    that the floor leaves."""
    return max(0, min(kv_bytes, spare_bytes // SHARE))


@dataclass(frozen=True)
class Copy:
    """A conversation that was moved out of the KV cache. data: its state; nbytes: with its checkpoints. partial: see
    partial_bytes()."""

    known: Known
    data: memoryview
    checkpoints: tuple[Checkpoint, ...]
    nbytes: int
    partial: int | None


class Held:
    """Of one loaded Llama. limit_bytes: of all copies together. prompts: where what leaves memory goes, if anywhere."""

    def __init__(
        self, llama: Any, checkpoints: Checkpoints, limit_bytes: int, prompts: PromptCache | None = None
    ) -> None:
        self._llama, self._checkpoints, self._prompts = llama, checkpoints, prompts
        self.limit_bytes = limit_bytes if window_is_kept(llama) or not sliding_window(llama) else 0
        self.copies: list[Copy] = []  # the one used longest ago first
        self.n_restored = self.n_spilled = 0

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.copies)

    @property
    def n_conversations(self) -> int:
        """With the present one."""
        return len(self.copies) + int(self._llama.n_tokens > 0)

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """As kv.prefix.keep_prefix(), from the conversation that saves the most: the present one, a copy, or a file."""
        best = self._reuse(self._present(), tokens)
        copy: Copy | None = None
        state: StateFile | None = None
        for each in self.copies:
            found = self._reuse(each.known, tokens)
            if found.rank > best.rank:
                best, copy = found, each
        for file in self._prompts.states() if self._prompts is not None else ():
            found = self._reuse(_known_of(file), tokens)
            worth = (best.rank[0], best.n + LEAST_TOKENS)
            if found.n >= LEAST_TOKENS and found.rank >= worth and len(file.tokens) < self._llama.n_ctx():
                best, copy, state = found, None, file
        if copy is not None or state is not None or not best.continues:
            self.park(spare=copy)
        if copy is not None:
            self._restore(copy, best)
        elif state is not None and self._prompts is not None and not self._prompts.load(state):
            return keep_prefix(self._llama, self._checkpoints, tokens, 0)
        elif state is not None:
            self._follow(_known_of(state))
        if best.continues:
            return keep_prefix(self._llama, self._checkpoints, tokens)
        self._forget_unaligned()
        return keep_prefix(self._llama, self._checkpoints, tokens, best.most)

    def _reuse(self, known: Known, tokens: Sequence[int]) -> Reuse:
        return reuse_of(
            known, tokens, window=sliding_window(self._llama), recurrent=self._checkpoints.are_needed,
            n_ubatch=int(self._llama.n_batch),
        )  # fmt: skip

    def _present(self) -> Known:
        c, n = self._checkpoints, int(self._llama.n_tokens)
        tokens = self._llama.input_ids[:n].astype("int32")
        places = tuple(each.n_tokens for each in c.kept)
        return Known(tokens, min(c.prompt_tokens, n), min(c.aligned, n), max(0, first_position(self._llama)), places)

    def _follow(self, known: Known) -> None:
        self._checkpoints.prompt_tokens, self._checkpoints.aligned = known.prompt_tokens, known.aligned

    def _forget_unaligned(self) -> None:
        """Checkpoints of another conversation that this one would not have had."""
        c, n_ubatch = self._checkpoints, int(self._llama.n_batch)
        c.kept = [each for each in c.kept if each.n_tokens % n_ubatch == 0 and each.n_tokens <= c.aligned]

    def _restore(self, copy: Copy, reuse: Reuse) -> None:
        """Put a conversation back. Its copy goes when the prompt continues it, and stays when it is of another one."""
        self.copies.remove(copy)
        if not set_sequence(self._llama, copy.data, copy.known.tokens):
            self._checkpoints.clear()
            return
        self._checkpoints.kept = list(copy.checkpoints)
        self._follow(copy.known)
        self.n_restored += 1
        if not reuse.continues:
            self.copies.append(copy)

    def park(self, spare: Copy | None = None) -> None:
        """Copy the present conversation, since another one takes its place. spare: a copy that must stay.

        It goes to the disk instead, if that pays, when there is no room even without the others.
        """
        present = self._present()
        if len(present.tokens) < LEAST_TOKENS:
            return
        kept = tuple(self._checkpoints.kept)
        nbytes = sequence_bytes(self._llama) + sum(len(each.copy) for each in kept)
        if not self._checkpoints.are_needed:  # what another conversation begins with is in that one
            if any(_begins(present.tokens, each.known.tokens) for each in self.copies):
                return
            self.copies = [
                each for each in self.copies if each is spare or not _begins(each.known.tokens, present.tokens)
            ]
        while self.nbytes + nbytes > self.limit_bytes and (oldest := self._oldest(spare)) is not None:
            self.copies.remove(oldest)
            self._spill(oldest)
        if self.nbytes + nbytes <= self.limit_bytes:
            data = copy_sequence(self._llama)
            self.copies.append(Copy(present, data, kept, nbytes, partial_bytes(self._llama)))
        elif self._prompts is not None:
            self._prompts.store()

    def _oldest(self, spare: Copy | None) -> Copy | None:
        return next((each for each in self.copies if each is not spare), None)

    def _spill(self, copy: Copy) -> None:
        self.n_spilled += 1
        prompts = self._prompts
        if prompts is None:
            return
        known = copy.known
        extra = {"prompt_tokens": known.prompt_tokens, "aligned": known.aligned}
        prompts.keep(
            known.tokens, copy.nbytes,
            lambda path: write_copy(
                path, known.tokens, copy.data, copy.checkpoints, prompts.identity, extra, known.first, copy.partial
            ),
        )  # fmt: skip

    def new_conversation(self) -> None:
        """Begin a text that has nothing to do with the present one."""
        self.park()
        clear_memory(self._llama)
        self._checkpoints.clear()

    def close(self) -> None:
        """The end: what pays goes to the disk, and the copies are freed. The present conversation is left alone."""
        copies, self.copies = self.copies, []
        for copy in copies:
            self._spill(copy)


def _begins(short: Any, long: Any) -> bool:
    return len(short) <= len(long) and bool((long[: len(short)] == short).all())


def _known_of(state: StateFile) -> Known:
    n = len(state.tokens)
    told = state.extra
    return Known(
        state.tokens, min(n, int(told.get("prompt_tokens", n))), min(n, int(told.get("aligned", 0))), state.first,
        tuple(at for at, _, _ in state.checkpoints),
    )  # fmt: skip
