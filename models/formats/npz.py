"""Reading .npz files that may be damaged: zipfile and numpy raise nearly anything over one; here it is one class."""

from __future__ import annotations

import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from moe_edge.models.formats.files import open_file

Arrays = dict[str, npt.NDArray[Any]]

ENDS_EARLY = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, struct.error)
SAYS_NONSENSE = (
    ValueError, TypeError, ArithmeticError, MemoryError, LookupError, AttributeError, RuntimeError, SyntaxError,
    tokenize.TokenError,
)  # fmt: skip
HEADER_BYTES = 1 << 12  # of one array, beside its values


class Damaged(Exception):
    """ends_early: the file looks cut or its bytes altered; else it says what cannot be."""

    def __init__(self, cause: BaseException, ends_early: bool) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.ends_early = ends_early


def open_npz(path: Path) -> IO[bytes]:
    """A plain file to read. Raises MissingFile, also for a pipe, which would never end."""
    return os.fdopen(open_file(path), "rb")


def read_arrays(
    file: IO[bytes], names: Callable[[list[str]], Iterable[str]] = lambda names: names, most_bytes: int | None = None
) -> Arrays:
    """The arrays of an .npz by name, nothing unpickled.

    names: which of the names there are to read; what it raises comes out. most_bytes: of one array's values.
    Raises Damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's about headers of old versions
        try:
            with np.load(file, allow_pickle=False) as npz:
                _check_members(npz.zip, most_bytes)
                wanted = names(list(npz.files))
                return {name: _array(name, npz[name]) for name in wanted}
        except ENDS_EARLY as error:
            raise Damaged(error, True) from error
        except SAYS_NONSENSE as error:
            raise Damaged(error, False) from error


def _array(name: str, found: Any) -> npt.NDArray[Any]:
    """What numpy gives for a part that does not begin as an array of its own: plain bytes."""
    if not isinstance(found, np.ndarray):
        raise ValueError(f"its part '{name[:40]}' is no array")
    return found


def _check_members(archive: zipfile.ZipFile, most_bytes: int | None) -> None:
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise ValueError(f"its part '{member.filename[:40]}' is packed as no file of ours is")
        if most_bytes is not None and member.file_size > most_bytes + HEADER_BYTES:
            raise ValueError(f"its part '{member.filename[:40]}' has {member.file_size} bytes")
