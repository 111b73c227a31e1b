"""SentencePiece tokenizers as llama.cpp's `llama` (BPE by scores) and `gemma4` (BPE by merges) vocabularies.

Read from tokenizer.json with byte_fallback, or from tokenizer.model, whose protobuf is read here as far as needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_edge.convert.vocabulary import (
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    refuse,
    special_ids,
)
from moe_edge.models.errors import BadFile
from moe_edge.models.formats.files import read_file, shown
from moe_edge.models.formats.safetensors import as_object, as_objects

UNKNOWN, BYTE = 2, 6  # llama.cpp's token types; those of SentencePiece's pieces have the same numbers
SPACE = "\u2581"
MAX_MODEL = 1 << 26  # bytes of a tokenizer.model
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# SentencePiece's piece types
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE_PIECE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2  # its model types


def of_json(
    folder: Path, data: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any],
    templates: Mapping[str, str],
) -> Tokenizer:  # fmt: skip
    """The tokenizer of a tokenizer.json whose BPE falls back to bytes. Raises as read_tokenizer does."""
    path = folder / "tokenizer.json"
    model = as_object(data.get("model"), path, "model")
    vocab = as_object(model.get("vocab"), path, "vocab")
    prefixed = _adds_space(path, data)
    added = {token["id"]: token for token in as_objects(data.get("added_tokens"), path, "added_tokens")}
    unknown = model.get("unk_token")
    by_id: dict[int, tuple[str, int]] = {}
    for text, number in vocab.items():
        if type(number) is not int or number < 0 or number in by_id:
            raise BadFile(f"{path}: token {shown(text)} has id {shown(number)}, which is no number or used twice")
        by_id[number] = (text, BYTE if _BYTE.fullmatch(text) else UNKNOWN if text == unknown else NORMAL)
    for number, token in added.items():
        kind = by_id.get(number, ("", NORMAL))[1]
        if kind != UNKNOWN:
            by_id[number] = (str(token["content"]), CONTROL if token.get("special") else USER_DEFINED)
    tokens, types = _padded(path, by_id, config.get("vocab_size"))
    merges = _pairs(path, model)
    special = special_ids(path, settings, config, added, len(tokens))
    if unknown is not None and unknown in vocab:
        special["unk"] = vocab[unknown]
    adds = _template(path, data, settings, tokens, special)
    if _is_gemma(data):
        return Tokenizer(
            "gemma4", tokens, types, merges, special, *adds, templates, (), model="gemma4",
            scores=tuple(-float(i) for i in range(len(tokens))), flags={"add_space_prefix": False},
        )  # fmt: skip
    return Tokenizer(
        None, tokens, types, (), special, *adds, templates, (), model="llama",
        scores=_scores(tokens, merges), flags={"add_space_prefix": prefixed},
    )  # fmt: skip


def _scores(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """llama.cpp joins the pair whose result has the highest score: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return tuple(-float(rank.get(token, len(merges))) for token in tokens)


def _padded(path: Path, by_id: Mapping[int, tuple[str, int]], size: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    highest = max(by_id, default=-1)
    n = highest + 1 if size is None else size
    if type(n) is not int or not highest < n <= MAX_TOKENS:
        raise BadFile(
            f"{path}: token ids go up to {highest} but vocab_size in config.json is {shown(n)}, "
            f"at most {MAX_TOKENS} are read"
        )
    padded = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(n)]
    return tuple(text for text, _ in padded), tuple(kind for _, kind in padded)


def _pairs(path: Path, model: Mapping[str, Any]) -> tuple[str, ...]:
    made = []
    for merge in model.get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise BadFile(f"{path}: merge {shown(merge)} is not a pair of tokens")
        made.append(" ".join(pair))
    return tuple(made)


def _normalizers(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    normalizer = data.get("normalizer") or {}
    return list(normalizer.get("normalizers", [])) if normalizer.get("type") == "Sequence" else [normalizer]


def _is_gemma(data: Mapping[str, Any]) -> bool:
    """BPE over whole lines by its merges: a space becomes a mark, and none is put in front."""
    kinds = [each.get("type") for each in _normalizers(data)]
    pre = data.get("pre_tokenizer") or {}
    return kinds == ["Replace"] and pre.get("type") == "Split"


def _adds_space(path: Path, data: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text. Raises UnknownName for another normalisation than SentencePiece's own."""
    pre = as_object(data.get("pre_tokenizer"), path, "pre_tokenizer")
    kinds = [each.get("type") for each in _normalizers(data) if each]
    if pre.get("type") == "Metaspace":
        if kinds:
            refuse(path, f"a Metaspace behind the normalizer {kinds} is not supported")
        scheme, old = pre.get("prepend_scheme"), pre.get("add_prefix_space")  # the latter of older releases
        return not (scheme == "never" or old is False)
    for each in _normalizers(data):
        if each.get("type") == "Replace" and each.get("pattern") != {"String": " "}:
            refuse(path, f"a normalizer that replaces {each.get('pattern')} is not supported")
    if kinds in (["Prepend", "Replace"], ["Replace"]) and pre.get("type") in (None, "Split"):
        return bool(kinds[0] == "Prepend")
    refuse(path, f"normalizer {kinds} with pre-tokenizer {pre.get('type')} is not supported with byte_fallback")


def _template(
    path: Path, data: Mapping[str, Any], settings: Mapping[str, Any], tokens: tuple[str, ...],
    special: Mapping[str, int],
) -> tuple[bool, bool]:
    """Whether a bos token is put before, and an eos token behind, every text."""
    processor = as_object(data.get("post_processor"), path, "post_processor")
    if processor.get("type") != "TemplateProcessing":
        return bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token"))
    names = [as_object(step.get("SpecialToken"), path, "SpecialToken").get("id") for step in
             as_objects(processor.get("single"), path, "single")]  # fmt: skip
    texts = {name: tokens[number] for name, number in special.items()}
    return names[:1] == [texts.get("bos")], names[-1:] == [texts.get("eos")] and "eos" in texts


# ---- tokenizer.model


def of_model_file(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], templates: Mapping[str, str]
) -> Tokenizer:
    """The tokenizer of a SentencePiece model. Raises BadFile, and UnknownName for a kind llama.cpp lacks."""
    path = folder / "tokenizer.model"
    pieces: list[tuple[str, float, int]] = []
    kind, prefix, extra, charsmap, falls_back = UNIGRAM, True, True, b"", False
    ids = {"unk": 0, "bos": 1, "eos": 2}
    for number, value in _fields(read_file(path, MAX_MODEL), path):
        if number == 1:
            pieces.append(_piece(value, path))
        elif number == 2:
            spec = dict(_fields(value, path))
            kind, falls_back = _int(spec.get(3, kind)), bool(spec.get(35, 0))
            ids |= {name: _int(spec[key]) for name, key in (("unk", 40), ("bos", 41), ("eos", 42), ("pad", 43))
                    if key in spec}  # fmt: skip
        elif number == 3:
            spec = dict(_fields(value, path))
            charsmap = spec[2] if isinstance(spec.get(2), bytes) else b""
            prefix, extra = bool(spec.get(3, 1)), bool(spec.get(4, 1))
    if kind == UNIGRAM and falls_back:
        refuse(path, "SentencePiece unigram with byte_fallback is not supported: llama.cpp has no bytes there")
    if kind not in (UNIGRAM, BPE):
        refuse(path, f"SentencePiece model type {kind} is not supported; known: unigram, BPE")
    if not pieces or len(pieces) > MAX_TOKENS:
        raise BadFile(f"{path}: has {len(pieces)} pieces, expected 1 to {MAX_TOKENS}")
    by_id = {number: (text, type_) for number, (text, _, type_) in enumerate(pieces)}
    tokens, types = _padded(path, by_id, config.get("vocab_size"))
    scores = tuple(score for _, score, _ in pieces) + (-10000.0,) * (len(tokens) - len(pieces))
    n_signed = 1 << 31
    special = {name: number for name, number in ids.items() if 0 <= number < min(len(tokens), n_signed)}
    flags = {"add_space_prefix": prefix}
    if kind == UNIGRAM:
        flags["remove_extra_whitespaces"] = extra
    return Tokenizer(
        None, tokens, types, (), special, bool(settings.get("add_bos_token", True)),
        bool(settings.get("add_eos_token", False)), templates, (), model="t5" if kind == UNIGRAM else "llama",
        scores=scores, flags=flags, charsmap=charsmap if kind == UNIGRAM else b"",
    )  # fmt: skip


def _piece(data: Any, path: Path) -> tuple[str, float, int]:
    fields = dict(_fields(data, path))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), _int(fields.get(3, _NORMAL))
    if not isinstance(text, bytes) or not isinstance(score, bytes) or kind not in range(1, 7):
        raise BadFile(f"{path}: holds a piece that is no text with a score")
    try:
        return text.decode(), float(struct.unpack("<f", score)[0]), kind
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: piece {shown(text[:40])} is not UTF-8") from error


def _int(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _fields(data: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: whole numbers, or bytes. Raises BadFile when it is cut."""
    if not isinstance(data, bytes):
        raise BadFile(f"{path}: is not a SentencePiece model")
    at = 0
    while at < len(data):
        key, at = _varint(data, at, path)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, path)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None and wire == 2:
            size, at = _varint(data, at, path)
        if size is None or at + size > len(data) or number == 0:
            raise BadFile(f"{path}: is not a SentencePiece model, or is cut at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise BadFile(f"{path}: is not a SentencePiece model, or is cut at byte {at}")
