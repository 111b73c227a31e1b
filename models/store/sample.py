"""A digest of dense weights that costs milliseconds: the first and the last page of every tensor, and pages between.

It tells models apart whose headers, sizes and times are equal, as those of container images with fixed dates may be.
What it does not see is a change inside a large tensor that leaves its ends alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles

PAGE = 4096
WHOLE_BYTES = 4 << 20  # of all tensors together: up to here all is read
N_BETWEEN = 64  # pages besides the ends, spread evenly over all dense bytes


def sample_ranges(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(tensor, first byte, bytes) of what is read of tensors of these sizes, in order; ranges may overlap."""
    total = sum(sizes)
    if total <= WHOLE_BYTES:
        yield from ((number, 0, nbytes) for number, nbytes in enumerate(sizes))
        return
    step, at = total // N_BETWEEN, 0
    for number, nbytes in enumerate(sizes):
        if nbytes <= 2 * PAGE:
            yield number, 0, nbytes
        else:
            yield number, 0, PAGE
            for place in range(-(-at // step) * step, at + nbytes - PAGE, step):
                yield number, place - at, PAGE
            yield number, nbytes - PAGE, PAGE
        at += nbytes


def dense_digest(tensors: Sequence[TensorEntry], files: SourceFiles) -> str:
    """32 hex digits over the samples of these tensors. Raises what SourceFiles.read does."""
    ranges = list(sample_ranges([entry.nbytes for entry in tensors]))
    _announce(tensors, ranges, files)
    digest = hashlib.sha256()
    for number, start, nbytes in ranges:
        digest.update(files.read(tensors[number], start, nbytes))
    return digest.hexdigest()[:32]


def _announce(tensors: Sequence[TensorEntry], ranges: Sequence[tuple[int, int, int]], files: SourceFiles) -> None:
    """Let the kernel read all of it at once: one after the other, hundreds of small reads would each wait."""
    fds = {entry.path: files.open(entry.path) for entry in tensors}
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        for fd in fds.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # and nothing around it
        for number, start, nbytes in ranges:
            entry = tensors[number]
            os.posix_fadvise(fds[entry.path], entry.offset + start, nbytes, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
