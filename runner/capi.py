"""The C interface by ctypes: the structs of native/capi.h, and the library, loaded and checked.

The library is loaded only after llama_cpp, so that it binds to the ggml libraries that are already in the process. A
llama-cpp-python whose backend API or ggml_tensor is not the one it was built for is refused, and so is a library whose
structs or counters are not those of this file.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
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
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_edge.models.errors import MissingFile, WrongLibrary
from moe_edge.runner.llama_package import COMPILED, READY, WORKING, import_llama, llama_package

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
        ("codec", c_int32),
        ("offset", c_int64),
        ("stored_bytes", c_int64),
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
            ("prefetch_victims", c_int32), ("part_count", c_int32), ("part_units", c_int32), ("part_masks", c_int32),
            ("ahead_counts", c_int32), ("ahead_experts", c_int32), ("ahead_scores", c_float),
            ("select_order", c_int32), ("select_scores", c_float), ("select_gates", c_float), ("selected", c_int32),
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


class SelectionView(Structure):
    _fields_ = [
        ("scores", POINTER(c_float)),
        ("gates", POINTER(c_float)),
        ("order", POINTER(c_int32)),
        ("selected", POINTER(c_int32)),
        ("n_tokens", c_int32),
        ("n_expert", c_int32),
        ("n_used", c_int32),
        ("reserved", c_int32),
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
        ("page_bytes", c_int32),
        ("repacking", c_int32),
        ("schedule", SCHEDULE_FN),
        ("announce", SCHEDULE_FN),
        ("select", SCHEDULE_FN),
        ("schedule_user", c_void_p),
        ("mail", Mailbox),
    ]


class AbiInfo(Structure):
    _fields_ = [
        ("backend_api", c_int32),
        ("tensor_overhead", c_int32),
        ("ggml_version", c_char_p),
        ("counters", c_char_p),
        ("struct_names", c_char_p),
        ("struct_sizes", POINTER(c_int32)),
    ]


PACKED_BYTES = ("packed_bytes", "peak_packed_bytes")  # counters of what is, not of what was done


@dataclass(frozen=True)
class Counters:
    """Counts since the model was opened; times in seconds. See native/capi.h for what a step, use and hit are.

    loads: read by the step that needed them, so hits + loads = uses; prefetched: read ahead, hits when they are used.
    preloaded: read before the first step. substituted_uses: of all tokens, uses that went to another expert than the
    router's own choice. packed_hits, exponent_hits, mantissa_hits: of the loads, those of experts that the packed cache
    held whole, or that part of; unread_bytes: what they need not read.
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
    unpack_seconds: float = 0.0
    unpacked_bytes: int = 0
    lent_bytes: int = 0
    substituted_uses: int = 0
    packed_hits: int = 0
    exponent_hits: int = 0
    mantissa_hits: int = 0
    unread_bytes: int = 0
    packed_bytes: int = 0
    peak_packed_bytes: int = 0

    def since(self, earlier: Counters) -> Counters:
        """The difference; the committed bytes and the number of direct files stay absolute."""
        values = {k: getattr(self, k) - getattr(earlier, k) for k in self.__dataclass_fields__}
        for k in ("committed_bytes", "peak_committed_bytes", "direct_files", "lent_bytes", *PACKED_BYTES):
            values[k] = getattr(self, k)
        return Counters(**values)


def _in_c(name: str) -> str:
    """`stall_ns` for `stall_seconds`: what the library calls a counter."""
    return name.removesuffix("_seconds") + "_ns" if name.endswith("_seconds") else name


COUNTER_NAMES = tuple(_in_c(each.name) for each in fields(Counters))
CountersArray = c_int64 * len(COUNTER_NAMES)
STRUCTS: Mapping[str, Any] = {
    "me_piece_desc": PieceDesc, "me_layer_desc": LayerDesc, "me_mailbox": Mailbox, "me_model_desc": ModelDesc,
    "me_step_view": StepView, "me_selection_view": SelectionView, "me_counters": CountersArray, "me_abi_info": AbiInfo,
}  # fmt: skip


@lru_cache(maxsize=1)
def counter_index() -> Mapping[str, int]:
    """Where the loaded library has each counter: by name, since its order is its own."""
    abi = AbiInfo()
    library().me_abi(ctypes.byref(abi))
    return {name: i for i, name in enumerate(abi.counters.decode().split())}


def counters_of(values: Any) -> Counters:
    """A CountersArray, as the library filled it, by name and with times in seconds."""
    index = counter_index()
    read: dict[str, Any] = {}
    for name in Counters.__dataclass_fields__:
        value = values[index[_in_c(name)]]
        read[name] = value * 1e-9 if name.endswith("_seconds") else value
    return Counters(**read)


def loaded_ggml_version() -> str:
    """The version of the ggml that llama.cpp has loaded, like 0.9.4. Raises WrongLibrary when it cannot be loaded."""
    import_llama()  # loads the libraries that the next line finds by name
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
        f"{loaded} is installed ({loaded_overhead} bytes a tensor); pip install '{COMPILED}=={WORKING[COMPILED]}' or "
        f"'{READY}=={WORKING[READY]}', whichever is there"
    )


def check_structs(sizes: Mapping[str, int], counters: Sequence[str]) -> None:
    """Refuse a library whose structs or counters are others than this module's. Raises WrongLibrary naming them.

    sizes: name of a struct in native/capi.h -> its bytes, as the library was compiled. counters: their names, in order.
    """
    ours = {name: ctypes.sizeof(kind) for name, kind in STRUCTS.items()}
    other = [name for name in ours if sizes.get(name) != ours[name]]
    wrong = [f"{name} of {sizes.get(name, 0)} bytes, expected {ours[name]}" for name in other]
    wrong += [f"counter {name} is missing" for name in COUNTER_NAMES if name not in counters]
    wrong += [f"counter {name} is not known" for name in counters if name not in COUNTER_NAMES]
    if wrong:
        raise WrongLibrary(
            f"the native library is of another version of moe-edge than its Python code ({'; '.join(wrong[:3])}); "
            "install both again: pip install --force-reinstall --no-deps moe-edge"
        )


def _named_sizes(abi: AbiInfo) -> dict[str, int]:
    names = abi.struct_names.decode().split()
    return {name: abi.struct_sizes[i] for i, name in enumerate(names)}


@lru_cache(maxsize=1)
def library() -> Any:
    """The loaded, checked and registered native library. Raises WrongLibrary or MissingFile."""
    loaded = loaded_ggml_version()
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    path = _library_path(f"libmoe_edge{suffix}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise WrongLibrary(
            f"{path}: cannot be loaded beside {' '.join(llama_package())} ({e}); it works with {COMPILED} "
            f"{WORKING[COMPILED]} and {READY} {WORKING[READY]}"
        ) from e
    _declare(lib)
    abi = AbiInfo()
    lib.me_abi(ctypes.byref(abi))
    check_abi(
        abi.backend_api, abi.tensor_overhead, lib.me_loaded_tensor_overhead(), abi.ggml_version.decode(), loaded
    )
    check_structs(_named_sizes(abi), abi.counters.decode().split())
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if lib.me_register(error) != 0:
        raise WrongLibrary(error.value.decode(errors="surrogateescape"))
    return lib


def trim_memory() -> None:
    """Give memory that was freed back to the system, where its library keeps it."""
    library().me_trim_memory()


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
        "me_log": (None, [c_int32, text, c_void_p]),
        "me_kernel": (c_int32, [c_int32, c_int64, c_int64, c_int32]),
        "me_set_zstd": (None, [c_void_p, c_void_p, c_void_p, c_void_p]),
        "me_multiply_rows": (c_int32, [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p]),
        "me_unpack": (c_int32, [text, c_int64, c_int32, c_int32, c_void_p, c_int64, text]),
        "me_use_code_unpacker": (c_int32, [c_int32]),
        "me_threadpool_new": (c_void_p, [c_int32]),
        "me_threadpool_free": (None, [c_void_p]),
        "me_model_open": (model, [POINTER(ModelDesc), text]),
        "me_model_set_arena": (c_int32, [model, c_int64, c_int64, text]),
        "me_model_preload": (c_int32, [model, POINTER(c_int32), c_int32, text]),
        "me_model_close": (None, [model]),
        "me_model_arm": (c_int32, [model, text]),
        "me_model_disarm": (None, [model]),
        "me_model_unbind": (None, [model]),
        "me_model_bound_tensors": (c_int32, [model]),
        "me_model_counters": (None, [model, POINTER(c_int64)]),
        "me_model_take_error": (c_int32, [model, text]),
        "me_model_resident": (None, [model, POINTER(c_uint8)]),
        "me_model_unit_bytes": (None, [model, POINTER(c_int64)]),
        "me_model_part_bytes": (None, [model, POINTER(c_int64)]),
        "me_model_held_parts": (None, [model, POINTER(c_uint8)]),
        "me_model_drop_empty_parts": (None, [model]),
        "me_model_pace": (None, [model, c_int64]),
        "me_model_set_stop": (None, [model, c_int32]),
        "me_model_step": (c_int32, [model, POINTER(StepView)]),
        "me_model_set_lookahead": (c_int32, [model, c_int32, c_int32, c_int32, text]),
        "me_model_ahead": (c_int32, [model, c_int32]),
        "me_model_known_routers": (c_int32, [model]),
        "me_model_early_routers": (c_int32, [model]),
        "me_model_watch_attention": (None, [model]),
        "me_model_set_selecting": (None, [model, c_int32]),
        "me_model_check_selecting": (c_int32, [model, text]),
        "me_model_selection": (c_int32, [model, POINTER(SelectionView)]),
        "me_model_gating": (c_int32, [model, c_int32, POINTER(c_float)]),
        "me_model_set_renormalise": (None, [model, c_int32]),
        "me_model_set_noise": (c_double, [model, c_int32, c_float, c_uint64]),
        "me_model_scratch_bytes": (c_int64, [model, c_int64, c_int32, c_int32]),
        "me_repacks": (c_int32, [c_int32, c_int64, c_int64, c_int64]),
        "me_only_repack": (None, [c_int32]),
        "me_trim_memory": (None, []),
    }
    for name, (restype, argtypes) in signatures.items():
        f = getattr(lib, name)
        f.restype, f.argtypes = restype, argtypes
