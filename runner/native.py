"""The native library by ctypes: the structs of native/capi.h and one class that owns a native model.

Loads the library only after llama_cpp, so that it binds to the ggml libraries that are already in the process, and
refuses a llama-cpp-python whose backend API or ggml_tensor is not the one it was built for.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from moe_edge.models.errors import EngineError, MissingFile, WrongLibrary
from moe_edge.models.formats.floats import FloatArray
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.store.store import ExpertModel
from moe_edge.runner.turns import CLOSED
from moe_edge.schedulers.layout import Ahead, Prefetch, Routing, Step, StepPlan

WORKING_VERSION = "llama-cpp-python 0.3.36"
ERROR_BYTES = 1024
PROJECTION_CODES = {"up": 0, "gate": 1, "down": 2, "gate_up": 3}
MAX_AHEAD = 8
MEANWHILE = -1  # in place of a number of experts: see native/capi.h
SCHEDULE_OK, SCHEDULE_STOP, SCHEDULE_ERROR, SCHEDULE_RESIDENT = 0, 1, 2, 3


class PieceDesc(Structure):
    _fields_ = [
        ("file", c_int32),
        ("type", c_int32),
        ("projection", c_int32),
        ("reserved", c_int32),
        ("offset", c_int64),
        ("nbytes", c_int64),
        ("cols", c_int64),
        ("rows", c_int64),
    ]


class LayerDesc(Structure):
    _fields_ = [
        ("layer", c_int32),
        ("n_expert", c_int32),
        ("n_embd", c_int32),
        ("n_ff", c_int32),
        ("fused", c_int32),
        ("gated", c_int32),
        ("bias_up", POINTER(c_float)),
        ("bias_gate", POINTER(c_float)),
    ]


class Mailbox(Structure):
    _fields_ = [
        (name, POINTER(kind)) for name, kind in (
            ("experts", c_int32), ("counts", c_int32), ("weights", c_float), ("squares", c_float), ("order", c_int32),
            ("level", c_int32), ("victim_count", c_int32), ("victims", c_int32), ("later", c_int32),
            ("prefetch_count", c_int32), ("prefetch_units", c_int32), ("prefetch_victim_count", c_int32),
            ("prefetch_victims", c_int32), ("ahead_counts", c_int32), ("ahead_experts", c_int32),
            ("ahead_scores", c_float),
        )
    ]  # fmt: skip


class StepView(Structure):
    _fields_ = [
        ("experts", POINTER(c_int32)),
        ("weights", POINTER(c_float)),
        ("attention", POINTER(c_float)),
        ("input", POINTER(c_float)),
        ("n_tokens", c_int32),
        ("n_used", c_int32),
        ("n_embd", c_int32),
        ("weights_known", c_int32),
    ]


SCHEDULE_FN = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32, c_int32, c_int32)


class ModelDesc(Structure):
    _fields_ = [
        ("paths", POINTER(c_char_p)),
        ("layers", POINTER(LayerDesc)),
        ("pieces", POINTER(PieceDesc)),
        ("n_pieces", c_int64),
        ("n_paths", c_int32),
        ("n_layers", c_int32),
        ("n_levels", c_int32),
        ("n_io_threads", c_int32),
        ("direct_io", c_int32),
        ("reserved", c_int32),
        ("schedule", SCHEDULE_FN),
        ("announce", SCHEDULE_FN),
        ("schedule_user", c_void_p),
        ("mail", Mailbox),
    ]


_COUNTERS = (
    "steps tokens uses hits low_uses skipped_uses loads evictions reads bytes_read graphs stall_ns compute_ns "
    "schedule_ns step_ns read_busy_ns committed_bytes peak_committed_bytes direct_files prefetched prefetch_useful "
    "prefetch_late prefetch_wasted prefetch_cancelled prefetch_failed prefetch_bytes wasted_bytes disk_busy_ns "
    "prefetch_busy_ns look_ahead_ns meanwhile_ns preloaded"
).split()


class CountersStruct(Structure):
    _fields_ = [(name, c_int64) for name in _COUNTERS]


class AbiInfo(Structure):
    _fields_ = [("backend_api", c_int32), ("tensor_overhead", c_int32), ("ggml_version", c_char_p)]


@dataclass(frozen=True)
class Counters:
    """Counts since the model was opened; times in seconds. See native/capi.h for what a step, use and hit are.

    loads: read by the step that needed them, so hits + loads = uses; prefetched: read ahead, hits when they are used.
    preloaded: read before the first step.
    """

    steps: int = 0
    tokens: int = 0
    uses: int = 0
    hits: int = 0
    low_uses: int = 0
    skipped_uses: int = 0
    loads: int = 0
    evictions: int = 0
    reads: int = 0
    bytes_read: int = 0
    graphs: int = 0
    stall_seconds: float = 0.0
    compute_seconds: float = 0.0
    schedule_seconds: float = 0.0
    step_seconds: float = 0.0
    read_busy_seconds: float = 0.0
    committed_bytes: int = 0
    peak_committed_bytes: int = 0
    direct_files: int = 0
    prefetched: int = 0
    prefetch_useful: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_cancelled: int = 0
    prefetch_failed: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0
    disk_busy_seconds: float = 0.0
    prefetch_busy_seconds: float = 0.0
    look_ahead_seconds: float = 0.0
    meanwhile_seconds: float = 0.0
    preloaded: int = 0

    def since(self, earlier: Counters) -> Counters:
        """The difference; the committed bytes and the number of direct files stay absolute."""
        values = {k: getattr(self, k) - getattr(earlier, k) for k in self.__dataclass_fields__}
        for k in ("committed_bytes", "peak_committed_bytes", "direct_files"):
            values[k] = getattr(self, k)
        return Counters(**values)


def _loaded_ggml_version() -> str:
    import llama_cpp  # noqa: F401  (loads the libraries that the next line finds by name)

    name = "libggml-base.so.0" if sys.platform != "darwin" else "libggml-base.0.dylib"
    lib = ctypes.CDLL(name if sys.platform != "darwin" else str(_llama_lib_dir() / name))
    lib.ggml_version.restype = c_char_p
    return bytes(lib.ggml_version()).decode()


def _llama_lib_dir() -> Path:
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib"


def check_abi(backend_api: int, built_overhead: int, loaded_overhead: int, built: str, loaded: str) -> None:
    """Refuse a ggml other than the one the library was built for. Raises WrongLibrary."""
    same_series = built.rsplit(".", 1)[0] == loaded.rsplit(".", 1)[0]
    if same_series and built_overhead == loaded_overhead:
        return
    raise WrongLibrary(
        f"moe-edge was built for ggml {built} (backend API {backend_api}, {built_overhead} bytes a tensor) but ggml "
        f"{loaded} is installed ({loaded_overhead} bytes a tensor); pip install '{WORKING_VERSION.replace(' ', '==')}'"
    )


@lru_cache(maxsize=1)
def library() -> Any:
    """The loaded, checked and registered native library. Raises WrongLibrary or MissingFile."""
    loaded = _loaded_ggml_version()
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = _library_path(f"libmoe_edge{suffix}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise WrongLibrary(
            f"{path}: cannot be loaded beside the installed llama-cpp-python ({e}); it works with {WORKING_VERSION}"
        ) from e
    _declare(lib)
    abi = AbiInfo()
    lib.me_abi(ctypes.byref(abi))
    check_abi(
        abi.backend_api, abi.tensor_overhead, lib.me_loaded_tensor_overhead(), abi.ggml_version.decode(), loaded
    )
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if lib.me_register(error) != 0:
        raise WrongLibrary(error.value.decode(errors="surrogateescape"))
    return lib


LIBRARY = "MOE_EDGE_NATIVE_LIBRARY"  # in the environment: another build of the library, as with sanitizers


def _library_path(name: str) -> Path:
    import moe_edge.runner

    if other := os.environ.get(LIBRARY):
        return Path(other)
    for folder in moe_edge.runner.__path__:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise MissingFile(f"{name} is not installed with moe_edge; install the package: pip install .")


def _declare(lib: Any) -> None:
    model, text = c_void_p, c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "me_abi": (None, [POINTER(AbiInfo)]),
        "me_loaded_tensor_overhead": (c_int32, []),
        "me_register": (c_int32, [text]),
        "me_threadpool_new": (c_void_p, [c_int32]),
        "me_threadpool_free": (None, [c_void_p]),
        "me_model_open": (model, [POINTER(ModelDesc), text]),
        "me_model_set_arena": (c_int32, [model, c_int64, text]),
        "me_model_preload": (c_int32, [model, POINTER(c_int32), c_int32, text]),
        "me_model_close": (None, [model]),
        "me_model_arm": (c_int32, [model, text]),
        "me_model_disarm": (None, [model]),
        "me_model_unbind": (None, [model]),
        "me_model_bound_tensors": (c_int32, [model]),
        "me_model_counters": (None, [model, POINTER(CountersStruct)]),
        "me_model_take_error": (c_int32, [model, text]),
        "me_model_resident": (None, [model, POINTER(c_uint8)]),
        "me_model_unit_bytes": (None, [model, POINTER(c_int64)]),
        "me_model_pace": (None, [model, c_int64]),
        "me_model_set_stop": (None, [model, c_int32]),
        "me_model_step": (c_int32, [model, POINTER(StepView)]),
        "me_model_set_lookahead": (c_int32, [model, c_int32, c_int32, c_int32, text]),
        "me_model_ahead": (c_int32, [model, c_int32]),
        "me_model_known_routers": (c_int32, [model]),
        "me_model_early_routers": (c_int32, [model]),
        "me_model_watch_attention": (None, [model]),
        "me_model_set_renormalise": (None, [model, c_int32]),
        "me_model_set_noise": (c_double, [model, c_int32, c_float, c_uint64]),
        "me_model_scratch_bytes": (c_int64, [model, c_int64, c_int32, c_int32]),
    }
    for name, (restype, argtypes) in signatures.items():
        f = getattr(lib, name)
        f.restype, f.argtypes = restype, argtypes


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
        self.ahead_counts = (c_int32 * MAX_AHEAD)()
        self.ahead_experts = (c_int32 * (MAX_AHEAD * max_experts))()
        self.ahead_scores = (c_float * (MAX_AHEAD * max_experts))()

    def struct(self) -> Mailbox:
        fields: Any = Mailbox._fields_
        return Mailbox(**{name: ctypes.cast(getattr(self, name), kind) for name, kind in fields})


Schedule = Callable[[Step], StepPlan | None]
FetchAhead = Callable[[Step], Sequence[Prefetch]]


class NativeModel:
    """Owns one native model: its unit table, arena, readers and counters.

    `schedule`, a policy's plan(), is called on the thread that decodes; `meanwhile`, its meanwhile(), after those steps
    that set `later`. What they raise is kept in `schedule_error` and fails the decode. wants_routing: give steps of
    several tokens their Routing. observe: called with each step's input and routing before it is scheduled; for
    calibration and traces. announce: a policy's plan_ahead(), called between two steps with the next one, while
    look-ahead is on, where the model routes before attention. each_step: called as a step begins, before it is
    scheduled; must be cheap.
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
        self._present = Step(0, (), ())
        self._few = CountersStruct()
        self.wants_routing = False
        self._ahead_width = 0
        self.observe: Callable[[int, Routing, FloatArray], None] | None = None
        self.each_step: Callable[[], None] | None = None
        self.stop_requested = False
        self._callbacks = SCHEDULE_FN(self._on_step), SCHEDULE_FN(self._on_announce)
        desc, keep = _describe(model)
        desc.n_io_threads, desc.direct_io = n_io_threads, int(direct_io)
        desc.schedule, desc.announce = self._callbacks
        desc.schedule_user, desc.mail = None, self.mail.struct()
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
            return SCHEDULE_OK
        except BaseException as e:
            self.schedule_error = e
            return SCHEDULE_ERROR

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

    def set_renormalise(self, on: bool) -> None:
        """After a skip, scale the token's other gate weights up to the old sum."""
        self._lib.me_model_set_renormalise(self._open_handle(), int(on))

    def set_noise(self, layer: int, relative: float, seed: int) -> float:
        """Disturb the MoE output of one layer (position; -1: none), relative to its size, see native/capi.h.

        Returns the squared noise added since the last call.
        """
        return float(self._lib.me_model_set_noise(self._open_handle(), layer, relative, seed))

    def set_arena(self, arena_bytes: int) -> None:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if self._lib.me_model_set_arena(self._open_handle(), arena_bytes, error) != 0:
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
        c = CountersStruct()
        with self._use:
            self._lib.me_model_counters(self._open_handle(), ctypes.byref(c))
        values = {n: getattr(c, n) for n in _COUNTERS}
        seconds = {n[:-3] + "_seconds": values.pop(n) * 1e-9 for n in list(values) if n.endswith("_ns")}
        return Counters(**values, **seconds)

    def some_counters(self, *names: str) -> list[int]:
        """Some counters as the library has them, nanoseconds or bytes: for those who ask once a token."""
        self._lib.me_model_counters(self._open_handle(), ctypes.byref(self._few))
        return [getattr(self._few, name) for name in names]

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
                pieces[at] = PieceDesc(p.file, p.type, code, 0, p.offset, p.nbytes, p.cols, p.rows)
                at += 1
    desc = ModelDesc(paths, layers, pieces, len(pieces), len(model.files), len(model.layers), len(model.levels))
    keep += [paths, layers, pieces]
    return desc, keep


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
