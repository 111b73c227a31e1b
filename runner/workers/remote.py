"""What an Engine asks of its native model and of its policy, answered by the boards together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from moe_edge.models.errors import BoardError, MoeEdgeError
from moe_edge.models.store.store import ExpertModel
from moe_edge.runner.capi import Counters
from moe_edge.runner.workers.board import Board
from moe_edge.schedulers.layout import Prefetch, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.lookahead.prompt_window import PromptSums
from moe_edge.schedulers.policies.levels import IntArray, PolicyStats


class RemoteNative:
    """As a NativeModel, for what an Engine and its users ask while it runs."""

    def __init__(self, boards: Callable[[], Sequence[Board]], model: ExpertModel) -> None:
        self._boards, self._model = boards, model
        self.stop_requested = False
        self.schedule_error: BaseException | None = None
        self.bound_tensors = 1  # of the boards' own; asked where a model without experts is refused
        self._asking: list[threading.Thread] = []

    def set_stop(self, stop: bool) -> None:
        """Safe from a signal handler: another thread asks, since this one may be in the middle of a question."""
        if not stop and not self.stop_requested:
            return
        self.stop_requested = stop
        if stop:
            thread = threading.Thread(target=self._tell_all, args=("stop",), name="moe-edge-stop", daemon=True)
            self._asking.append(thread)
            thread.start()
            return
        for each in self._asking:
            each.join()
        self._asking.clear()
        self._tell_all("go")

    def _tell_all(self, op: str) -> None:
        for board in self._boards():
            with contextlib.suppress(MoeEdgeError):
                board.ask(op)

    def take_error(self) -> str | None:
        """Why a graph failed, naming the board; None when none says so."""
        said: str | None = None
        for board in self._boards():
            try:
                why = board.take_failure()
            except BoardError as e:
                why = str(e)
            else:
                why = f"board {board.address}: {why}" if why else None
            said = said or why
        return "stopped" if self.stop_requested else said

    def counters(self) -> Counters:
        """The sums over the boards. Those of a lost one are as they were last known."""
        sums = {field.name: field.default for field in fields(Counters)}
        for board in self._boards():
            for name, value in board.status().get("counters", {}).items():
                sums[name] = sums[name] + value
        return Counters(**sums)  # type: ignore[arg-type]

    def stats(self) -> PolicyStats:
        sums = [0] * 7
        for board in self._boards():
            found = board.status().get("stats")
            if found:
                sums = [a + b for a, b in zip(sums, found[:7], strict=True)]
        return PolicyStats(*sums)

    def units(self, op: str) -> list[int]:
        """The boards' units of a question, by their numbers in the whole model."""
        out: list[int] = []
        for board in self._boards():
            with contextlib.suppress(BoardError):
                first = self._first_unit(board.layers.start)
                out += [first + int(unit) for unit in board.ask(op)["units"]]
        return out

    def _first_unit(self, begin: int) -> int:
        levels = len(self._model.levels)
        return sum(layer.n_expert * levels for layer in self._model.layers if layer.layer < begin)

    def resident_units(self) -> list[int]:
        return self.units("resident")

    def drop_empty_parts(self) -> None:
        """Boards have no packed cache."""

    def new_conversation(self) -> None:
        self._tell_all("new_conversation")

    def report(self, board: Board) -> dict[str, Any]:
        status, traffic = board.status(), board.traffic()
        counters, own = status.get("counters", {}), status.get("board", {})
        compute = float(own.get("compute_seconds", 0.0))
        return {
            "board": str(board.address),
            "layers": [board.layers.start, board.layers.stop - 1],
            "lost": board.why_lost,
            "up": board.why_lost is None,
            "expert_uses": counters.get("uses", 0),
            "expert_hits": counters.get("hits", 0),
            "expert_bytes_read": counters.get("bytes_read", 0),
            "stall_seconds": counters.get("stall_seconds", 0.0),
            "compute_seconds": compute,
            "network_seconds": max(0.0, traffic.wait_seconds - compute),
            "bytes_sent": traffic.bytes_sent,
            "bytes_received": traffic.bytes_received,
            "stub_bytes_sent": traffic.stub_bytes,
            "graphs": traffic.graphs,
            "graphs_sent": traffic.new_graphs,
            "rss_bytes": status.get("rss_bytes", 0),
            "arena_bytes": status.get("arena_bytes", 0),
            "ram_bytes": board.taken.get("ram_bytes", 0),
        }


class RemoteCache:
    def __init__(self, native: RemoteNative) -> None:
        self._native = native

    def oldest_use_first(self) -> list[int]:
        """Units in memory; the order is of each board by itself."""
        return self._native.units("recency")


class RemotePolicy:
    """As a Policy: the boards have one each. What only a board asks of it is not here to be asked."""

    name, wants_routing, wants_attention, selects, packed = "exact", False, False, False, None

    def __init__(self, native: RemoteNative) -> None:
        self._native = native
        self.cache: Any = RemoteCache(native)

    @property
    def stats(self) -> PolicyStats:
        return self._native.stats()

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(self._native.resident_units())

    @property
    def used_bytes(self) -> int:
        return self._native.counters().committed_bytes

    def plan(self, step: Step) -> StepPlan | None:
        raise NotImplementedError("the boards schedule")

    def meanwhile(self, step: Step) -> Sequence[Prefetch]:
        raise NotImplementedError("the boards schedule")

    def select(self, selection: Selection) -> Sequence[int] | None:
        raise NotImplementedError("the boards schedule")

    def select_many(self, selections: Selections) -> IntArray | None:
        raise NotImplementedError("the boards schedule")

    def measure_prompts(self, measure: Callable[[], PromptSums] | None) -> None:
        """Each board goes by its own clock."""

    def reset(self, resident: Iterable[int]) -> None:
        """Each board has done so when it told what failed."""

    def new_conversation(self) -> None:
        self._native.new_conversation()
