"""Any checkpoint as a source to convert: a GGUF file, a split one, or a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

from moe_edge.models.formats.files import is_present
from moe_edge.models.formats.gguf import open_gguf
from moe_edge.models.store.folder import find_model, is_folder
from moe_edge.models.store.source import Source, gguf_source


def open_source(path: str | os.PathLike[str]) -> Source:
    """The source at `path`: a GGUF file (any part of a split one), or a Hugging Face folder.

    Raises MissingFile, BadFile and its kind, NotMoE, UnknownName for an architecture we do not know, UsageError
    for a file moe-edge wrote itself.
    """
    path = Path(path)
    if is_folder(path) and is_present(path / "config.json"):
        from moe_edge.convert.hf import hf_source  # imports gguf's name tables, which nothing else needs

        return hf_source(path)
    return gguf_source(open_gguf(find_model(path)))
