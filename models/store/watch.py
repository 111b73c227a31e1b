"""Whether the files of an open model are still those that were opened.

Experts are read for as long as the model runs. A file that is renamed over or deleted stays what it was for whoever has
it open; one that is overwritten or cut in place does not, and gives other words without any other sign.
"""

from __future__ import annotations

import os

from moe_edge.models.errors import EngineError, WrongStore
from moe_edge.models.formats.files import FileStamp
from moe_edge.models.store.store import ExpertModel


def changed_files(model: ExpertModel) -> list[str]:
    """A sentence for each file whose experts were written to since the model was opened. Microseconds a file."""
    changed = []
    for path in model.files:
        needed, found = model.stamps.get(path), _stamp(path)
        if needed is None or found is None or found[:2] != needed[:2]:
            continue  # what is open is another file than the one that has the name now
        if found != needed:
            is_cut = found.nbytes < needed.nbytes
            what = f"cut from {needed.nbytes} to {found.nbytes} bytes" if is_cut else "overwritten"
            changed.append(
                f"{path}: was {what} while the model was in use, so its experts are other ones than were loaded; "
                "load the model again"
            )
    return changed


def check_unchanged(model: ExpertModel) -> None:
    """Raise EngineError with the first of changed_files()."""
    for sentence in changed_files(model):
        raise EngineError(sentence)


def check_replaced(model: ExpertModel) -> None:
    """Raise WrongStore when skeleton or experts became other files between being listed and being opened to be used."""
    for path, needed in model.stamps.items():
        if model.in_place and path == model.skeleton:
            continue  # whoever writes a cached skeleton of this name writes the same
        found = _stamp(path)
        if found is None or found[:2] != needed[:2]:
            raise WrongStore(f"{path}: was replaced while the model was loaded; load it again")


def _stamp(path: str | os.PathLike[str]) -> FileStamp | None:
    try:
        return FileStamp.of(os.stat(path))
    except OSError:
        return None
