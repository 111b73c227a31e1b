"""The one model in a folder: what is a model, what lies beside one, and what to say when there is none.

Names decide first: copies of resource forks (`._x.gguf`), later parts of a split model and expert stores are never
models, and what is named mmproj or imatrix is none beside another. Of what is left, headers decide: an importance
matrix, a vision projector or an adapter says so itself.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from moe_edge.models.errors import MissingFile, MoeEdgeError
from moe_edge.models.formats.files import is_present, shown, unreadable
from moe_edge.models.formats.gguf import MOST_NAMED, read_header

SUFFIX = ".gguf"
STORE_SUFFIX = ".experts.gguf"
_LATER_PART = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf$", re.IGNORECASE)
_FIRST_PART = re.compile(r"-0*1-of-[0-9]{5}\.gguf$", re.IGNORECASE)
# general.type of a GGUF that is no model, and the architectures that older ones of the kind have instead
BESIDE_MODELS = ("imatrix", "mmproj", "adapter")
BESIDE_ARCHITECTURES = ("clip",)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; no when it is not there. Raises MissingFile when the file system does not say."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def find_model(path: Path) -> Path:
    """`path`, or the one model in it when it is a folder. Raises MissingFile naming what was found instead."""
    if not is_folder(path):
        return path
    named = gguf_names(path)
    candidates = [path / name for name in named if _may_be_model(name)]
    usual = [each for each in candidates if not _named_beside(each.name)]
    models = usual if len(usual) == 1 else [each for each in usual or candidates if not _is_beside(each)]
    if len(models) == 1:
        return models[0]
    if models:
        raise MissingFile(
            f"{path}: this folder needs exactly one GGUF model, found {len(models)}: "
            f"{_listed(each.name for each in models)}; give the one you mean"
        )
    if is_present(path / "config.json"):
        raise MissingFile(f"{path}: is a Hugging Face checkpoint; convert it: moe-edge convert {path} -o NAME.gguf")
    beside = f", only {_listed(named)}, which hold none" if named else ""
    raise MissingFile(
        f"{path}: this folder needs exactly one GGUF model, found 0: no model NAME.gguf{beside}, and no checkpoint "
        "(config.json, tokenizer.json and *.safetensors)"
    )


def gguf_names(folder: Path) -> list[str]:
    """Names that end in .gguf, in any case, sorted. Raises MissingFile."""
    try:
        return sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIX))
    except OSError as error:
        raise unreadable(folder, error) from error


def _may_be_model(name: str) -> bool:
    if name.startswith(".") or name.lower().endswith(STORE_SUFFIX):
        return False
    return not _LATER_PART.search(name) or bool(_FIRST_PART.search(name))


def _named_beside(name: str) -> bool:
    """As llama.cpp tells what lies beside a model; in a folder without another file, the header decides."""
    return "mmproj" in name.lower() or "imatrix" in name.lower()


def _is_beside(path: Path) -> bool:
    """Whether a file says that it is no model. One that cannot be read counts as one: opening it will say why."""
    try:
        kv = read_header(path).kv
    except MoeEdgeError:
        return False
    return kv.get("general.type") in BESIDE_MODELS or kv.get("general.architecture") in BESIDE_ARCHITECTURES


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", ... {len(names)} in all" if len(names) > MOST_NAMED else ""
    return ", ".join(name if len(name) < 200 else shown(name) for name in names[:MOST_NAMED]) + more
