"""The zstd library of the process: the native library unpacks with it (native/codec.h).

It is the system's where there is one, else the one inside the Python package zstandard, which is always installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_edge.models.errors import MissingFile

FUNCTIONS = ("ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_decompressDCtx", "ZSTD_isError")
SYSTEM = {
    "linux": ("libzstd.so.1",),
    "darwin": ("/opt/homebrew/lib/libzstd.1.dylib", "/usr/local/lib/libzstd.1.dylib", "libzstd.1.dylib"),
}


@lru_cache(maxsize=1)
def zstd_functions() -> tuple[int, ...]:
    """The addresses of FUNCTIONS, in that order. Raises MissingFile when no library has them."""
    tried = []
    for path in _candidates():
        tried.append(path)
        try:
            library = ctypes.CDLL(path)
            addresses = tuple(_address(library, name) for name in FUNCTIONS)
        except (OSError, AttributeError):
            continue
        _kept.append(library)
        return addresses
    raise MissingFile(
        f"the experts of this model are packed with zstd, and no library unpacks them (tried {', '.join(tried)}); "
        "install it: apt install libzstd1, or pip install --force-reinstall zstandard"
    )


_kept: list[Any] = []  # a library stays loaded as long as its functions may be called


def _candidates() -> Iterator[str]:
    yield from SYSTEM.get(sys.platform, ())
    spec = importlib.util.find_spec("zstandard")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from map(str, sorted(Path(folder).glob("_cffi*.so")))


def _address(library: Any, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
