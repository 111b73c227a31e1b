"""The door to llama.cpp: its log, and a `Llama` loaded with the parameters that moe-edge needs.

Unavoidable patches of llama-cpp-python, checked with 0.3.36, each in load_llama() and all under one lock: `Llama` has
no argument for `use_extra_bufts`, for the load mode, for the rows of logits, nor for a progress callback; it loses a
byte of a template of 1,024 bytes and reads templates nobody needs; its tokenize allocates by the trained context.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_edge.models.errors import EngineError, UnknownArchitecture, UnknownName
from moe_edge.runner.capi import library
from moe_edge.runner.llama_package import import_llama, llama_package
from moe_edge.runner.template import metadata_for_llama
from moe_edge.runner.tokens import with_own_tokenize
from moe_edge.schedulers.budget import MIB

LOAD_LOCK = threading.Lock()  # llama.cpp's defaults and the armed model are process-wide

_install_lock = threading.Lock()
_captures: dict[int, list[list[str]]] = {}  # thread -> where its lines go, the innermost capture last
_callback: Any = None  # of llama.cpp's log: made once, and never freed, since any thread may be in it
_theirs: Any = None  # where the log went before: what no thread of ours captures goes there
_current = 0  # the address of what llama.cpp calls since we last took its log


def _install() -> None:
    """Take llama.cpp's log, again when another part of the process has taken it since."""
    global _callback, _theirs, _current
    with _install_lock:
        import_llama()
        import llama_cpp

        found, found_address = _log_callback()
        if _callback is not None and found_address == _current:
            return
        _theirs = found
        if _callback is None:
            _callback = llama_cpp.llama_log_callback(_sort)
        ours = ctypes.cast(library().me_log, llama_cpp.llama_log_callback)
        llama_cpp.llama_log_set(ours, ctypes.cast(_callback, ctypes.c_void_p))
        _current = _log_callback()[1]


def _sort(level: int, text: bytes, _user: object) -> None:
    captures = _captures.get(threading.get_ident())
    if captures:
        captures[-1].append(text.decode(errors="replace"))
    else:
        _theirs(level, text)


def _log_callback() -> tuple[Callable[[int, bytes], None], int]:
    """What llama.cpp calls with each piece of its log, and its address."""
    import llama_cpp

    callback, user = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user))
    address = ctypes.cast(callback, ctypes.c_void_p).value or 0
    return lambda level, text: callback(level, text, user), address


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """llama.cpp's log of this thread, piece by piece, instead of stderr."""
    _install()
    lines: list[str] = []
    own = _captures.setdefault(threading.get_ident(), [])
    own.append(lines)
    try:
        yield lines
    finally:
        own.remove(lines)
        if not own:
            _captures.pop(threading.get_ident(), None)


def log_megabytes(log: str, what: str) -> int:
    """Sum of the sizes that llama.cpp logs for `what` ('KV', 'compute', 'output'), in bytes, rounded up.

    Raises EngineError when it names none: a plan without it would promise a budget that is not kept.
    """
    if what == "KV":
        # logged for a cache whether or not it is allocated: "llama_kv_cache: size = 8.00 MiB ( 2048 cells, ..."
        pattern = r"llama_(?:kv_cache\w*|memory_recurrent\w*): size =\s+([0-9.]+) MiB"
    else:
        pattern = rf"{what} buffer size =\s+([0-9.]+) MiB"
    found = re.findall(pattern, log)
    if not found:
        raise EngineError(
            f"llama.cpp did not say how much memory its {what} buffers take, so a budget cannot be kept; "
            "is its log taken by another program in this process?"
        )
    return sum(int((float(size) + 0.01) * MIB) for size in found)


def recurrent_bytes(log: str) -> int:
    """Bytes of one recurrent state, by llama.cpp's log of a load; 0 for a model without one."""
    found = re.findall(r"llama_memory_recurrent\w*: size =\s+([0-9.]+) MiB", log)
    return sum(int((float(size) + 0.01) * MIB) for size in found)


@dataclass(frozen=True)
class Placement:
    """Where llama.cpp puts layers, other than in this process: on `devices`, in this order, ggml's pointers.

    shares: of each device in the layers behind the first, as llama.cpp's tensor_split. n_layers: how many of the last
    layers, the output counted as one. on_cpu: (pattern of tensor names, buffer type) of what stays here nevertheless.
    """

    devices: tuple[int, ...]
    shares: tuple[float, ...]
    n_layers: int
    on_cpu: tuple[bytes, int]


class _Override(ctypes.Structure):  # llama_model_tensor_buft_override
    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def _place(params: Any, placement: Placement) -> list[Any]:
    """Write it into llama_model_params; what must live until the model is loaded."""
    devices = (ctypes.c_void_p * (len(placement.devices) + 1))(*placement.devices, None)
    overrides = (_Override * 2)(_Override(*placement.on_cpu), _Override(None, None))
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return [devices, overrides]


@contextlib.contextmanager
def _defaults(
    *, direct: bool, no_alloc: bool, repack: bool, n_outputs_max: int, metadata: Mapping[str, Any],
    go_on: Callable[[], bool], placement: Placement | None,
) -> Iterator[None]:  # fmt: skip
    """Inside: llama.cpp's default parameters, as `Llama` picks them up, are the ones moe-edge needs."""
    from llama_cpp import _internals
    from llama_cpp import llama_cpp as bindings  # the module whose names `Llama` looks up

    model_defaults, context_defaults = bindings.llama_model_default_params, bindings.llama_context_default_params
    make_model = _internals.LlamaModel
    kept: list[Any] = []
    progress = bindings.llama_progress_callback(lambda _done, _user: go_on())

    def model_params() -> Any:
        p = model_defaults()
        p.use_extra_bufts = repack
        p.no_alloc = no_alloc
        p.progress_callback = progress
        if placement is not None:
            kept.extend(_place(p, placement))
        return p

    def context_params() -> Any:
        p = context_defaults()
        p.n_outputs_max = n_outputs_max
        return p

    def load(*args: Any, **kwargs: Any) -> Any:  # Llama overwrites load_mode after it took the defaults
        if direct:
            kwargs["params"].load_mode = bindings.LLAMA_LOAD_MODE_DIRECT_IO
        model = with_own_tokenize(make_model(*args, **kwargs))
        model.metadata = functools.partial(metadata_for_llama, model.metadata, metadata)
        return model

    bindings.llama_model_default_params = model_params
    bindings.llama_context_default_params = context_params
    _internals.LlamaModel = load
    try:
        yield
    finally:
        bindings.llama_model_default_params = model_defaults
        bindings.llama_context_default_params = context_defaults
        _internals.LlamaModel = make_model


def load_llama(
    arguments: Mapping[str, Any],
    *,
    direct: bool,
    no_alloc: bool,
    repack: bool,
    n_outputs_max: int,
    metadata: Mapping[str, Any],
    go_on: Callable[[], bool],
    placement: Placement | None = None,
) -> Any:
    """A `Llama`. Call it with LOAD_LOCK held. Raises what `Llama` raises: ValueError, RuntimeError.

    direct: read the weights by direct I/O, so that they leave nothing in the page cache. no_alloc: allocate nothing,
    for its log says what it would. n_outputs_max: rows of logits in the compute buffer; 0: one for each token of a
    micro-batch, which is 297 MiB more at 151,936 tokens. metadata: the file's, by our own reader. go_on: asked while
    weights are read; False ends the load. placement: of layers on other boards. repack: llama.cpp's use_extra_bufts;
    runner/dense_repack.py says what that takes, and keeps AMX out, which crashes on some machines.
    """
    import llama_cpp

    with _defaults(
        direct=direct, no_alloc=no_alloc, repack=repack, n_outputs_max=n_outputs_max, metadata=metadata, go_on=go_on,
        placement=placement,
    ):  # fmt: skip
        return llama_cpp.Llama(**arguments)


def synchronize(llama: Any) -> None:
    """Wait for what a decode has begun on other devices."""
    import llama_cpp

    llama_cpp.llama_synchronize(llama._ctx.ctx)


def set_threads(llama: Any, n: int) -> None:
    """Compute with so many threads from the next graph on."""
    import llama_cpp

    llama_cpp.llama_set_n_threads(llama._ctx.ctx, n, n)


def rebuild_graphs(llama: Any) -> None:
    """Let llama.cpp build its graphs anew before the next decode, and ask again who computes what.

    It keeps a graph as long as the shapes are the same. Taking off a control vector, which is not there, changes
    nothing else (llama-context.cpp, set_adapter_cvec).
    """
    import llama_cpp

    llama_cpp.llama_set_adapter_cvec(llama._ctx.ctx, None, 0, 0, 0, 0)


def clear_memory(llama: Any) -> None:
    """Empty the KV cache."""
    llama.reset()
    llama._ctx.kv_cache_clear()


def cut_memory(llama: Any, n_tokens: int) -> bool:
    """Forget all but the first n_tokens of the KV cache; False, and nothing changed, where the model cannot.

    A recurrent state cannot go back. A sliding window can only while the cells before the cut are there: a state that
    came from a file has none that the window had left, and llama.cpp would compute on without them in silence.
    """
    if n_tokens < llama.n_tokens and not can_cut(sliding_window(llama), first_position(llama), n_tokens):
        return False
    if not llama._ctx.kv_cache_seq_rm(-1, n_tokens, -1):
        return False
    llama.n_tokens = n_tokens
    return True


def can_shift(llama: Any) -> bool:
    """Whether llama.cpp can give the cells of this model other positions."""
    import llama_cpp

    return bool(llama_cpp.llama_memory_can_shift(llama._ctx.memory))


def shift_memory(llama: Any, n_keep: int, n_forget: int) -> None:
    """Forget the n_forget tokens behind the first n_keep; those that follow move down. Raises EngineError."""
    import llama_cpp

    n, memory = llama.n_tokens, llama._ctx.memory
    if not llama_cpp.llama_memory_seq_rm(memory, 0, n_keep, n_keep + n_forget):
        raise EngineError(f"llama.cpp could not forget tokens {n_keep} to {n_keep + n_forget} of the context")
    llama_cpp.llama_memory_seq_add(memory, 0, n_keep + n_forget, n, -n_forget)
    llama.input_ids[n_keep : n - n_forget] = llama.input_ids[n_keep + n_forget : n].copy()
    llama.n_tokens = n - n_forget


def cannot_go_back(llama: Any) -> bool:
    """Whether the model keeps a recurrent state, which has no past: alone, or beside attention."""
    return bool(llama._is_recurrent or llama._is_hybrid)


def partial_state(llama: Any) -> Any:
    """A copy of what cannot go back: the recurrent state, without the cells of the attention, as uint8.

    Raises EngineError when llama.cpp does not give it.
    """
    import llama_cpp

    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    n = llama_cpp.llama_state_seq_get_size_ext(llama._ctx.ctx, 0, flags)
    copy = (ctypes.c_uint8 * n)()
    if n == 0 or llama_cpp.llama_state_seq_get_data_ext(llama._ctx.ctx, copy, n, 0, flags) != n:
        raise EngineError("llama.cpp did not give the recurrent state of the model")
    return copy


def set_partial_state(llama: Any, copy: Any, n_tokens: int) -> bool:
    """Go back to where partial_state() was taken, after n_tokens; the attention forgets what came later.

    False when llama.cpp refuses; then the KV cache is of no use and must be emptied.
    """
    import llama_cpp

    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    if llama_cpp.llama_state_seq_set_data_ext(llama._ctx.ctx, copy, len(copy), 0, flags) != len(copy):
        return False
    if not llama._ctx.kv_cache_seq_rm(-1, n_tokens, -1):
        return False
    llama.n_tokens = n_tokens
    llama._requires_eval = True
    return True


def sequence_bytes(llama: Any) -> int:
    """How large the state of the conversation is in a file, in bytes."""
    import llama_cpp

    return int(llama_cpp.llama_state_seq_get_size(llama._ctx.ctx, _written_as(llama)))


# Architectures with an index of their own beside the attention: llama-model.cpp, create_memory.
OTHER_MEMORIES = ("minimax-m3", "glm-dsa", "deepseek32", "glm5-next", "qwen4exp", "deepseek4", "dots3note", "hy_v4")
ALL = -1  # stands for every sequence, of which we have one
COPY_FRONT = 8  # bytes: a magic number and the sequence, in front of a copy's state and not of a file's


def copy_sequence(llama: Any) -> memoryview:
    """COPY_FRONT bytes, and the state of the conversation as save_sequence() writes it behind the tokens.

    The memory is given back to the system with the copy. Raises EngineError when llama.cpp does not give it.
    """
    import llama_cpp

    n = sequence_bytes(llama)
    memory = mmap.mmap(-1, max(1, n))
    into = (ctypes.c_uint8 * n).from_buffer(memory)
    if llama_cpp.llama_state_seq_get_data(llama._ctx.ctx, into, n, _written_as(llama)) != n:
        raise EngineError("llama.cpp did not give the state of the conversation")
    return memoryview(into)


def set_sequence(llama: Any, copy: memoryview, tokens: Any) -> bool:
    """Take a conversation from copy_sequence() in place of the present one; as load_sequence(). tokens: its own."""
    import llama_cpp

    clear_memory(llama)
    n = len(copy)
    if llama_cpp.llama_state_seq_set_data(llama._ctx.ctx, (ctypes.c_uint8 * n).from_buffer(copy), n, 0) != n:
        clear_memory(llama)
        return False
    llama.n_tokens = len(tokens)
    llama.input_ids[: len(tokens)] = tokens
    llama._requires_eval = True
    return True


def sequence_head(tokens: Any) -> bytes:
    """What stands before a state in llama.cpp's file of a sequence. tokens: int32."""
    import llama_cpp

    front = struct.pack("<III", llama_cpp.LLAMA_STATE_SEQ_MAGIC, llama_cpp.LLAMA_STATE_SEQ_VERSION, len(tokens))
    return front + bytes(tokens.tobytes())


def partial_bytes(llama: Any) -> int | None:
    """How many bytes at the end of a state are not of the attention that looks back all the way: those of a recurrent
    state, or of a sliding window; 0 without one. None for memories of other kinds, whose order is not known here."""
    import llama_cpp

    if llama.metadata.get("general.architecture") in OTHER_MEMORIES:
        return None
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    n = llama_cpp.llama_state_seq_get_size_ext(llama._ctx.ctx, _written_as(llama), flags)
    return 0 if n >= sequence_bytes(llama) else max(0, int(n) - COPY_FRONT)


def save_sequence(llama: Any, path: str | os.PathLike[str]) -> int:
    """Write tokens and state of the conversation to a file, as llama.cpp does it; its size, 0 when that failed.

    llama.cpp writes one layer's keys or values at a time, so there is no second copy of the whole in memory.
    """
    import llama_cpp

    n = llama.n_tokens
    tokens = (llama_cpp.llama_token * n)(*llama.input_ids[:n].tolist())
    return int(llama_cpp.llama_state_seq_save_file(llama._ctx.ctx, os.fsencode(path), _written_as(llama), tokens, n))


def load_sequence(llama: Any, path: str | os.PathLike[str]) -> bool:
    """Take the conversation of such a file in place of the present one; False, with an empty KV cache, if refused.

    The file's bytes must have been checked before: llama.cpp ends the process on some damage. There are no logits
    afterwards, so the next prompt must be longer, or be cut.
    """
    import llama_cpp

    clear_memory(llama)
    room = llama.n_ctx()
    tokens, count = (llama_cpp.llama_token * room)(), ctypes.c_size_t()
    done = llama_cpp.llama_state_seq_load_file(
        llama._ctx.ctx, os.fsencode(path), 0, tokens, room, ctypes.byref(count)
    )
    if not done:
        clear_memory(llama)
        return False
    llama.n_tokens = count.value
    llama.input_ids[: llama.n_tokens] = tokens[: llama.n_tokens]
    llama._requires_eval = True
    return True


def first_position(llama: Any) -> int:
    """The first position of the conversation that the KV cache still has, in every layer. -1: it is empty."""
    import llama_cpp

    return int(llama_cpp.llama_memory_seq_pos_min(llama._ctx.memory, 0))


def state_from_bytes(data: bytes) -> Any:
    """What partial_state() gave, from a file."""
    return (ctypes.c_uint8 * len(data)).from_buffer_copy(data)


def sliding_window(llama: Any) -> int:
    """Tokens that the layers with a sliding window look back; 0 for a model without such layers."""
    import llama_cpp

    return int(llama_cpp.llama_model_n_swa(llama._model.model))


def window_is_kept(llama: Any) -> bool:
    """Whether the states of a model with a sliding window have every cell, so that they can be cut as memory can.

    Asked for sequence 0, llama.cpp leaves out the cells that the window has left. What remains lands in other cells,
    whose sums round differently, and cannot be cut. Asked for all sequences it leaves out none, and the form is the one
    that it reads as sequence 0 (llama-kv-cache.cpp, state_write and state_read_meta). Recurrent states have another
    form then, and the memories with an index were not tried. A dry load is enough.
    """
    other = llama.metadata.get("general.architecture") in OTHER_MEMORIES
    return sliding_window(llama) > 0 and not cannot_go_back(llama) and not other


def _written_as(llama: Any) -> int:
    """The number of the sequence that llama.cpp is asked to write."""
    return ALL if window_is_kept(llama) else 0


def can_cut(window: int, first: int, n_tokens: int) -> bool:
    """Whether a KV cache whose cells begin at position `first` can be cut to n_tokens and gone on with."""
    return window == 0 or first <= max(0, n_tokens - window)


def knows_architecture(name: str) -> bool:
    """Whether this llama.cpp has an architecture of this name. It is asked, with a file that has nothing else in it."""
    import llama_cpp

    data = name.encode(errors="surrogateescape")
    key = b"general.architecture"
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IQ", 8, len(data)) + data
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file, captured_log() as log:
        file.write(header.ljust(-(-len(header) // 32) * 32, b"\0"))
        file.flush()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(os.fsencode(file.name), params)
        if model:
            llama_cpp.llama_model_free(model)
            return True
    return "unknown model architecture" not in "".join(log)


def explained(error: UnknownArchitecture) -> UnknownName:
    """The error with what llama.cpp knows of the architecture, and what to do."""
    if "did you mean" in str(error):
        return UnknownName(str(error))
    try:
        known = knows_architecture(error.architecture)
    except OSError:  # no room for a file of a hundred bytes
        return UnknownName(str(error))
    if known:
        return UnknownName(
            f"{error}: llama.cpp has it, but moe-edge has not been tried with it; run the model with llama.cpp itself, "
            "and please report where it can be had"
        )
    return UnknownName(
        f"{error}: {' '.join(llama_package())} does not have it either; "
        "the model needs a newer moe-edge, or its header is damaged"
    )
