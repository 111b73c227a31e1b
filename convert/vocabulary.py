"""A vocabulary as llama.cpp reads it: the value that the readers of tokenizers make, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moe_edge.models.errors import BadFile, UnknownName
from moe_edge.models.formats.files import is_present, read_file, shown
from moe_edge.models.formats.keyvalues import ARRAY, STRING
from moe_edge.models.formats.safetensors import as_objects
from moe_edge.models.formats.write import encode_kv, kv_bool, kv_f32s, kv_string, kv_strings, kv_u32

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
U8, I32 = 0, 5
MAX_TOKENS = 1 << 20  # the largest known vocabularies have 2^18
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


def refuse(path: Path, what: str) -> NoReturn:
    raise UnknownName(f"{path}: {what}; convert with llama.cpp's convert_hf_to_gguf.py and give moe-edge the GGUF")


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
