"""A policy and the native model that asks it, tied together: for an engine of its own, and for a board of several."""

from __future__ import annotations

import time

from moe_edge.models.store.store import ExpertModel
from moe_edge.runner.native import NativeModel
from moe_edge.schedulers.layout import Layout
from moe_edge.schedulers.lookahead.around import LookAheadPolicy
from moe_edge.schedulers.lookahead.controller import Measured
from moe_edge.schedulers.lookahead.prompt_window import PromptSums
from moe_edge.schedulers.policy import Policy


def use_policy(native: NativeModel, policy: Policy, layout: Layout, model: ExpertModel) -> None:
    """Let this policy schedule from the next step on; it starts from what is in memory."""
    unpacked = model.expert_bytes / max(1, model.stored_expert_bytes)
    start_from_memory(native, policy)
    native.schedule, native.meanwhile = policy.plan, policy.meanwhile
    native.part_changes = None if policy.packed is None else policy.packed.take_changes
    native.wants_routing = policy.wants_routing
    policy.measure_prompts(lambda: _prompt_sums(native, unpacked))
    if isinstance(policy, LookAheadPolicy):
        native.set_lookahead(policy.depth, min(2 * model.n_expert_used, min(layout.n_experts)))
        native.announce = policy.plan_ahead
        policy.measure = lambda: _measured(native)
    else:
        native.set_lookahead(0, 0)
        native.announce = None
    if policy.wants_attention:  # and from then on: graphs that llama.cpp keeps and uses again do not change
        native.watch_attention()


def start_from_memory(native: NativeModel, policy: Policy) -> None:
    """Let a policy start from what is really in memory."""
    policy.reset(native.resident_units())
    native.drop_empty_parts()  # the policy before knew of their places; this one would not
    if policy.packed is not None:
        policy.packed.reset_parts(native.held_parts())


def _measured(native: NativeModel) -> Measured:
    """The sums that the look-ahead controller decides by."""
    stall, busy, nbytes = native.some_counters("stall_ns", "disk_busy_ns", "bytes_read")
    return Measured(time.perf_counter(), stall * 1e-9, busy * 1e-9, nbytes)


def _prompt_sums(native: NativeModel, unpacked: float) -> PromptSums:
    """The sums that a prompt's window follows. unpacked: bytes in memory for each byte that is read."""
    step, stall, busy, nbytes = native.some_counters("step_ns", "stall_ns", "disk_busy_ns", "bytes_read")
    return PromptSums(time.perf_counter(), step * 1e-9, stall * 1e-9, busy * 1e-9, round(nbytes * unpacked))
