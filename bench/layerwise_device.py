"""A ggml device that can keep several micro-batches back and compute them layer by layer. For bench/layerwise.py.

It claims every node, so that each micro-batch's graph comes to it as one piece, and has ggml's CPU backend compute it.
Of several micro-batches it says at once that they are done, and keeps a copy of their graphs: the tensors' structs, and
what the inputs hold. llama.cpp then goes on to the next micro-batch, whose graph lies in the same memory. When the last
one comes, it puts the inputs of one after the other back and computes a layer of each before the next layer of any.
Between two layers of a micro-batch it keeps the tensors that later layers look at, little more than one vector for each
token. The last one has the logits, which llama.cpp takes as soon as that graph is done.

Only functions that ggml exports are used, and the structs of ggml 0.25.3 (native/ggml_abi.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from typing import Any

import llama_cpp

MAX_SRC, MUL_MAT_ID = 10, b"MUL_MAT_ID"
ACCEL, API_VERSION = 3, 2
N_OPS = 90  # fewer than ggml has
Pointer = int | None


class Tensor(Structure):
    """ggml_tensor."""

    data: Pointer
    view_src: Pointer
    buffer: Pointer
    name: bytes
    src: Any
    ne: Any
    nb: Any
    _fields_ = (
        ("type", c_int), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4), ("op", c_int),
        ("op_params", c_int32 * 16), ("flags", c_int32), ("src", c_void_p * MAX_SRC), ("view_src", c_void_p),
        ("view_offs", c_size_t), ("data", c_void_p), ("name", c_char * 64), ("extra", c_void_p),
        ("padding", c_char * 8),
    )  # fmt: skip


class Graph(Structure):
    """ggml_cgraph, as native/ggml_abi.h has it."""

    _fields_ = (
        ("size", c_int), ("n_nodes", c_int), ("n_leafs", c_int), ("nodes", c_void_p), ("grads", c_void_p),
        ("grad_accs", c_void_p), ("leafs", c_void_p), ("use_counts", c_void_p), ("hash_size", c_size_t),
        ("hash_used", c_void_p), ("hash_keys", c_void_p), ("order", c_int), ("uid", ctypes.c_uint64),
    )  # fmt: skip


class InitParams(Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Table(Structure):
    """A backend, a device or a registry: structs of functions by name, the optional ones null."""


def _table(name: str, before: Iterable[tuple[str, Any]], functions: str, after: Iterable[tuple[str, Any]]) -> Any:
    fields = (*before, *((each, c_void_p) for each in functions.split()), *after)
    return type(name, (Structure,), {"_fields_": fields})


Backend = _table(
    "Backend", [("guid", c_void_p)],
    "get_name free set_async get_async set_2d get_2d cpy_async synchronize plan_create plan_free plan_update "
    "plan_compute graph_compute event_record event_wait graph_optimize", [("device", c_void_p), ("context", c_void_p)],
)  # fmt: skip
Device = _table(
    "Device", [],
    "get_name get_description get_memory get_type get_props init_backend get_buffer_type get_host_buffer_type "
    "buffer_from_host_ptr supports_op supports_buft offload_op event_new event_free event_synchronize",
    [("reg", c_void_p), ("context", c_void_p)],
)  # fmt: skip
Registry = _table(
    "Registry", [("api_version", c_int)], "get_name get_device_count get_device get_proc_address",
    [("context", c_void_p)],
)  # fmt: skip
Props = _table(
    "Props", [("name", c_char_p), ("description", c_char_p), ("free", c_size_t), ("total", c_size_t), ("type", c_int)],
    "device_id", [("caps", c_bool * 5)],
)  # fmt: skip


def _ggml_functions() -> Any:
    """The process's ggml, with the signatures that are used here."""
    if not llama_cpp.__version__:  # which has loaded them: by their short names they are the same copies
        raise RuntimeError("llama_cpp is not there")
    base, cpu = ctypes.CDLL("libggml-base.so.0"), ctypes.CDLL("libggml-cpu.so.0")
    for library, names, result in (
        (base, "ggml_graph_node ggml_init ggml_new_graph_custom ggml_op_name ggml_backend_buffer_name", c_void_p),
        (base, "ggml_nbytes ggml_tensor_overhead ggml_graph_overhead_custom", c_size_t),
    ):
        for name in names.split():
            getattr(library, name).restype = result
    base.ggml_op_name.restype = c_char_p
    base.ggml_graph_view.restype = Graph
    cpu.ggml_backend_cpu_init.restype = cpu.ggml_backend_cpu_buffer_type.restype = c_void_p
    return base, cpu


@dataclass
class Slice:
    """Nodes begin to end of a graph. live: what is kept behind it for later slices, by address of the copy."""

    begin: int
    end: int
    live: list[int] = field(default_factory=list)


class Recorded:
    """One micro-batch: a copy of its graph, and of what its inputs hold."""

    def __init__(self, device: LayerDevice, graph: int) -> None:
        self._base, self._of_experts = device.base, device.of_experts
        n = self._base.ggml_graph_n_nodes(c_void_p(graph))
        theirs = [int(self._base.ggml_graph_node(c_void_p(graph), i)) for i in range(n)]
        self.buffers = {Tensor.from_address(at).buffer for at in theirs if not Tensor.from_address(at).view_src}
        self.copies: dict[int, Tensor] = {}  # by the address of llama.cpp's
        self.inputs: dict[int, bytes] = {}  # by the address of the copy
        for at in theirs:
            self._copy(at)
        self.nodes = [self.copies[at] for at in theirs]
        self._point()
        self.graph = self._graph(n)
        self.kept: dict[int, bytes] = {}
        self.slices = self._slices()

    def _copy(self, at: int) -> None:
        """A node, or a tensor that it looks at, if that lies in memory that the next micro-batch takes."""
        if at in self.copies:
            return
        own = Tensor.from_buffer_copy(Tensor.from_address(at))
        is_node = bool(own.view_src) or any(own.src)
        if not is_node and own.buffer not in self.buffers and not own.flags & 1:
            return  # a weight, or the KV cache's
        self.copies[at] = own
        for source in (*own.src, own.view_src):
            if source:
                self._copy(source)
        if not is_node and own.data:
            self.inputs[ctypes.addressof(own)] = ctypes.string_at(own.data, self.nbytes(own))

    def nbytes(self, tensor: Tensor) -> int:
        return int(self._base.ggml_nbytes(ctypes.byref(tensor)))

    def _point(self) -> None:
        """The copies look at each other."""
        moved = {at: ctypes.addressof(own) for at, own in self.copies.items()}
        for own in self.copies.values():
            for i, source in enumerate(own.src):
                own.src[i] = moved.get(source, source)
            own.view_src = moved.get(own.view_src or 0, own.view_src)
        self.by_address = {ctypes.addressof(own): own for own in self.copies.values()}

    def _graph(self, n: int) -> int:
        """A graph of the copies in the same order, built anew so that it counts uses: the CPU backend fuses by them."""
        size = 2 * n + 64
        nbytes = int(self._base.ggml_graph_overhead_custom(c_size_t(size), c_bool(False))) + (1 << 16)
        self._memory = ctypes.create_string_buffer(nbytes)
        context = self._base.ggml_init(InitParams(nbytes, ctypes.cast(self._memory, c_void_p), True))
        graph = self._base.ggml_new_graph_custom(c_void_p(context), c_size_t(size), c_bool(False))
        for own in self.nodes:
            self._base.ggml_build_forward_expand(c_void_p(graph), ctypes.byref(own))
        if self._base.ggml_graph_n_nodes(c_void_p(graph)) != n:
            raise RuntimeError("the copy of a graph has another number of nodes")
        self.nbytes_copied = nbytes + len(self.copies) * ctypes.sizeof(Tensor)
        return int(graph)

    def owner(self, at: int) -> int:
        return self.by_address[at].view_src or at if at in self.by_address else at

    def _slices(self) -> list[Slice]:
        """Each but the first begins with the first product of a layer's experts, and ends before that of the next."""
        begins, seen = [0], set()
        for i, own in enumerate(self.nodes):
            if own.op == self._of_experts and own.src[2] not in seen:
                begins.append(i)
                seen.add(own.src[2])
        ends = [*begins[1:], len(self.nodes)]
        first = {ctypes.addressof(own): i for i, own in enumerate(self.nodes)}
        last: dict[int, int] = {}
        for i, own in enumerate(self.nodes):
            for source in own.src:
                if source:
                    last[self.owner(source)] = i
        found = []
        for begin, end in zip(begins, ends, strict=True):
            live = [
                at for at, use in last.items() if use >= end and first.get(at, -1) < end and at in self.by_address
            ]  # computed before, or an input
            found.append(Slice(begin, end, live))
        return found

    def compute(self, number: int, device: LayerDevice) -> None:
        """One slice, of inputs and what was kept; then keep what later slices look at."""
        for at, data in (self.inputs if number == 0 else self.kept).items():
            ctypes.memmove(self.by_address[at].data or 0, data, len(data))
        part = self.slices[number]
        device.each(number, self)
        view = self._base.ggml_graph_view(c_void_p(self.graph), part.begin, part.end)
        device.compute(ctypes.addressof(view))
        self.kept = {
            at: self.inputs.get(at) or ctypes.string_at(self.by_address[at].data or 0, self.nbytes(self.by_address[at]))
            for at in part.live
        }

    def experts(self, number: int) -> set[int]:
        """Those that a layer's tokens use, before it is computed; none in the first slice."""
        own = self.nodes[self.slices[number].begin]
        if number == 0:
            return set()
        ids = self.by_address[own.src[2]]
        at, rows, used = ids.data or 0, ids.ne[1], ids.ne[0]
        read = (c_int32 * used).from_address
        return {each for row in range(rows) for each in read(at + row * ids.nb[1])}


class LayerDevice:
    """The device, registered with ggml for the life of the process: contexts made from now on have it."""

    def __init__(self, n_threads: int) -> None:
        self.base, self._cpu_library = _ggml_functions()
        self.to_come = 0  # micro-batches of a prompt, the last one with logits, that are computed together
        self.of_experts = next(op for op in range(N_OPS) if self.base.ggml_op_name(op) == MUL_MAT_ID)
        self.each: Callable[[int, Recorded], None] = lambda *_: None  # called before (slice, micro-batch)
        self.recorded: list[Recorded] = []
        self.failed: BaseException | None = None
        self.n_graphs = 0
        self._keep: list[Any] = []  # what C points at
        self._cpu = c_void_p(self._cpu_library.ggml_backend_cpu_init())
        self._cpu_library.ggml_backend_cpu_set_n_threads(self._cpu, n_threads)
        self._register()

    def compute(self, graph: int) -> None:
        status = self.base.ggml_backend_graph_compute(self._cpu, c_void_p(graph))
        if status != 0:
            raise RuntimeError(f"ggml's CPU backend failed with {status}")

    def _by_layers(self) -> None:
        """Compute what was kept back, layer by layer."""
        recorded, self.recorded = self.recorded, []
        if len({frozenset(one.buffers) for one in recorded}) > 1:
            raise RuntimeError("llama.cpp moved its compute buffer between micro-batches")
        for number in range(max((len(one.slices) for one in recorded), default=0)):
            for one in recorded:
                one.compute(number, self)

    def _graph_compute(self, _backend: Any, graph: int) -> int:
        try:
            self.n_graphs += 1
            if self.to_come == 0:
                self.compute(graph)
                return 0
            self.recorded.append(Recorded(self, graph))
            self.to_come -= 1
            if self.to_come == 0:
                self._by_layers()
        except BaseException as e:
            self.failed = e
            return -1
        return 0

    def _function(self, kind: Any, function: Callable[..., Any]) -> Any:
        made = kind(function)
        self._keep.append(made)
        return ctypes.cast(made, c_void_p).value

    def _register(self) -> None:
        name = self._function(CFUNCTYPE(c_char_p, c_void_p), lambda _: b"LAYERWISE")
        buffer_type = self._cpu_library.ggml_backend_cpu_buffer_type()
        backend, device, registry = Backend(), Device(), Registry()
        guid = ctypes.create_string_buffer(b"moe-edge-layers1", 16)
        self._keep += [backend, device, registry, guid]
        backend.guid = ctypes.addressof(guid)
        backend.get_name, backend.device = name, ctypes.addressof(device)
        backend.free = self._function(CFUNCTYPE(None, c_void_p), lambda _: None)
        backend.graph_compute = self._function(CFUNCTYPE(c_int, c_void_p, c_void_p), self._graph_compute)

        def memory(_: Any, free: Any, total: Any) -> None:
            free[0] = total[0] = 0

        def props(_: Any, out: Any) -> None:
            ctypes.memset(out, 0, ctypes.sizeof(Props))
            out[0].name = out[0].description = b"LAYERWISE"
            out[0].type = ACCEL

        p = c_void_p
        device.get_name = device.get_description = name
        device.get_memory = self._function(CFUNCTYPE(None, p, POINTER(c_size_t), POINTER(c_size_t)), memory)
        device.get_type = self._function(CFUNCTYPE(c_int, p), lambda _: ACCEL)
        device.get_props = self._function(CFUNCTYPE(None, p, POINTER(Props)), props)
        device.init_backend = self._function(CFUNCTYPE(p, p, p), lambda *_: ctypes.addressof(backend))
        device.get_buffer_type = self._function(CFUNCTYPE(p, p), lambda _: buffer_type)
        device.supports_op = self._function(CFUNCTYPE(c_bool, p, p), lambda *_: True)
        is_host = self.base.ggml_backend_buft_is_host
        is_host.argtypes, is_host.restype = [p], c_bool
        device.supports_buft = self._function(CFUNCTYPE(c_bool, p, p), lambda _, kind: is_host(kind))
        device.reg = ctypes.addressof(registry)
        registry.api_version = API_VERSION
        registry.get_name = name
        registry.get_device_count = self._function(CFUNCTYPE(c_size_t, p), lambda _: 1)
        registry.get_device = self._function(CFUNCTYPE(p, p, c_size_t), lambda *_: ctypes.addressof(device))
        registry.get_proc_address = self._function(CFUNCTYPE(p, p, c_char_p), lambda *_: None)
        ctypes.CDLL("libggml.so.0").ggml_backend_register(ctypes.byref(registry))
