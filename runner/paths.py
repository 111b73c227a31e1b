"""Paths for llama-cpp-python, which encodes them as UTF-8 only: a name on Linux may be any bytes."""

from __future__ import annotations

import os
from pathlib import Path


class AnyPath(str):
    """A path as text, whose `encode` gives the bytes that the file system knows it by, UTF-8 or not."""

    def __new__(cls, path: str | Path) -> AnyPath:
        return super().__new__(cls, os.fspath(path))

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))
