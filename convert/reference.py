"""What the tokens of a checkpoint's tokenizer are, by the library that it was made for, where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_edge.convert.pretokenizers import expression_of
from moe_edge.convert.ranks import RanksKind, ranks_in, read_ranks, special_tokens
from moe_edge.models.errors import BadFile
from moe_edge.models.formats.files import is_present

Encode = Callable[[str], list[int]]


def library_of(folder: Path) -> str:
    """The library that reads the tokenizer of a checkpoint folder, as pip calls it."""
    return "tokenizers" if is_present(folder / "tokenizer.json") or ranks_in(folder) is None else "tiktoken"


def tokenizer_of(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Encode | None:
    """text -> tokens, without those put before and behind every text; None without the library or what it reads.

    config, settings: config.json and tokenizer_config.json. Raises BadFile when the library cannot read the file.
    """
    kind = ranks_in(folder)
    if library_of(folder) == "tokenizers" or kind is None:
        return of_json(folder / "tokenizer.json", special=False)
    return _of_ranks(folder, kind, config, settings)


def of_json(path: Path, special: bool = True) -> Encode | None:
    """text -> tokens of a tokenizer.json; None without the file or the library.

    special: with the tokens that are put before and behind every text. Raises BadFile when the library cannot read it.
    """
    if not is_present(path):
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no error of its own
        raise BadFile(f"{path}: the tokenizers library cannot read it: {error}") from error
    return lambda text: list(tokenizer.encode(text, add_special_tokens=special).ids)


def _of_ranks(folder: Path, kind: RanksKind, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Encode | None:
    try:
        import tiktoken
    except ImportError:
        return None
    ranks = read_ranks(folder / kind.file)
    special = special_tokens(folder, kind, settings, config.get("vocab_size"), len(ranks))
    encoding = tiktoken.Encoding(
        kind.pre, pat_str=expression_of(kind.pre), mergeable_ranks=ranks,
        special_tokens={text: number for number, text in special.items()},
    )  # fmt: skip
    return lambda text: encoding.encode(text, allowed_special="all")
