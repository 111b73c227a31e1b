"""Tokenizers that a checkpoint has as tiktoken ranks: Kimi-K2 and Moonlight, HunYuan, the first Qwen.

The file has a line for each token: its bytes in base64, and its rank, which is its id and says how early it is merged.
llama.cpp wants merges instead: a token is merged of the two tokens that its bytes come to when only tokens of lower
rank are merged. The regular expression and the special tokens are not in the file but in Python code beside it, which
is never run: the expression is known by the tokenizer's class.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_edge.convert.merging import merged
from moe_edge.convert.vocabulary import (
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNUSED,
    Tokenizer,
    refuse,
    special_ids,
)
from moe_edge.models.errors import BadFile
from moe_edge.models.formats.files import is_present, read_file, shown
from moe_edge.models.formats.safetensors import as_object

MAX_RANKS = 1 << 25  # bytes of a file; Kimi-K2's has 2.8 million
MAX_TOKEN = 1 << 10  # bytes of a token
_COMPOSES = "the tokenizer's NFC normalizer is not applied by llama.cpp: text must come in NFC"


@dataclass(frozen=True)
class RanksKind:
    """A tokenizer class whose vocabulary is a ranks file.

    file: its name. classes: of tokenizer_config.json; the first is the usual one. pre: llama.cpp's name, which is also
    that of the expression. special: (number of ranks, number of ids behind them) -> their texts where
    tokenizer_config.json names none. bos: its text where config.json names a wrong id. composes: text is made NFC.
    """

    file: str
    classes: tuple[str, ...]
    pre: str
    special: Callable[[int, int], list[str]]
    bos: str | None = None
    composes: bool = False


def _kimi(n_ranks: int, n: int) -> list[str]:
    return [f"<|reserved_token_{n_ranks + i}|>" for i in range(min(n, 258))]


def _hunyuan(_: int, n: int) -> list[str]:
    named = [f"<|{name}|>" for name in ("endoftext", "startoftext", "bos", "eos", "pad")]
    return [*named, *(f"<|extra_{i}|>" for i in range(n - len(named)))][:n]


def _qwen(_: int, n: int) -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))][:n]


RANKS = (
    RanksKind("tiktoken.model", ("TikTokenTokenizer",), "kimi-k2", _kimi),
    RanksKind("hy.tiktoken", ("HYTokenizer",), "hunyuan", _hunyuan, bos="<|bos|>", composes=True),
    RanksKind("qwen.tiktoken", ("QWenTokenizer",), "qwen2", _qwen, composes=True),
)


def ranks_in(folder: Path) -> RanksKind | None:
    """The kind of the ranks file in a folder, None without one."""
    return next((kind for kind in RANKS if is_present(folder / kind.file)), None)


def read_ranks(path: Path) -> dict[bytes, int]:
    """token -> rank. Raises BadFile unless the ranks are those from 0 on, with every byte among them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path, MAX_RANKS).splitlines(), 1):
        if not line.strip():
            continue
        token, rank = _pair(path, number, line)
        if token in ranks or rank != len(ranks):
            raise BadFile(
                f"{path}: line {number} has rank {rank} for {shown(token[:40])}, expected a new token with rank "
                f"{len(ranks)}"
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise BadFile(f"{path}: has {len(ranks)} tokens, and none for {len(missing)} of the 256 bytes ({missing[:4]})")
    return ranks


def _pair(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    parts = line.split()
    try:
        token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        if len(parts) == 2 and 0 < len(token) <= MAX_TOKEN and rank < MAX_TOKENS:
            return token, rank
    except (IndexError, ValueError, binascii.Error):
        pass
    raise BadFile(f"{path}: line {number} is {shown(line[:60])}, expected a token in base64 and its rank")


def merges_of(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """(merges in their order, tokens that are merged of no two others: tiktoken makes those of whole pieces only)."""
    merges, unmerged = [], []
    for token, own in sorted(ranks.items(), key=lambda each: each[1]):
        if len(token) == 1:
            continue

        def rank(left: bytes, right: bytes, below: int = own) -> int | None:
            found = ranks.get(left + right, below)
            return found if found < below else None

        parts = merged([token[i : i + 1] for i in range(len(token))], rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            unmerged.append(token)
    return merges, unmerged


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where it shows, else one from U+0100 on."""
    shows = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shows else next(others)) for byte in range(256)]


def of_ranks(
    folder: Path, kind: RanksKind, config: Mapping[str, Any], settings: Mapping[str, Any],
    templates: Mapping[str, str],
) -> Tokenizer:  # fmt: skip
    """The tokenizer of a ranks file. Raises BadFile, and UnknownName for a class whose expression is not known."""
    path = folder / kind.file
    ranks = read_ranks(path)
    special = special_tokens(folder, kind, settings, config.get("vocab_size"), len(ranks))
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges, unmerged = merges_of(ranks)
    size = config.get("vocab_size", len(ranks) + len(special))
    by_id = {rank: (spelled(token), NORMAL) for token, rank in ranks.items()}
    by_id |= {number: (text, CONTROL) for number, text in special.items()}
    padded = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    added = {number: {"content": text} for number, text in special.items()}
    # As llama.cpp's converter does: ids of config.json come before names of tokenizer_config.json.
    named = {key: value for key, value in settings.items() if config.get(f"{key}_id") is None}
    ids = special_ids(path, named, config, added, size)
    bos = next((number for number, text in special.items() if text == kind.bos), None)
    notes = [_COMPOSES] if kind.composes else []
    if unmerged:
        notes.append(f"{len(unmerged)} tokens of {kind.file} are merged of no two others; llama.cpp never makes them")
    return Tokenizer(
        pre=kind.pre,
        tokens=tuple(text for text, _ in padded),
        types=tuple(each for _, each in padded),
        merges=tuple(f"{spelled(left)} {spelled(right)}" for left, right in merges),
        special=ids if bos is None else {**ids, "bos": bos},
        add_bos=bool(settings.get("add_bos_token")),
        add_eos=bool(settings.get("add_eos_token")),
        chat_templates=templates,
        notes=tuple(notes),
    )


def special_tokens(
    folder: Path, kind: RanksKind, settings: Mapping[str, Any], size: Any, n_ranks: int
) -> dict[int, str]:
    """id -> text of the tokens behind the ranks: as tokenizer_config.json names them, else as the class does.

    size: `vocab_size` of config.json, None where it has none. Raises BadFile, and UnknownName for another class.
    """
    path = folder / kind.file
    found = settings.get("tokenizer_class")
    if found not in kind.classes and not (found is None and kind.file != "tiktoken.model"):
        refuse(path, f"tokenizer class {shown(found)} is not known with {kind.file}; known: {', '.join(kind.classes)}")
    named: dict[int, str] = {}
    decoder = as_object(settings.get("added_tokens_decoder"), folder / "tokenizer_config.json", "added_tokens_decoder")
    for number, token in decoder.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not (number.isascii() and number.isdigit() and isinstance(content, str)):
            raise BadFile(f"{folder / 'tokenizer_config.json'}: added token {shown(number)} has no id or content")
        named[int(number)] = content
    most = size if size is not None else max([n_ranks + len(kind.special(n_ranks, 0)), *(i + 1 for i in named)])
    if type(most) is not int or not n_ranks <= most <= MAX_TOKENS or any(not n_ranks <= i < most for i in named):
        raise BadFile(
            f"{path}: has {n_ranks} ranks, and special tokens {sorted(named)[:3]}...; vocab_size in config.json is "
            f"{shown(size)}, at most {MAX_TOKENS} are read"
        )
    usual = dict(enumerate(kind.special(n_ranks, most - n_ranks), n_ranks))
    texts = {**{i: text for i, text in usual.items() if text not in named.values()}, **named}
    if len(set(texts.values())) != len(texts):
        raise BadFile(f"{path}: two of its special tokens have the same text")
    return texts
