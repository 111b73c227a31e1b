"""A source whose bytes arrive while it is converted: what a conversion tells whoever brings them, and asks of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moe_edge.models.formats.files import FileStamp
from moe_edge.models.formats.gguf import TensorEntry
from moe_edge.models.formats.source_files import SourceFiles
from moe_edge.models.formats.write import GGUFOutput

if TYPE_CHECKING:
    from moe_edge.convert.conversion_plan import ConvertPlan


class Arriving(Protocol):
    """folder: where outputs that are not whole stay, so that a conversion that was stopped goes on there."""

    @property
    def folder(self) -> Path: ...

    def resume(self, identity: str) -> tuple[Sequence[int], Sequence[int]]:
        """Checksums of the tensors that an earlier run has written of store and skeleton; none for another identity."""
        ...

    def begin(self, tensors: Sequence[tuple[str, TensorEntry]]) -> int:
        """What will be read, in this order: (name of the output's tensor, where its bytes are).

        Returns the bytes of disk that it takes beside the outputs, at the most.
        """
        ...

    def files(self, stamps: Mapping[Path, FileStamp]) -> SourceFiles:
        """What the bytes are read from."""
        ...

    def written(self, store: GGUFOutput, skeleton: GGUFOutput) -> None:
        """Something was written."""
        ...

    def check(self) -> None:
        """Everything is written and proved; the last chance to refuse it. Raises BadChecksum."""
        ...

    def finished(self) -> None:
        """The outputs have their names: nothing is needed any more."""
        ...


def identity_of(store: GGUFOutput, skeleton: GGUFOutput) -> str:
    """Of the two files to be written: their headers, in which all that was asked for shows."""
    return hashlib.sha256(store.header + skeleton.header).hexdigest()


def left_of(plan: ConvertPlan, n_store: int, n_dense: int) -> list[tuple[str, TensorEntry]]:
    """What is still to be read when so many tensors of store and skeleton are written."""
    return [(each.name, each.source) for each in (*plan.store_tensors[n_store:], *plan.dense[n_dense:])]
