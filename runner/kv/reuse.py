"""How much of a prompt a conversation that is known saves: the present one, one held in memory, or one on disk. Pure.

A prompt that continues a conversation goes on where that one parts from it, as if nothing else were known. A prompt of
another conversation may share its beginning, such as a system prompt. It takes over whole micro-batches of that only,
as it would have had them itself: its bits are those that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from moe_edge.runner.kv.rollback import BEFORE_END
from moe_edge.runner.llama import can_cut


@dataclass(frozen=True)
class Known:
    """tokens: int32. prompt_tokens: of its last prompt. aligned: see Checkpoints. first: the first position whose cells
    are there. checkpoints: after how many tokens, for a model with a recurrent state."""

    tokens: Any
    prompt_tokens: int
    aligned: int
    first: int = 0
    checkpoints: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reuse:
    """n: tokens of the prompt that need no evaluation. most: where the two part, or share no more. continues: whether
    the prompt is of this conversation."""

    n: int
    most: int
    continues: bool

    @property
    def rank(self) -> tuple[bool, int]:
        return self.continues and self.n > 0, self.n


def reuse_of(known: Known, tokens: Sequence[int], *, window: int, recurrent: bool, n_ubatch: int) -> Reuse:
    """What of a prompt need not be evaluated; its last token always is, since it gives the logits."""
    have, most = known.tokens, min(len(known.tokens), len(tokens) - 1)
    differ = np.flatnonzero(np.asarray(have[:most]) != np.asarray(tokens[:most], np.int32))
    common = int(differ[0]) if len(differ) else most
    continues = 0 < known.prompt_tokens - min(BEFORE_END, known.prompt_tokens // 8) <= common
    if not continues:
        common = min(common, known.aligned) // n_ubatch * n_ubatch
    if common == len(have):
        return Reuse(common, common, continues)
    if recurrent:
        places = (at for at in known.checkpoints if at <= common and (continues or at % n_ubatch == 0))
        return Reuse(max(places, default=0), common, continues)
    return Reuse(common if can_cut(window, known.first, common) else 0, common, continues)
