"""What a worker does for one client: its layers' experts, scheduled under the worker's own budget.

The client's llama.cpp has its weights, KV cache and compute buffers of these layers in this process; the relay counts
them (native/relay.h). When they are all there, ready() gives the rest of `--ram` to the experts.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, replace
from typing import Any

from moe_edge.models.errors import BudgetTooSmall, UsageError
from moe_edge.runner.capi import trim_memory
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.loading import Loading
from moe_edge.runner.memory import current_rss_bytes
from moe_edge.runner.native import NativeModel
from moe_edge.runner.scheduling import start_from_memory, use_policy
from moe_edge.runner.sizes import layout_of
from moe_edge.runner.workers.guard import board_counts, limit_buffers, since, use_experts
from moe_edge.runner.workers.part import part_of
from moe_edge.schedulers.budget import (
    MIB,
    PROGRAM_ALLOWANCE_BYTES,
    PROGRAM_VARIES_BYTES,
    FixedSizes,
    MemoryPlan,
    arena_floor_bytes,
    format_arg,
    format_bytes,
    plan_memory,
)
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policy import Policy, make_policy

SERVER_BYTES = 4 * MIB  # graphs and messages in ggml's RPC server and our relay


class Session:
    """The layers begin <= number < end of the worker's model, for one client.

    options: the worker's, with the client's context and micro-batch. ram_bytes: the worker's whole budget. Raises
    UsageError when the layers have no experts, BudgetTooSmall when not even the experts in flight fit.
    """

    def __init__(
        self, path: str, options: EngineOptions, ram_bytes: int, begin: int, end: int, policy: PolicyOptions
    ) -> None:
        self._loading = Loading(path, options)
        self.model = part_of(self._loading.model, begin, end)
        self._ram, self._policy_options = ram_bytes, policy
        self.policy: Policy | None = None
        self._begun = board_counts()
        self.plan: MemoryPlan | None = None
        self.native = NativeModel(self.model, n_io_threads=options.n_io_threads, direct_io=options.direct_io)
        try:
            self.layout = layout_of(self.model, self.native)
            self._scratch = self._scratch_bytes()
            self._excess = max(0, current_rss_bytes() - PROGRAM_ALLOWANCE_BYTES)
            reserved = self._reserved_bytes() + arena_floor_bytes(self.layout)
            if reserved >= ram_bytes:
                raise BudgetTooSmall(
                    f"--ram {ram_bytes // MIB}MiB is too small for these layers: they need more than "
                    f"{format_arg(reserved)}; give the worker more, or the board fewer layers",
                    reserved,
                )
            limit_buffers(ram_bytes - reserved)
            self.native.pace(options.disk_bytes_per_second or 0)
            use_experts(self.native)
        except BaseException:
            self.close()
            raise

    def _scratch_bytes(self) -> int:
        """What the engine works with: found by a load that allocates nothing, which shows the routers."""
        probe, _ = self._loading.llama(self.native, no_alloc=True)
        o = self._loading.options
        scratch = self.native.scratch_bytes(self._loading.n_ubatch, self.model.n_expert_used, o.threads())
        probe.close()
        del probe
        self.native.unbind()
        trim_memory()  # the vocabulary, which a board does not need
        return scratch

    def _reserved_bytes(self) -> int:
        """Everything but experts and the client's buffers."""
        loading = self._loading
        widest = max((t.shape[0] for t in loading.skeleton.tensors.values() if len(t.shape) > 1), default=0)
        plain = 0 if loading.flash_attn else 2 * loading.n_ctx * loading.n_head
        work = loading.n_ubatch * max(4 * widest, plain)
        return self._scratch + work + self._excess + SERVER_BYTES

    def ready(self) -> MemoryPlan:
        """The client has all it needs on this board: the rest is for experts. Raises BudgetTooSmall with the floor."""
        trim_memory()
        fixed = FixedSizes(
            board_counts().buffer_bytes, 0, self._reserved_bytes() - self._excess, 0, self._excess,
            program_varies_bytes=PROGRAM_VARIES_BYTES,
        )  # fmt: skip
        self.plan = plan_memory(self._ram, fixed, self.layout, self.model.n_expert_used)
        self.native.set_arena(self.plan.arena_bytes)
        self.policy = make_policy(self._policy_options, self.layout, self.plan.arena_bytes, self.model.calibration)
        use_policy(self.native, self.policy, self.layout, self.model)
        return self.plan

    def denied(self) -> str | None:
        """What to say when a buffer of the client's was refused; None when none was."""
        counts = board_counts()
        if counts.denied_bytes == 0:
            return None
        there = counts.peak_buffer_bytes
        need = there + counts.denied_bytes + self._reserved_bytes() + arena_floor_bytes(self.layout)
        need += PROGRAM_VARIES_BYTES
        return (
            f"--ram {self._ram // MIB}MiB is too small for layers {self.model.layers[0].layer} to "
            f"{self.model.layers[-1].layer}: {format_bytes(there)} of weights and KV cache were there when "
            f"{format_bytes(counts.denied_bytes)} more were needed; give the worker {format_arg(need)} or more, "
            "or the board fewer layers"
        )

    def take_error(self) -> str:
        """Why a graph has failed, once; the policy starts again from what is really in memory."""
        raised, self.native.schedule_error = self.native.schedule_error, None
        said = self.native.take_error()
        if self.policy is not None:
            start_from_memory(self.native, self.policy)
        if raised is not None:
            return f"the scheduler failed: {raised!r}"
        return said or "a graph could not be computed"

    def status(self) -> dict[str, Any]:
        """What a client shows of this board."""
        stats = self.policy.stats if self.policy is not None else None
        return {
            "counters": asdict(self.native.counters()),
            "board": asdict(since(board_counts(), self._begun)),
            "stats": list(astuple(stats)) if stats is not None else None,
            "rss_bytes": current_rss_bytes(),
            "arena_bytes": self.plan.arena_bytes if self.plan else 0,
        }

    def oldest_use_first(self) -> list[int]:
        """Units of this part in memory."""
        return list(self.policy.cache.oldest_use_first()) if self.policy is not None else []

    def set_stop(self, stop: bool) -> None:
        self.native.set_stop(stop)

    def close(self) -> None:
        """When no graph comes any more. A graph under way ends first."""
        self.native.set_stop(True)
        use_experts(None)
        self.native.close()
        limit_buffers(0)
        trim_memory()


def session_options(own: EngineOptions, asked: dict[str, Any]) -> EngineOptions:
    """The worker's options with what a client says of its context. Raises UsageError for what is no number."""
    try:
        return replace(
            own, n_ctx=int(asked["n_ctx"]), n_ubatch=int(asked["n_ubatch"]), flash_attn=bool(asked["flash_attn"]),
            cache_type_k=str(asked["cache_type_k"]), cache_type_v=str(asked["cache_type_v"]), repack="off",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"the client's options are not those of this version: {e!r}") from e
