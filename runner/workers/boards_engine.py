"""An engine whose layers are on other boards: llama.cpp here, experts and dense layers there.

It is used as an Engine is. The embedding and the output stay here, so that what crosses the network for a token is its
hidden state, once for each board, and never an expert.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_edge.models.errors import BoardError, BudgetTooSmall, MoeEdgeError, UsageError
from moe_edge.models.store.watch import check_replaced
from moe_edge.runner import signals
from moe_edge.runner.capi import Counters
from moe_edge.runner.engine import Engine
from moe_edge.runner.engine_options import EngineOptions
from moe_edge.runner.kv.rollback import Checkpoints
from moe_edge.runner.llama import Placement, captured_log, clear_memory, synchronize
from moe_edge.runner.loading import Loading
from moe_edge.runner.memory import auto_budget_bytes
from moe_edge.runner.native import NativeModel
from moe_edge.runner.sizes import fixed_sizes, layout_of
from moe_edge.runner.turns import Turns
from moe_edge.runner.workers.board import Board
from moe_edge.runner.workers.chosen_layers import block_work, choose_runs
from moe_edge.runner.workers.guard import cpu_buffer_type, rpc_library
from moe_edge.runner.workers.part import content_id, dense_bytes_by_block, n_blocks
from moe_edge.runner.workers.remote import RemoteNative, RemotePolicy
from moe_edge.runner.workers.wire import Address
from moe_edge.runner.workers.worker import versions
from moe_edge.schedulers.budget import MIB, FixedSizes, MemoryPlan, format_arg, format_bytes
from moe_edge.schedulers.options import PolicyOptions
from moe_edge.schedulers.policy import Policy
from moe_edge.schedulers.workers import AUTO, Split, shares_of

# The output and its norm, and the embedding, which some models use as their output.
STAYS_HERE = rb"^(output|token_embd)"


class BoardsEngine(Engine):
    """workers: where they are; each gets a run of layers, in this order. split: which layers (boards_split.py).

    Raises BoardError, UsageError for a split that is not the model's, and what Engine raises.
    """

    def __init__(
        self,
        path: str | Path,
        options: EngineOptions,
        workers: Sequence[Address],
        *,
        split: Split = AUTO,
        verify: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        named: str | Path | None = None,
    ) -> None:
        rpc_library()
        self.options, self._tell, self._addresses, self._split = options, tell, tuple(workers), split
        self._check_options()
        options = self.options = replace(options, repack="off")  # boards keep their layers' weights as they are sent
        self._warm, self._pool, self._crowd, self.prompts, self.held = None, None, None, None, None
        self._packed_note, self._selecting = "", False
        self.started = time.monotonic()
        self.llama: Any = None
        self._loading = Loading(path, options, verify=verify, named=named)
        self.model, self.name = self._loading.model, self._loading.name
        self.n_ctx, self.n_ubatch = self._loading.n_ctx, self._loading.n_ubatch
        self.flash_attn = self._loading.flash_attn
        self._loading.prove()
        self._last_counters = Counters()
        self.boards: list[Board] = []
        self._gone: list[Board] = []  # lost, and to be closed when llama.cpp has freed what it had there
        self._broken = False
        self._decoder: ThreadPoolExecutor | None = None
        remote = RemoteNative(lambda: self.boards, self.model)
        self.native = remote  # type: ignore[assignment]  # what an Engine asks of it, over the network
        self._remote = remote
        self._turns = Turns(lambda: remote.set_stop(True), self._free)
        try:
            self._measure_model()
            self.plan = self._own_plan()
            self._connect()
        except BaseException:
            self.close()
            raise

    def _check_options(self) -> None:
        o = self.options
        if o.policy.name != "exact" or o.policy.max_kld is not None:
            raise UsageError("several boards run the exact policy only; leave out --policy and --max-kld")
        if o.warm_start:
            raise UsageError("--warm-start is of one machine; leave it out with --workers")
        if o.packed_cache not in ("off", "auto"):
            raise UsageError("--packed-cache is of one machine; leave it out with --workers")
        if o.held_bytes:
            raise UsageError("--held-conversations is of one machine; leave it out with --workers")
        if o.context_shift:
            raise UsageError("--context-shift is of one machine; leave it out with --workers")
        if o.repack == "on":
            raise UsageError("--repack on is of one machine; leave it out with --workers")

    def _measure_model(self) -> None:
        """Sizes of the layers, and what stays here."""
        loading = self._loading
        native = NativeModel(self.model, n_io_threads=1, direct_io=self.options.direct_io)
        try:
            with signals.deferred():
                self.layout, fixed = layout_of(self.model, native), fixed_sizes(loading, native)
        finally:
            with signals.deferred():
                native.close()
        blocks = n_blocks(self.model.architecture, loading.metadata)
        _, here = dense_bytes_by_block(loading.skeleton, blocks)
        self._work, self._board_fixed_bytes = block_work(loading, self.layout, fixed)
        vocabulary = fixed.dense_bytes - self.model.dense_bytes
        # A model whose output is its embedding has it twice: llama.cpp makes a tensor of its own for each use.
        self._own = FixedSizes(here + vocabulary, 0, fixed.compute_bytes, 0, fixed.program_excess_bytes)

    def _own_plan(self) -> MemoryPlan:
        """Of this machine, which holds no layer. Raises BudgetTooSmall."""
        ram = self.options.ram_bytes
        budget, need = auto_budget_bytes() if ram is None else ram, self._own.total_bytes
        if budget < need:
            raise BudgetTooSmall(
                f"--ram {budget // MIB}MiB is too small: what stays on this machine needs {format_arg(need)} "
                f"(embedding, output and vocabulary {format_bytes(self._own.dense_bytes)}, compute "
                f"{format_bytes(self._own.compute_bytes)}); try --ram {format_arg(need)} or more",
                need,
            )
        return MemoryPlan(budget, self._own, 0, need, need, need)

    # ---- the boards

    def _connect(self) -> None:
        """Ask every board who it is, and give it its layers. Raises BoardError, BudgetTooSmall."""
        ours, mine = versions(), content_id(self.model)
        for address in self._addresses:
            board = Board(address)
            self.boards.append(board)
            board.check(mine, ours)
        runs = choose_runs(self.boards, self._split, self._work, self._board_fixed_bytes, self._tell)
        o = self.options
        for board, layers in zip(self.boards, runs, strict=True):
            board.open(
                layers, n_ctx=self.n_ctx, n_ubatch=self.n_ubatch, flash_attn=self.flash_attn,
                cache_type_k=o.cache_type_k, cache_type_v=o.cache_type_v, cache=o.policy.cache,
                lookahead=o.policy.lookahead,
            )  # fmt: skip

    def load(self) -> Any:
        """Send the layers to their boards, which then make room for experts; returns the Llama."""
        self._turns.check_open()
        if self.llama is None:
            self._policy = RemotePolicy(self._remote)
            self.llama = self._loaded()
            check_replaced(self.model)
            self.checkpoints = Checkpoints(self.llama)
            self._open_prompts()
            self.llama._moe_edge = self
            self.load_seconds = time.monotonic() - self.started
        return self.llama

    def _loaded(self) -> Any:
        """A Llama on the boards. Raises BoardError, BudgetTooSmall when one has too little memory."""
        devices, runs = tuple(b.guard.device for b in self.boards if b.guard), [b.layers for b in self.boards]
        placement = Placement(
            devices, shares_of(runs), runs[-1].stop - runs[0].start + 1, (STAYS_HERE, cpu_buffer_type())
        )
        try:
            llama, _ = self._loading.llama(None, no_alloc=False, placement=placement)
        except MoeEdgeError:
            self._raise_what_boards_say()
            raise
        try:
            self._raise_what_boards_say()
            for board in self.boards:
                board.ready()
        except BaseException:
            llama.close()
            raise
        self._watch_decode(llama)
        return llama

    def _raise_what_boards_say(self) -> None:
        """Raises BoardError when a board is lost, or had no room for what llama.cpp wanted there."""
        for board in self.boards:
            if why := board.why_lost:
                raise BoardError(why)
        for board in self.boards:
            if denied := board.ask("denied").get("denied"):
                raise BoardError(f"board {board.address}: {denied}")

    def _watch_decode(self, llama: Any) -> None:
        """llama.cpp believes a graph on another board to be computed as soon as it was sent: after each decode the
        boards are asked. In the main thread another one decodes, since Python handles Ctrl-C between two steps of its
        own only, and here there are none."""
        decode = llama._ctx.decode

        def checked(batch: Any) -> None:
            with captured_log() as log:
                try:
                    decode(batch)
                    synchronize(llama)
                except RuntimeError as e:
                    raise RuntimeError("".join(log) or str(e)) from e
            if any([board.has_failed() for board in self.boards]):
                raise RuntimeError("a board has failed")

        def aside(batch: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                return checked(batch)
            if self._decoder is None:
                self._decoder = ThreadPoolExecutor(1, "moe-edge-decode")
            self._decoder.submit(checked, batch).result()

        llama._ctx.decode = aside

    # ---- running

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """As Engine.decoding(). When a board was lost, everything is first sent to the boards again; BoardError, naming
        the one that is not back."""
        with super().decoding():
            if not self.is_whole:
                self._mend()
            yield

    @property
    def is_whole(self) -> bool:
        """Not while a board is lost, and its KV cache with it."""
        return not self._broken and not any(board.why_lost for board in self.boards)

    def _mend(self) -> None:
        """Everything again, on new connections. Until that has worked, nothing may be decoded."""
        self._broken = True
        for board in self.boards:
            board.let_go()  # llama.cpp has its buffers there still: the guards stay
            self._gone.append(board)
        self.boards.clear()
        self._last_counters = Counters()
        old = self.llama
        try:
            self._connect()
            new = self._loaded()
        except BaseException:
            for board in self.boards:
                board.close()
            self.boards.clear()
            raise
        # Whoever holds the Llama keeps it: what it is made of is exchanged.
        new._moe_edge = self
        old.__dict__, new.__dict__ = new.__dict__, old.__dict__
        new.close()
        self._close_gone()
        clear_memory(old)
        self.checkpoints.clear()  # the same object: the prompt cache has it as well
        self._watch_decode_again(old)
        self._broken = False
        self._tell("the boards are there again")

    def _close_gone(self) -> None:
        for board in self._gone:
            board.close()
        self._gone.clear()

    def _watch_decode_again(self, llama: Any) -> None:
        """The decode that was set for the new object refers to it; it now has the old one's insides."""
        context = llama._ctx
        del context.decode
        self._watch_decode(llama)

    def _recover(self, cause: RuntimeError, log: list[str]) -> BaseException:
        """After a failed decode: the reason, which a board has."""
        lost = next((board.why_lost for board in self.boards if board.why_lost), None)
        if lost is not None:
            clear_memory(self.llama)
            self.checkpoints.clear()
            return BoardError(lost)
        return super()._recover(cause, log)

    def set_policy(self, options: PolicyOptions) -> Policy:
        """Raises UsageError: the boards have made theirs."""
        raise UsageError("the policy of several boards cannot be changed while they are at work")

    check_policy = set_policy  # type: ignore[assignment]

    def lines(self) -> list[str]:
        """The split of the memory here, and which board has which layers."""
        own = self.plan
        out = [
            f"memory {format_bytes(own.budget_bytes)}: this machine keeps embedding, output and vocabulary "
            f"{format_bytes(own.fixed.dense_bytes)}, compute {format_bytes(own.fixed.compute_bytes)}"
        ]
        for board in self.boards:
            taken = board.taken
            line = f"board {board.address}: layers {board.layers.start} to {board.layers.stop - 1}"
            if taken:
                line += (
                    f", memory {format_bytes(taken['ram_bytes'])}: weights, KV cache and compute "
                    f"{format_bytes(taken['fixed_bytes'])}, experts {format_bytes(taken['arena_bytes'])} of "
                    f"{format_bytes(taken['resident_bytes'] - taken['fixed_bytes'])}"
                )
            out.append(line)
        return out

    def board_reports(self) -> list[dict[str, Any]]:
        """Of each board: where it is, its layers, and its counters, memory and traffic."""
        return [self._remote.report(board) for board in self.boards]

    def counters(self) -> Counters:
        """Sums over the boards; after close(), those at its end."""
        if self.boards:
            self._last_counters = self._remote.counters()
        return self._last_counters

    def __enter__(self) -> BoardsEngine:
        super().__enter__()
        return self

    def _free(self) -> None:
        self._last_counters = self.counters()
        if self.llama is not None:
            if self.prompts is not None:
                self.prompts.store()
            self.checkpoints.clear()
            self.llama.close()
            self.llama = None
        if self._decoder is not None:
            self._decoder.shutdown()
        for board in self.boards:
            board.close()
        self.boards.clear()
        self._close_gone()
