"""A Hugging Face tokenizer as the key-values llama.cpp reads: byte-level BPE here, SentencePiece in sentencepiece.py.

llama.cpp splits text by a regular expression it knows by name (`tokenizer.ggml.pre`). The name is found by comparing
the structure of tokenizer.json with those we know exactly (pretokenizers.py); whatever differs is refused, since a
guess would give other tokens than the model was trained on. tokenizer_proof.py compares tokens before anything is
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moe_edge.convert.pretokenizers import find_pre_tokenizer
from moe_edge.models.errors import BadFile, UnknownName
from moe_edge.models.formats.files import is_present, read_file, shown
from moe_edge.models.formats.keyvalues import ARRAY, MAX_ELEMENTS, STRING
from moe_edge.models.formats.safetensors import as_object, as_objects, read_json_file
from moe_edge.models.formats.write import encode_kv, kv_bool, kv_f32s, kv_string, kv_strings, kv_u32

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
U8, I32 = 0, 5
MAX_TOKENS = 1 << 20  # the largest known vocabularies have 2^18
TIKTOKEN = ("tiktoken.model", "hy.tiktoken", "qwen.tiktoken")
MAX_TEMPLATE = 1 << 22  # bytes
MAX_TEMPLATE_NAME = 200  # characters
SPECIAL = ("bos", "eos", "unk", "pad")
ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class Tokenizer:
    """What llama.cpp needs to know: `types[i]` is the type of `tokens[i]`; `special` maps "bos", "eos" ... to ids.

    model: `tokenizer.ggml.model`. pre: None for models that split nothing. scores: of SentencePiece, else none.
    flags: further yes-or-no keys, without the prefix. charsmap: SentencePiece's table of normalisation.
    """

    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_templates: Mapping[str, str]
    notes: tuple[str, ...]
    model: str = "gpt2"
    scores: tuple[float, ...] = ()
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""

    def records(self) -> dict[str, bytes]:
        """The key-values, encoded."""
        prefix = "tokenizer.ggml."
        records = {
            prefix + "model": kv_string(prefix + "model", self.model),
            prefix + "tokens": kv_strings(prefix + "tokens", self.tokens),
            prefix + "token_type": encode_kv(prefix + "token_type", self.types, ARRAY, I32),
        }
        if self.pre is not None:
            records[prefix + "pre"] = kv_string(prefix + "pre", self.pre)
        if self.merges:
            records[prefix + "merges"] = kv_strings(prefix + "merges", self.merges)
        if self.scores:
            records[prefix + "scores"] = kv_f32s(prefix + "scores", self.scores)
        if self.charsmap:
            key = prefix + "precompiled_charsmap"
            records[key] = encode_kv(key, list(self.charsmap), ARRAY, U8)
        for name, value in self.flags.items():
            records[prefix + name] = kv_bool(prefix + name, value)
        for name, token_id in self.special.items():
            key = f"{prefix}{ID_KEYS[name]}_token_id"
            records[key] = kv_u32(key, token_id)
        for key, value in (("add_bos_token", self.add_bos), ("add_eos_token", self.add_eos)):
            records[prefix + key] = kv_bool(prefix + key, value)
        return records | self._template_records()

    def _template_records(self) -> dict[str, bytes]:
        records = {}
        others = [name for name in self.chat_templates if name != "default"]
        if others:
            records["tokenizer.chat_templates"] = kv_strings("tokenizer.chat_templates", others)
        for name, template in self.chat_templates.items():
            key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
            records[key] = encode_kv(key, template, STRING)
        return records


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint folder, padded to `vocab_size` of its config.

    Raises MissingFile, BadFile, and UnknownName for a tokenizer llama.cpp would not reproduce exactly.
    """
    path = folder / "tokenizer.json"
    settings_path = folder / "tokenizer_config.json"
    settings = read_json_file(settings_path) if is_present(settings_path) else {}
    if not is_present(path) and is_present(folder / "tokenizer.model"):
        from moe_edge.convert.sentencepiece import of_model_file

        return of_model_file(folder, config, settings, chat_templates(folder, settings))
    ranks = next((name for name in TIKTOKEN if is_present(folder / name)), None)
    if ranks is not None and not is_present(path):
        refuse(folder / ranks, "a tokenizer that is only there as tiktoken ranks is not supported")
    data = read_json_file(path)
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise BadFile(f"{path}: has no 'model' with a 'vocab'")
    if model.get("byte_fallback") and model.get("type") in (None, "BPE"):
        from moe_edge.convert.sentencepiece import of_json

        return of_json(folder, data, config, settings, chat_templates(folder, settings))
    _check_model(path, model)
    added = _added_tokens(path, data)
    tokens, types = _tokens(path, model["vocab"], added, config.get("vocab_size"))
    special = special_ids(path, settings, config, added, len(tokens))
    add_bos, add_eos = _adds(path, data, settings, special, tokens)
    return Tokenizer(
        pre=_pre_tokenizer(path, data, bool(model.get("ignore_merges"))),
        tokens=tokens,
        types=types,
        merges=_merges(path, model),
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_templates=chat_templates(folder, settings),
        notes=_normalizer(path, data),
    )


def refuse(path: Path, what: str) -> NoReturn:
    raise UnknownName(f"{path}: {what}; convert with llama.cpp's convert_hf_to_gguf.py and give moe-edge the GGUF")


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


def _pre_tokenizer(path: Path, data: Mapping[str, Any], ignore_merges: bool) -> str:
    pre = as_object(data.get("pre_tokenizer"), path, "pre_tokenizer")
    is_sequence = pre.get("type") == "Sequence"
    steps = as_objects(pre.get("pretokenizers"), path, "pretokenizers") if is_sequence else [pre]
    try:
        return find_pre_tokenizer([as_object(step, path, "pre_tokenizer") for step in steps], ignore_merges)
    except ValueError as error:
        refuse(path, str(error))


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


def special_ids(
    path: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    added: Mapping[int, Mapping[str, Any]],
    n_tokens: int,
) -> dict[str, int]:
    """Ids by tokenizer_config.json, else by config.json; a list of end-of-sequence ids counts with its first."""
    ids = {token["content"]: token_id for token_id, token in added.items()}
    special = {}
    for name in SPECIAL:
        text = settings.get(f"{name}_token")
        if isinstance(text, dict):
            text = text.get("content")
        token_id = ids.get(text) if isinstance(text, str) else None
        if token_id is None:
            token_id = config.get(f"{name}_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0] if token_id else None
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < n_tokens:
            raise BadFile(f"{path}: {name} token id {shown(token_id)} is not one of its {n_tokens} tokens")
        special[name] = token_id
    if "eos" not in special:
        refuse(path, "neither tokenizer_config.json nor config.json names an end-of-sequence token")
    return special


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


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, of tokenizer_config.json or else chat_template.jinja."""
    template = settings.get("chat_template")
    jinja = folder / "chat_template.jinja"
    if template is None and is_present(jinja):
        try:
            template = read_file(jinja, MAX_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise BadFile(f"{jinja}: is not UTF-8: {error}") from error
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    path = folder / "tokenizer_config.json"
    templates = {}
    for each in as_objects(template, path, "chat_template"):
        name, text = each.get("name"), each.get("template")
        if not isinstance(name, str) or not isinstance(text, str) or len(name) > MAX_TEMPLATE_NAME:
            raise BadFile(f"{path}: chat_template has {shown(each)}, expected a name and a template")
        templates[name] = text
    return templates
