"""One native model: its unit table, its arena, and the answers of the policy, through the C interface of capi.py."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint8, c_void_p
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from moe_edge.models.errors import BadFile, EngineError, MissingFile
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.ggml_types import type_name
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.store.experts import RAW, Piece
from moe_edge.models.store.planes import CODEC_NAMES, PLANES, can_pack
from moe_edge.models.store.store import ExpertModel
from moe_edge.runner import memory
from moe_edge.runner.capi import (
    ERROR_BYTES,
    MAX_AHEAD,
    MEANWHILE,
    PROJECTION_CODES,
    SCHEDULE_ERROR,
    SCHEDULE_FN,
    SCHEDULE_OK,
    SCHEDULE_RESIDENT,
    SCHEDULE_STOP,
    Counters,
    CountersArray,
    LayerDesc,
    Mailbox,
    ModelDesc,
    PieceDesc,
    SelectionView,
    StepView,
    counter_index,
    counters_of,
    library,
)
from moe_edge.runner.repacking import repacking
from moe_edge.runner.turns import CLOSED
from moe_edge.runner.zstd import zstd_functions
from moe_edge.schedulers.layout import Ahead, Prefetch, Routing, Selection, Selections, Step, StepPlan
from moe_edge.schedulers.packed import BOTH, N_PARTS, PackedSizes


class ThreadPool:
    """One pool of threads for llama.cpp and the engine, where ggml has no OpenMP (macOS); see native/capi.h.

    Make it before the first decode, close it after the context. Engines with as many threads share one: they decode in
    turns, and a lane of the engine may have been given any of them.
    """

    _open: ClassVar[dict[int, tuple[int, int]]] = {}  # threads -> (pool, users)

    def __init__(self, context: Any, n_threads: int) -> None:
        from llama_cpp import llama_cpp as bindings

        self._lib = library()
        self._n_threads: int | None = n_threads
        pool, users = self._open.get(n_threads) or (self._lib.me_threadpool_new(n_threads), 0)
        self._open[n_threads] = pool, users + 1
        attach = bindings._lib.llama_attach_threadpool
        attach.restype, attach.argtypes = None, [c_void_p, c_void_p, c_void_p]
        attach(context, pool, pool)

    @staticmethod
    def is_needed() -> bool:
        """Whether this llama.cpp was built without OpenMP."""
        from llama_cpp import llama_cpp as bindings

        return b"OPENMP = 1" not in bindings.llama_print_system_info()

    def close(self) -> None:
        if self._n_threads is None:
            return
        pool, users = self._open.pop(self._n_threads)
        if users > 1:
            self._open[self._n_threads] = pool, users - 1
        else:
            self._lib.me_threadpool_free(pool)
        self._n_threads = None


class Mail:
    """The buffers both sides use for one step. Slicing a ctypes array gives a list, which is what policies take."""

    def __init__(self, max_experts: int, n_units: int) -> None:
        self.experts = (c_int32 * max_experts)()
        self.counts = (c_int32 * max_experts)()
        self.weights = (c_float * max_experts)()
        self.squares = (c_float * max_experts)()
        self.order = (c_int32 * max_experts)()
        self.level = (c_int32 * max_experts)()
        self.victim_count = (c_int32 * max_experts)()
        self.victims = (c_int32 * max(n_units, 1))()
        self.later = (c_int32 * 1)()
        self.prefetch_count = (c_int32 * 1)()
        self.prefetch_units = (c_int32 * max(n_units, 1))()
        self.prefetch_victim_count = (c_int32 * max(n_units, 1))()
        self.prefetch_victims = (c_int32 * max(n_units, 1))()
        self.part_count = (c_int32 * 1)()
        self.part_units = (c_int32 * max(n_units, 1))()
        self.part_masks = (c_int32 * max(n_units, 1))()
        self.ahead_counts = (c_int32 * MAX_AHEAD)()
        self.ahead_experts = (c_int32 * (MAX_AHEAD * max_experts))()
        self.ahead_scores = (c_float * (MAX_AHEAD * max_experts))()
        self.select_order = (c_int32 * max_experts)()
        self.select_scores = (c_float * max_experts)()
        self.select_gates = (c_float * max_experts)()
        self.selected = (c_int32 * max_experts)()

    def struct(self) -> Mailbox:
        fields: Any = Mailbox._fields_
        return Mailbox(**{name: ctypes.cast(getattr(self, name), kind) for name, kind in fields})


Schedule = Callable[[Step], StepPlan | None]
FetchAhead = Callable[[Step], Sequence[Prefetch]]
IntArray = npt.NDArray[np.int32]
PartChanges = Callable[[], Mapping[int, int]]


class NativeModel:
    """Owns one native model: its unit table, arena, readers and counters.

    `schedule`, a policy's plan(), is called on the thread that decodes; `meanwhile`, its meanwhile(), after those steps
    that set `later`. What they raise is kept in `schedule_error` and fails the decode. wants_routing: give steps of
    several tokens their Routing. observe: called with each step's input and routing before it is scheduled; for
    calibration and traces. announce: a policy's plan_ahead(), called between two steps with the next one, while
    look-ahead is on, where the model routes before attention. select, select_many: a policy's own, while selecting is
    on (set_selecting). each_step: called as a step begins, before it is scheduled; must be cheap. part_changes: what
    the packed cache is to hold otherwise since it was last asked; asked with every answer of the policy.
    """

    def __init__(self, model: ExpertModel, *, n_io_threads: int = 4, direct_io: bool = True) -> None:
        self._lib = library()
        self._handle: int | None = None
        self._use = threading.RLock()  # held by what other threads may ask while the model is closed
        self.n_units = sum(layer.n_expert for layer in model.layers) * len(model.levels)
        self.mail = Mail(max(layer.n_expert for layer in model.layers), self.n_units)
        self.schedule_error: BaseException | None = None
        self.schedule: Schedule | None = None
        self.meanwhile: FetchAhead | None = None
        self.announce: FetchAhead | None = None
        self.select: Callable[[Selection], Sequence[int] | None] | None = None
        self.select_many: Callable[[Selections], IntArray | None] | None = None
        self._n_experts = tuple(layer.n_expert for layer in model.layers)
        self.part_changes: PartChanges | None = None
        self._present = Step(0, (), ())
        self._few, self._counter = CountersArray(), counter_index()
        self.wants_routing = False
        self._ahead_width = 0
        self.observe: Callable[[int, Routing, FloatArray], None] | None = None
        self.each_step: Callable[[], None] | None = None
        self.stop_requested = False
        self._callbacks = SCHEDULE_FN(self._on_step), SCHEDULE_FN(self._on_announce), SCHEDULE_FN(self._on_select)
        desc, keep = _describe(model)
        desc.n_io_threads, desc.direct_io, desc.page_bytes = n_io_threads, int(direct_io), memory.page_bytes()
        desc.schedule, desc.announce, desc.select = self._callbacks
        desc.repacking, desc.schedule_user, desc.mail = repacking(), None, self.mail.struct()
        if any(piece.codec == PLANES for piece in model.pieces):
            self._lib.me_set_zstd(*zstd_functions())
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._handle = self._lib.me_model_open(ctypes.byref(desc), error)
        del keep
        if not self._handle:
            raise MissingFile(error.value.decode(errors="surrogateescape"))

    def _on_step(self, _user: object, layer: int, n_tokens: int, n: int) -> int:
        if self.stop_requested:
            return SCHEDULE_STOP
        mail = self.mail
        try:
            if n == MEANWHILE:
                if self.meanwhile is not None:
                    self._mail_prefetch(self.meanwhile(self._present))
                    self._mail_parts()
                return SCHEDULE_OK
            if self.each_step is not None:
                self.each_step()
            assert self.schedule is not None, "no policy yet"
            step = self._new_step(layer, n_tokens, n)
            if self._ahead_width:
                step.ask_ahead = self.ask_ahead
            if self.wants_routing and n_tokens > 1:
                step.routing = self._routing()[0]
            if self.observe is not None:
                self.observe(layer, *self._routing())
            plan = self.schedule(step)
            self._mail_parts()
            if step.later:
                self._present = step
                mail.later[0] = 1
            if plan is None:
                return SCHEDULE_RESIDENT
            at = 0
            for i, gone in enumerate(plan.victims):
                mail.victim_count[i] = len(gone)
                for unit in gone:
                    mail.victims[at] = unit
                    at += 1
            mail.order[:n] = list(plan.order)
            mail.level[:n] = list(plan.levels)
            return SCHEDULE_OK
        except BaseException as e:  # a callback cannot raise through C: kept, and raised after the decode
            self.schedule_error = e
            return SCHEDULE_ERROR

    def _on_announce(self, _user: object, layer: int, n_tokens: int, n: int) -> int:
        if self.stop_requested:
            return SCHEDULE_STOP
        try:
            if self.announce is not None:
                self._mail_prefetch(self.announce(self._new_step(layer, n_tokens, n)))
                self._mail_parts()
            return SCHEDULE_OK
        except BaseException as e:
            self.schedule_error = e
            return SCHEDULE_ERROR

    def _on_select(self, _user: object, layer: int, n_tokens: int, n_used: int) -> int:
        if self.stop_requested:
            return SCHEDULE_STOP
        try:
            assert self.select is not None and self.select_many is not None, "no policy that selects"
            if n_tokens > 1:
                return self._select_many(self.select_many, layer)
            mail, n = self.mail, self._n_experts[layer]
            chosen = self.select(
                Selection(layer, n_used, mail.select_order[:n], mail.select_scores[:n], mail.select_gates[:n])
            )
            if chosen is None:
                return SCHEDULE_RESIDENT
            mail.selected[:n_used] = list(chosen)
            return SCHEDULE_OK
        except BaseException as e:
            self.schedule_error = e
            return SCHEDULE_ERROR

    def _select_many(self, select: Callable[[Selections], IntArray | None], layer: int) -> int:
        v = SelectionView()
        self._lib.me_model_selection(self._open_handle(), ctypes.byref(v))
        array, shape = np.ctypeslib.as_array, (v.n_tokens, v.n_expert)
        gates = array(v.gates, shape) if v.gates else None
        chosen = select(Selections(layer, v.n_used, array(v.order, shape), array(v.scores, shape), gates))
        if chosen is None:
            return SCHEDULE_RESIDENT
        array(v.selected, (v.n_tokens, v.n_used))[:] = chosen
        return SCHEDULE_OK

    def _new_step(self, layer: int, n_tokens: int, n: int) -> Step:
        mail = self.mail
        return Step(layer, mail.experts[:n], mail.counts[:n], mail.weights[:n], mail.squares[:n], n_tokens)

    def _routing(self) -> tuple[Routing, FloatArray]:
        """The present step's routing and input [n_tokens, n_embd]: views, valid until the callback returns."""
        v = StepView()
        self._lib.me_model_step(self._open_handle(), ctypes.byref(v))
        array, shape = np.ctypeslib.as_array, (v.n_tokens, v.n_used)
        attention = array(v.attention, (v.n_tokens,)) if v.attention else None
        routing = Routing(array(v.experts, shape), array(v.weights, shape), attention)
        return routing, array(v.input, (v.n_tokens, v.n_embd))

    def _mail_prefetch(self, prefetch: Sequence[Prefetch]) -> None:
        mail, at = self.mail, 0
        mail.prefetch_count[0] = len(prefetch)
        for i, (unit, gone) in enumerate(prefetch):
            mail.prefetch_units[i] = unit
            mail.prefetch_victim_count[i] = len(gone)
            for victim in gone:
                mail.prefetch_victims[at] = victim
                at += 1

    def _mail_parts(self) -> None:
        if self.part_changes is None:
            return
        mail, changes = self.mail, self.part_changes()
        mail.part_count[0] = len(changes)
        for i, (unit, mask) in enumerate(changes.items()):
            mail.part_units[i], mail.part_masks[i] = unit, mask

    def ask_ahead(self, depth: int) -> list[Ahead]:
        """Within a step: what the routers of at most `depth` later layers predict, nearest first."""
        mail, width = self.mail, self._ahead_width
        out = []
        for d in range(self._lib.me_model_ahead(self._open_handle(), depth)):
            start = d * width
            end = start + mail.ahead_counts[d]
            if end > start:
                out.append(Ahead(d + 1, mail.ahead_experts[start:end], mail.ahead_scores[start:end]))
        return out

    def set_lookahead(self, depth: int, width: int, *, rescale: bool = True) -> None:
        """Let steps ask at most `depth` routers ahead for their best `width` experts; 0: off. Not within a step.

        rescale: correct the input for the difference of the layers' norm weights. Raises EngineError.
        """
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._lib.me_model_set_lookahead(self._open_handle(), depth, width, int(rescale), error) != 0:
            raise EngineError(error.value.decode(errors="surrogateescape"))
        self._ahead_width = width if depth else 0

    @property
    def known_routers(self) -> int:
        """MoE layers whose router llama.cpp has shown."""
        return int(self._lib.me_model_known_routers(self._open_handle()))

    @property
    def early_routers(self) -> int:
        """MoE layers that route before their attention, behind another MoE layer: those that are announced."""
        return int(self._lib.me_model_early_routers(self._open_handle()))

    def watch_attention(self) -> None:
        """Let a Routing carry the attention each token received, in micro-batches of 32 tokens and more.

        Graphs that llama.cpp has built before, and uses again, do not show it.
        """
        self._lib.me_model_watch_attention(self._open_handle())

    def _open_handle(self) -> int:
        """The native model. Raises EngineError after close()."""
        if self._handle is None:
            raise EngineError(CLOSED)
        return self._handle

    def set_selecting(self, on: bool) -> None:
        """Let select() choose the experts of each token, in graphs that llama.cpp builds from now on."""
        self._lib.me_model_set_selecting(self._open_handle(), int(on))

    def why_not_selecting(self) -> str | None:
        """Why llama.cpp's graphs, as they have been seen so far, do not let select() choose; None when they do."""
        error = ctypes.create_string_buffer(ERROR_BYTES)
        failed = self._lib.me_model_check_selecting(self._open_handle(), error)
        return error.value.decode(errors="replace") if failed else None

    def gating(self, layer: int) -> tuple[int, float]:
        """How llama.cpp makes a layer's gate weights of a Selection's gates: me_gates of capi.h, and a factor."""
        scale = c_float(1)
        return int(self._lib.me_model_gating(self._open_handle(), layer, ctypes.byref(scale))), scale.value

    def set_renormalise(self, on: bool) -> None:
        """After a skip, scale the token's other gate weights up to the old sum."""
        self._lib.me_model_set_renormalise(self._open_handle(), int(on))

    def set_noise(self, layer: int, relative: float, seed: int) -> float:
        """Disturb the MoE output of one layer (position; -1: none), relative to its size, see native/capi.h.

        Returns the squared noise added since the last call.
        """
        return float(self._lib.me_model_set_noise(self._open_handle(), layer, relative, seed))

    def set_arena(self, arena_bytes: int, packed_bytes: int = 0) -> None:
        """Reserve the expert arena, and beside it the packed cache. Raises EngineError."""
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._lib.me_model_set_arena(self._open_handle(), arena_bytes, packed_bytes, error) != 0:
            raise EngineError(error.value.decode(errors="surrogateescape"))

    def preload(self, units: Sequence[int]) -> None:
        """Read absent units in this order and wait for them; not within a step.

        Raises EngineError, naming file and tensor, when one cannot be read or does not fit; those that were read stay.
        """
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._lib.me_model_preload(self._open_handle(), (c_int32 * len(units))(*units), len(units), error) != 0:
            raise EngineError(error.value.decode(errors="replace"))

    def arm(self) -> None:
        """Bind the expert stubs that llama.cpp shows from now on to this model, until disarm()."""
        self._lib.me_model_arm(self._open_handle(), ctypes.create_string_buffer(ERROR_BYTES))

    def disarm(self) -> None:
        self._lib.me_model_disarm(self._open_handle())

    def unbind(self) -> None:
        self._lib.me_model_unbind(self._open_handle())

    @property
    def bound_tensors(self) -> int:
        return int(self._lib.me_model_bound_tensors(self._open_handle()))

    def counters(self) -> Counters:
        values = CountersArray()
        with self._use:
            self._lib.me_model_counters(self._open_handle(), values)
        return counters_of(values)

    def some_counters(self, *names: str) -> list[int]:
        """Some counters as the library has them, nanoseconds or bytes: for those who ask once a token."""
        self._lib.me_model_counters(self._open_handle(), self._few)
        return [self._few[self._counter[name]] for name in names]

    def take_error(self) -> str | None:
        """The sentence of the last failure, once; None when there was none."""
        error = ctypes.create_string_buffer(ERROR_BYTES)
        taken = self._lib.me_model_take_error(self._open_handle(), error)
        return error.value.decode(errors="replace") if taken else None

    def resident_units(self) -> list[int]:
        flags = (c_uint8 * self.n_units)()
        self._lib.me_model_resident(self._open_handle(), flags)
        return [i for i, f in enumerate(flags) if f]

    def unit_bytes(self) -> tuple[int, ...]:
        sizes = (c_int64 * self.n_units)()
        self._lib.me_model_unit_bytes(self._open_handle(), sizes)
        return tuple(sizes)

    def packed_sizes(self) -> PackedSizes:
        """What the units take packed; zeros for those that are not."""
        row = N_PARTS + BOTH
        sizes = (c_int64 * (row * self.n_units))()
        self._lib.me_model_part_bytes(self._open_handle(), sizes)
        rows = [sizes[at : at + row] for at in range(0, len(sizes), row)]
        return PackedSizes(tuple((r[0], r[1]) for r in rows), tuple((0, r[2], r[3], r[4]) for r in rows))

    def held_parts(self) -> dict[int, int]:
        """unit -> the mask of the parts of it that the packed cache holds, of those it holds any of."""
        masks = (c_uint8 * self.n_units)()
        self._lib.me_model_held_parts(self._open_handle(), masks)
        return {unit: mask for unit, mask in enumerate(masks) if mask}

    def drop_empty_parts(self) -> None:
        """Take back what the packed cache has given to parts that never came: a read ahead that was given up."""
        self._lib.me_model_drop_empty_parts(self._open_handle())

    def pace(self, bytes_per_second: int) -> None:
        """Let expert reads take as long as on a disk of this speed, which serves one after the other; 0: no limit."""
        self._lib.me_model_pace(self._open_handle(), bytes_per_second)

    def set_stop(self, stop: bool) -> None:
        """Ask a running decode to stop at the next expert; safe from a signal handler or another thread."""
        self.stop_requested = stop
        with self._use:
            self._lib.me_model_set_stop(self._open_handle(), int(stop))

    def scratch_bytes(self, n_ubatch: int, n_used: int, n_threads: int) -> int:
        return int(self._lib.me_model_scratch_bytes(self._open_handle(), n_ubatch, n_used, n_threads))

    def close(self) -> None:
        with self._use:
            handle, self._handle = self._handle, None
            if handle:
                self._lib.me_model_close(handle)


def _describe(model: ExpertModel) -> tuple[ModelDesc, list[Any]]:
    """The C description, and what must stay alive until the library has copied it."""
    keep: list[Any] = []
    paths = (c_char_p * len(model.files))(*(os.fsencode(f) for f in model.files))
    layers = (LayerDesc * len(model.layers))()
    pieces = (PieceDesc * len(model.pieces))()
    at = 0
    for i, layer in enumerate(model.layers):
        codes = [PROJECTION_CODES[p] for p in layer.projections]
        layers[i] = LayerDesc(
            layer.layer, layer.n_expert, layer.n_embd, layer.n_ff, int(layer.fused), int(layer.gated),
            _bias(model, layer.layer, "up", keep), _bias(model, layer.layer, "gate", keep),
        )  # fmt: skip
        for _ in range(layer.n_expert * len(model.levels)):
            for code in codes:
                p = model.pieces[at]
                _check_codec(model, p)
                pieces[at] = PieceDesc(
                    p.file, p.type, code, p.codec, p.offset, p.stored_bytes, p.nbytes, p.cols, p.rows
                )
                at += 1
    desc = ModelDesc(paths, layers, pieces, len(pieces), len(model.files), len(model.layers), len(model.levels))
    keep += [paths, layers, pieces]
    return desc, keep


def _check_codec(model: ExpertModel, piece: Piece) -> None:
    """Refuse what the native library would, with the name of the file."""
    where = f"{model.files[piece.file]}: tensor '{piece.name}' is stored"
    if piece.codec != RAW and piece.codec not in CODEC_NAMES:
        raise BadFile(f"{where} with codec {piece.codec}, which this moe-edge does not have; install a newer one")
    if piece.codec != RAW and not can_pack(piece.type, piece.codec):
        named = CODEC_NAMES[piece.codec]
        raise BadFile(f"{where} in {named}, which the type {type_name(piece.type)} does not have; convert again")
    if piece.codec == RAW and piece.stored_bytes != piece.nbytes:
        raise BadFile(f"{where} raw in {piece.stored_bytes} bytes, but its matrix takes {piece.nbytes}; convert again")


def _bias(model: ExpertModel, layer: int, projection: str, keep: list[Any]) -> Any:
    piece = model.biases.get((layer, projection))
    if piece is None:
        return POINTER(c_float)()
    path = model.files[piece.file]
    entry = TensorEntry(piece.name, (piece.cols, piece.rows), piece.type, path, piece.offset, piece.nbytes)
    with SourceFiles(model.stamps) as files:
        data = files.read(entry, 0, piece.nbytes)
    values = (c_float * (piece.nbytes // 4)).from_buffer_copy(data)
    keep.append(values)
    return ctypes.cast(values, POINTER(c_float))
