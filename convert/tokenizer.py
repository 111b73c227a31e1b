"""A Hugging Face tokenizer as the key-values llama.cpp reads: byte-level BPE here.

SentencePiece is read in sentencepiece.py, tiktoken ranks in ranks.py.

llama.cpp splits text by a regular expression it knows by name (`tokenizer.ggml.pre`). The name is found by comparing
the structure of tokenizer.json with those we know exactly (pretokenizers.py), or by the tokens that a known model makes
of a text (known_tokenizers.py); whatever differs is refused, since a guess would give other tokens than the model was
trained on. tokenizer_proof.py compares tokens before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_edge.convert.known_tokenizers import known_as
from moe_edge.convert.merging import all_are_merged
from moe_edge.convert.pretokenizers import find_pre_tokenizer, known_names
from moe_edge.convert.ranks import of_ranks, ranks_in
from moe_edge.convert.reference import of_json as reference_of
from moe_edge.convert.sentencepiece import of_json, of_model_file
from moe_edge.convert.vocabulary import (
    CONTROL,
    MAX_TOKENS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    chat_templates,
    refuse,
    special_ids,
)
from moe_edge.models.errors import BadFile
from moe_edge.models.formats.files import is_present, shown
from moe_edge.models.formats.keyvalues import MAX_ELEMENTS
from moe_edge.models.formats.safetensors import as_object, as_objects, read_json_file


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint folder, padded to `vocab_size` of its config.

    Raises MissingFile, BadFile, and UnknownName for a tokenizer llama.cpp would not reproduce exactly.
    """
    path = folder / "tokenizer.json"
    settings_path = folder / "tokenizer_config.json"
    settings = read_json_file(settings_path) if is_present(settings_path) else {}
    if not is_present(path) and is_present(folder / "tokenizer.model"):
        return of_model_file(folder, config, settings, chat_templates(folder, settings))
    ranks = ranks_in(folder)
    if ranks is not None and not is_present(path):
        return of_ranks(folder, ranks, config, settings, chat_templates(folder, settings))
    data = read_json_file(path)
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise BadFile(f"{path}: has no 'model' with a 'vocab'")
    if model.get("byte_fallback") and model.get("type") in (None, "BPE"):
        return of_json(folder, data, config, settings, chat_templates(folder, settings))
    _check_model(path, model)
    added = _added_tokens(path, data)
    tokens, types = _tokens(path, model["vocab"], added, config.get("vocab_size"))
    special = special_ids(path, settings, config, added, len(tokens))
    add_bos, add_eos = _adds(path, data, settings, special, tokens)
    merges, normalized = _merges(path, model), _normalizer(path, data)
    pre, notes = _pre_tokenizer(path, data, model, merges)
    return Tokenizer(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_templates=chat_templates(folder, settings),
        notes=notes + normalized,
    )


def _check_model(path: Path, model: Mapping[str, Any]) -> None:
    if model.get("type") not in (None, "BPE"):
        refuse(path, f"tokenizer model '{model.get('type')}' is not supported; known: BPE")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            refuse(path, f"BPE with {key} = {model[key]!r} is not supported; known: byte-level BPE")


def _normalizer(path: Path, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes about the normalizer: llama.cpp applies none, which only NFC survives."""
    normalizer = as_object(data.get("normalizer"), path, "normalizer")
    if not normalizer:
        return ()
    if normalizer.get("type") == "NFC":
        return ("the tokenizer's NFC normalizer is not applied by llama.cpp: text must come in NFC",)
    if normalizer.get("type") == "Sequence" and not normalizer.get("normalizers"):
        return ()
    refuse(path, f"normalizer '{normalizer.get('type')}' is not supported; known: none, NFC")


def _pre_tokenizer(
    path: Path, data: Mapping[str, Any], model: Mapping[str, Any], merges: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name of the pre-tokenizer, and notes on how it was found."""
    pre = as_object(data.get("pre_tokenizer"), path, "pre_tokenizer")
    is_sequence = pre.get("type") == "Sequence"
    steps = as_objects(pre.get("pretokenizers"), path, "pretokenizers") if is_sequence else [pre]
    steps = [as_object(step, path, "pre_tokenizer") for step in steps]
    reference = reference_of(path)
    known = None if reference is None else known_as(reference)
    try:
        return find_pre_tokenizer(
            steps, bool(model.get("ignore_merges")), known, lambda: all_are_merged(model["vocab"], merges)
        ), ()
    except ValueError as error:
        if known in known_names():  # a spelling that is new to us; the proof compares its tokens
            return str(known), (f"the pre-tokenizer was known by its tokens: llama.cpp's converter calls it {known}",)
        hint = "" if reference is not None else "; it may be known by its tokens, with pip install tokenizers"
        refuse(path, f"{error}{hint}")


def _added_tokens(path: Path, data: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    added = {}
    for token in as_objects(data.get("added_tokens"), path, "added_tokens"):
        if type(token.get("id")) is not int or token["id"] < 0 or not isinstance(token.get("content"), str):
            raise BadFile(f"{path}: added token {shown(token)} has no id or content")
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                refuse(path, f"added token {token['content']!r} with {flag} is not supported")
        added[token["id"]] = token
    return added


def _tokens(
    path: Path, vocab: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], vocab_size: Any
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    by_id: dict[int, tuple[str, int]] = {}
    for text, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0 or token_id in by_id:
            raise BadFile(f"{path}: token {shown(text)} has id {shown(token_id)}, which is no number or used twice")
        by_id[token_id] = (text, NORMAL)
    for token_id, token in added.items():
        by_id[token_id] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    if not by_id:
        raise BadFile(f"{path}: has no tokens")
    highest = max(by_id)
    size = highest + 1 if vocab_size is None else vocab_size
    if type(size) is not int or not highest < size <= MAX_TOKENS:
        raise BadFile(
            f"{path}: token ids go up to {highest} but vocab_size in config.json is {shown(size)}, "
            f"at most {MAX_TOKENS} are read"
        )
    padded = [by_id.get(token_id, (f"[PAD{token_id}]", UNUSED)) for token_id in range(size)]
    return tuple(text for text, _ in padded), tuple(kind for _, kind in padded)


def _merges(path: Path, model: Mapping[str, Any]) -> tuple[str, ...]:
    """Merges as `a b`; older files have them so, newer ones as pairs."""
    merges = model.get("merges")
    if not isinstance(merges, list) or len(merges) > MAX_ELEMENTS:
        raise BadFile(f"{path}: its model has no list of merges")
    made = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise BadFile(f"{path}: merge {shown(merge)} is not a pair of tokens")
        if any(" " in part for part in pair):
            refuse(path, f"merge {shown(merge)} holds a space: this is not byte-level BPE")
        made.append(f"{pair[0]} {pair[1]}")
    return tuple(made)


def _adds(
    path: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    special: Mapping[str, int],
    tokens: Sequence[str],
) -> tuple[bool, bool]:
    """Whether the tokenizer puts a bos token before, and an eos token behind, every text."""
    processor = as_object(data.get("post_processor"), path, "post_processor")
    is_sequence = processor.get("type") == "Sequence"
    steps = as_objects(processor.get("processors"), path, "processors") if is_sequence else [processor]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            return _template_adds(path, as_objects(step.get("single"), path, "single"), special, tokens)
        if step.get("type") not in (None, "ByteLevel"):
            refuse(path, f"post-processor '{step.get('type')}' is not supported")
    if processor:  # ByteLevel alone adds nothing, whatever tokenizer_config.json says
        return False, False
    add_bos, add_eos = (bool(settings.get(f"add_{name}_token")) for name in ("bos", "eos"))
    if add_bos and "bos" not in special:
        raise BadFile(f"{path}: tokenizer_config.json asks for a bos token but names none")
    return add_bos, add_eos


def _template_adds(
    path: Path, single: Sequence[Mapping[str, Any]], special: Mapping[str, int], tokens: Sequence[str]
) -> tuple[bool, bool]:
    """bos and eos of a template: [bos] text [eos], each optional; anything else is refused."""
    names = [as_object(step.get("SpecialToken"), path, "SpecialToken").get("id") for step in single]
    before, after = (names[: names.index(None)], names[names.index(None) + 1 :]) if None in names else (names, [])
    for found, name in ((before, "bos"), (after, "eos")):
        if found and (name not in special or found != [tokens[special[name]]]):
            refuse(path, f"post-processor that adds {found} where llama.cpp adds a {name} token is not supported")
    return bool(before), bool(after)
