"""`--context-shift`: a full context forgets the older half of what it holds, and the rest moves down.

llama.cpp turns the keys of what stays to their new positions. The values were computed while the forgotten tokens were
seen, so the text that follows is not what a model that never saw them would write: lossy, by name, counted in every
reply, and never kept for another prompt.
"""

from __future__ import annotations

from typing import Any

from moe_edge.models.errors import UsageError
from moe_edge.runner.llama import can_shift, cannot_go_back, clear_memory, cut_memory, shift_memory

SINKS = 4  # tokens at the beginning that stay: attention leans on them (StreamingLLM, Xiao et al. 2023, section 3)
NAMED = "--context-shift"


def check_shift(llama: Any, name: str, key_type: str) -> None:
    """Raises UsageError for a model whose memory cannot shift. llama: a dry load is enough."""
    why = ""
    if cannot_go_back(llama):
        why = "keeps a recurrent state, which cannot forget a part of what it has seen"
    elif not can_shift(llama):
        why = "has positions that llama.cpp cannot shift"
    elif key_type != "f16":
        why = f"is to keep its keys as {key_type}, which llama.cpp widens in memory beside the budget to shift them"
    if why:
        raise UsageError(f"{NAMED}: {name} {why}; leave the option out: a full context then ends the reply")


def shift(llama: Any) -> int:
    """Forget the older half, but for the first SINKS tokens; how many tokens were forgotten. The context is full."""
    n = (int(llama.n_tokens) - SINKS) // 2
    shift_memory(llama, SINKS, n)
    return n


def forget_shifted(llama: Any) -> None:
    """After a reply that was shifted: what is in memory is of no prompt, but for its first tokens."""
    if not cut_memory(llama, SINKS):
        clear_memory(llama)
