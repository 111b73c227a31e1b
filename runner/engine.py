"""One model, loaded: a `Llama` whose experts the native engine computes under a byte budget.

The skeleton is loaded by llama-cpp-python's own `Llama`, through llama.py, so its samplers and KV cache are used as
they are. What is planned, scheduled, stopped and freed is decided here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_edge.models.errors import EngineError, MoeEdgeError, Stopped, UsageError
from moe_edge.models.store.watch import check_replaced
from moe_edge.runner import signals
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.kv.held import Held, auto_bytes
from moe_edge.runner.kv.identity import identity_of, prompt_folder
from moe_edge.runner.kv.prefix import keep_evaluated, keep_prefix
from moe_edge.runner.kv.prompt_cache import PromptCache
from moe_edge.runner.kv.rollback import Checkpoints
from moe_edge.runner.llama import captured_log, clear_memory, rebuild_graphs, set_threads
from moe_edge.runner.loading import Loading
from moe_edge.runner.memory import auto_budget_bytes, current_rss_bytes
from moe_edge.runner.native import NativeModel, ThreadPool
from moe_edge.runner.neighbours import CrowdWatch, usable_cores
from moe_edge.runner.reason import reason
from moe_edge.runner.repacking import repacked_types
from moe_edge.runner.scheduling import start_from_memory, use_policy
from moe_edge.runner.sizes import fixed_sizes, layout_of
from moe_edge.runner.touched_file import TouchedFile
from moe_edge.runner.turns import Turns
from moe_edge.runner.warm import Preloaded, WarmStart, usage_path
from moe_edge.runner.workers.words import board_lines
from moe_edge.schedulers.budget import FixedSizes, MemoryPlan, plan_memory
from moe_edge.schedulers.crowd import CrowdControl
from moe_edge.schedulers.options import RENORMALISE, PolicyOptions
from moe_edge.schedulers.packed import PackedSplit
from moe_edge.schedulers.policies import DEFAULTS
from moe_edge.schedulers.policy import Policy, make_policy
from moe_edge.schedulers.settings import (
    choose_setting,
    describe_options,
    describe_setting,
    policy_selects,
    policy_warning,
    resolve_options,
)
from moe_edge.schedulers.split import choose_packed_bytes


class Engine:
    """One model, loaded and ready to decode. Close it, or use it in `with`.

    `llama` is llama-cpp-python's own object. tell: called with what a warm start did. named: what messages call the
    model, when `path` only stands for it. Raises BudgetTooSmall, CannotRun with llama.cpp's reason, and whatever
    opening the files raises.
    """

    def __init__(
        self,
        path: str | Path,
        options: EngineOptions | None = None,
        *,
        verify: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        named: str | Path | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self._tell = tell
        self._warm: WarmStart | None = None
        self.started = time.monotonic()
        program_bytes = current_rss_bytes()  # what the process holds that is not of the model
        self._loading = Loading(path, self.options, verify=verify, named=named)
        self.model, self.name = self._loading.model, self._loading.name
        self.n_ctx, self.n_ubatch = self._loading.n_ctx, self._loading.n_ubatch
        self.flash_attn = self._loading.flash_attn
        self._loading.prove()
        self._policy: Policy | None = None
        self.native = NativeModel(
            self.model, n_io_threads=self.options.n_io_threads, direct_io=self.options.direct_io
        )
        self.llama: Any = None
        self.prompts: PromptCache | None = None
        self.held: Held | None = None
        self._pool: ThreadPool | None = None
        self._crowd: CrowdWatch | None = None
        self._last_counters = Counters()
        self._touched = TouchedFile(self.model.files)
        self._turns = Turns(lambda: self.native.set_stop(True), self._free)
        try:
            self.layout = layout_of(self.model, self.native)
            self._selecting = policy_selects(self.options.policy, self.model.calibration)
            self.native.set_selecting(self._selecting)  # which takes memory, to be planned
            with signals.deferred():  # freeing what was asked calls back into Python, as close() says
                fixed = fixed_sizes(self._loading, self.native, program_bytes)
            plan = self._plan(fixed)
            self._sizes = self.native.packed_sizes()
            self._packed_note = ""
            self.plan: MemoryPlan = replace(plan, packed_bytes=self._packed_bytes(plan.arena_bytes))
        except BaseException:
            self.close()
            raise

    def _plan(self, fixed: FixedSizes) -> MemoryPlan:
        ram, held = self.options.ram_bytes, self.options.held_bytes
        budget = auto_budget_bytes() if ram is None else ram
        plan = plan_memory(budget, fixed, self.layout, self.model.n_expert_used)
        if held == 0:
            return plan
        if not self._loading.can_hold:
            self._tell("conversations are not held in memory: this model's sliding window cannot be copied whole")
            return plan
        nbytes = auto_bytes(fixed.kv_bytes, plan.budget_bytes - plan.floor_bytes) if held is None else held
        return plan_memory(budget, replace(fixed, held_bytes=nbytes), self.layout, self.model.n_expert_used)

    def _packed_bytes(self, arena_bytes: int) -> int:
        """What of the experts' memory is for packed ones, as the options say."""
        o = self.options
        asked = choose_packed_bytes(o.packed_cache, self.layout, self._sizes, arena_bytes)
        if asked is not None:
            return asked
        if o.packed_planner is None:
            raise UsageError("packed_cache auto needs a packed_planner, runner/measure/packed_split.py has one")
        nbytes, self._packed_note = o.packed_planner(
            self.model, self.layout, self._sizes, arena_bytes, o.n_threads, o.disk_bytes_per_second
        )
        return nbytes

    @property
    def policy(self) -> Policy:
        assert self._policy is not None, "load() first"
        return self._policy

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The skeleton's key-values, every byte of them."""
        return self._loading.metadata

    def load(self) -> Any:
        """Load the skeleton into memory and make the arena, full after a warm start; returns the Llama."""
        self._turns.check_open()
        if self.llama is not None:
            return self.llama
        if self.options.warm_start:
            self._warm = WarmStart(usage_path(self.model.store_id), self.layout)
        self.set_policy(self.options.policy)
        self.native.set_arena(self.plan.whole_bytes, self.plan.packed_bytes)
        self.native.pace(self.options.disk_bytes_per_second or 0)
        self.llama, _ = self._loading.llama(self.native, no_alloc=False)
        check_replaced(self.model)
        self.checkpoints = Checkpoints(self.llama)
        self._open_prompts()
        self._check_selecting(self.policy)
        if self.plan.fixed.held_bytes:
            self.held = Held(self.llama, self.checkpoints, self.plan.fixed.held_bytes, self.prompts)
        self.llama._moe_edge = self  # whoever keeps the Llama keeps the engine its experts come from
        if self.native.bound_tensors == 0:
            raise EngineError(f"{self.name}: llama.cpp offered no expert tensor of it to the engine")
        if ThreadPool.is_needed() and self.options.threads() > 1:
            self._pool = ThreadPool(self.llama._ctx.ctx, self.options.threads())
        self._watch_neighbours()
        if self._warm is not None:
            self._tell(self._warm.preload(self.native, self.policy, self.plan.whole_bytes))
        self.load_seconds = time.monotonic() - self.started
        return self.llama

    def _open_prompts(self) -> None:
        if self.options.prompt_cache_bytes == 0:
            return
        try:
            self.prompts = PromptCache(
                prompt_folder(), self.options.prompt_cache_bytes, self.identity(), self.llama, self.checkpoints,
                self._tell,
            )  # fmt: skip
        except MoeEdgeError as e:  # a read-only home is no reason not to run
            self._tell(f"prompt cache: {e}")

    @property
    def is_whole(self) -> bool:
        """Whether llama.cpp has all of the conversation that it should have."""
        return True

    def identity(self) -> dict[str, Any]:
        """What must be the same for a conversation's state to be gone on with: it changes what is in the KV cache."""
        return identity_of(
            self.model.store_id, self.options.policy.to_json(DEFAULTS), n_ctx=self.n_ctx, n_ubatch=self.n_ubatch,
            flash_attn=self.flash_attn, cache_types=(self.options.cache_type_k, self.options.cache_type_v),
            n_threads=self.options.threads(), keeps_window=self._loading.keeps_window,
            repacked=self._loading.repacked.nbytes > 0, repacked_experts=repacked_types(self.model.pieces),
        )  # fmt: skip

    def keep_prefix(self, tokens: Sequence[int]) -> int:
        """Cut the KV cache down to what a prompt begins with, or load a conversation that has more of it; how many
        tokens need no evaluation."""
        if self.held is not None:
            return self.held.keep_prefix(tokens)
        if self.prompts is not None:
            return self.prompts.keep_prefix(tokens)
        return keep_prefix(self.llama, self.checkpoints, tokens)

    def _watch_neighbours(self) -> None:
        """Let other programs have their cores: fewer threads, or threads that sleep, while they are busy.

        With flash attention the threads are not made fewer: over 512 cells it sums by thread, so bits would change.
        """
        n_threads, cores = self.options.threads(), usable_cores()
        if n_threads < 2 or ThreadPool.is_needed():
            return
        control = CrowdControl(n_threads, len(cores), may_drop=not self.flash_attn)
        self._crowd = CrowdWatch(
            control, cores, lambda n: set_threads(self.llama, n),
            unpacked=lambda: self.native.counters().unpack_seconds,
        )  # fmt: skip
        self.native.each_step = self._crowd.look

    @property
    def preloaded(self) -> Preloaded | None:
        """What a warm start read; None without one."""
        return self._warm.preloaded if self._warm is not None else None

    def check_policy(self, options: PolicyOptions) -> None:
        """Raise what set_policy would raise."""
        make_policy(options, self.layout, self.plan.whole_bytes, self.model.calibration, None, self._packed_split)

    @property
    def _packed_split(self) -> PackedSplit | None:
        return PackedSplit(self._sizes, self.plan.packed_bytes) if self.plan.packed_bytes else None

    def set_policy(self, options: PolicyOptions) -> Policy:
        """Schedule by another policy from the next step on; what is in memory stays.

        Raises UnknownName, and UsageError for knobs that do not go together or need a calibration the model lacks.
        """
        self._turns.check_open()
        usage = self._warm.usage if self._warm is not None else None
        policy = make_policy(
            options, self.layout, self.plan.whole_bytes, self.model.calibration, usage, self._packed_split
        )
        self._use(policy)
        self.native.set_renormalise(options[RENORMALISE])
        self.options = replace(self.options, policy=options)  # so that a result names the knobs it was made with
        return policy

    def lines(self) -> list[str]:
        """What to say before running: the split of the memory, and what a lossy policy will do."""
        calibration = self.model.calibration
        o = self.options.policy
        lines = self.plan.lines()
        if o.max_kld is not None:
            lines.append(describe_setting(choose_setting(calibration, o.max_kld), o.max_kld))
        o = resolve_options(o, calibration)
        if self._packed_note:
            lines.append(self._packed_note)
        if self.options.lossy_cache:
            lines.append(f"lossy: {self.options.lossy_cache}")
        if self.options.context_shift:
            lines.append("lossy: context shift: a full context forgets its older half")
        if o.name != "exact":
            known = "" if calibration else "; its damage is not known: convert with --calibrate to have it measured"
            lines.append(f"lossy: policy {describe_options(o, calibration)}{known}")
            if warning := policy_warning(o, calibration):
                lines.append(f"lossy: {warning}")
        return lines

    def board_reports(self) -> list[dict[str, Any]]:
        """Of each board, when there are several; here nothing."""
        return []

    def board_lines(self) -> list[str]:
        """What to say of each board after a reply."""
        return board_lines(self.board_reports())

    def _use(self, policy: Policy) -> None:
        self._select_by(policy)
        self._policy = policy
        use_policy(self.native, policy, self.layout, self.model)
        self.native.schedule = self._touched.counting(policy.plan, self.layout.n_experts)

    def _select_by(self, policy: Policy) -> None:
        """Let the policy choose experts, or nobody; llama.cpp's graphs have to be built anew where that changes."""
        if self.llama is not None:
            self._check_selecting(policy)
        self.native.select, self.native.select_many = policy.select, policy.select_many
        changed, self._selecting = policy.selects != self._selecting, policy.selects
        if changed:
            self.native.set_selecting(policy.selects)
        if changed and self.llama is not None:
            rebuild_graphs(self.llama)

    def _check_selecting(self, policy: Policy) -> None:
        """Raises UsageError for a policy that chooses experts when this model's graph does not let it."""
        if policy.selects and (reason := self.native.why_not_selecting()):
            raise UsageError(
                f"{self.name}: policy {policy.name} cannot choose experts of a '{self.model.architecture}' model: "
                f"{reason}; use another policy"
            )

    def counters(self) -> Counters:
        """Counts since the model was opened; after close(), those at its end."""
        try:
            return self.native.counters()
        except EngineError:  # freed, perhaps by another thread just now
            return self._last_counters

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Around anything that decodes: a failed decode becomes our own error, and the engine can go on after it.

        One thread at a time has it, the others wait; EngineError for a second time in one thread, and after close().

        Ctrl-C ends a decode at the next expert and comes out as KeyboardInterrupt: raised by Python's own handler it
        would be lost in the callback that happens to run. A handler other than Python's own is left alone.
        """
        with (
            self._turns.decoding(lambda: self.native.set_stop(False)),
            signals.deferred(lambda: self.native.set_stop(True)) as pressed,
            captured_log() as log,
        ):
            try:
                yield
            except RuntimeError as e:
                recovered = self._recover(e, log)
                if not pressed:
                    raise recovered from e

    def _recover(self, cause: RuntimeError, log: list[str]) -> BaseException:
        """After a failed decode: the reason as our own error; policy and KV cache set to what is really there."""
        said = self.native.take_error()
        raised, self.native.schedule_error = self.native.schedule_error, None
        start_from_memory(self.native, self.policy)
        keep_evaluated(self.llama, self.checkpoints)
        if raised is not None and (isinstance(raised, MoeEdgeError) or not isinstance(raised, Exception)):
            return raised
        if raised is not None:
            return EngineError(f"the scheduler failed: {raised!r}")
        if self.native.stop_requested or said == "stopped":
            return Stopped("stopped")
        return EngineError(said or f"{self.name}: llama.cpp could not decode: {reason(log) or cause}")

    def new_conversation(self) -> None:
        """Begin a text that has nothing to do with the last one: empties the KV cache and tells the policy.

        The experts in memory stay.
        """
        self._turns.check_open()
        if self.held is not None:
            self.held.new_conversation()
        else:
            if self.prompts is not None:
                self.prompts.store()
            clear_memory(self.llama)
            self.checkpoints.clear()
        self.policy.new_conversation()

    def check_open(self) -> None:
        """Raises EngineError after close()."""
        self._turns.check_open()

    def stop(self) -> None:
        """Ask a running decode to stop; it raises Stopped from within `decoding`. Raises EngineError after close()."""
        self._turns.check_open()
        self.native.set_stop(True)

    def close(self) -> None:
        """Free everything; a decode in another thread is stopped and waited for. Again: nothing.

        Ctrl-C waits for its end: llama.cpp calls back into Python while it frees. From within a decode (a signal
        handler, a callback) the decode is stopped, and frees when it has ended.
        """
        with signals.deferred():
            self._turns.close()

    def _free(self) -> None:
        self._last_counters = self.native.counters()
        if self._crowd is not None:
            self._crowd.close()
            self._crowd = None
        if self.llama is not None:
            if self.prompts is not None:
                self.prompts.store()
            if self.held is not None:
                self.held.close()
            self.checkpoints.clear()
            self.llama.close()
            self.llama = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self.native.close()
        warm, self._warm = self._warm, None
        if warm is not None and (said := warm.save()) is not None:
            self._tell(said)
        if (said := self._touched.save()) is not None:
            self._tell(said)

    def __enter__(self) -> Engine:
        try:
            self.load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
