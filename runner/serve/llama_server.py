"""What llama-server answers besides: /health, /props, /tokenize, /detokenize, /apply-template. Its names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from moe_edge.runner.protocol import Request, ServedModel
from moe_edge.runner.serve.dialects.openai_chat import FIELDS as CHAT_FIELDS
from moe_edge.runner.serve.dialects.openai_chat import parse as parse_chat
from moe_edge.runner.serve.dialects.openai_parse import FLAG, TEXT, WHOLE
from moe_edge.runner.serve.faults import LOADING
from moe_edge.runner.serve.fields import ApiError, Fields

LOADING_JSON = {"error": {"code": 503, "message": LOADING, "type": "unavailable_error"}}
Answer = Callable[[ServedModel, Mapping[str, Any]], dict[str, Any]]


def props(model: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    f = model.facts
    return {
        "default_generation_settings": {"n_ctx": f.n_ctx, "params": dict(f.sampling)},
        "total_slots": 1,
        "model_alias": f.name,
        "model_path": f.name,
        "chat_template": f.template,
        "bos_token": f.bos_text,
        "eos_token": f.eos_text,
        "modalities": {"vision": False, "audio": False},
        "build_info": f"moe-edge {version('moe-edge')}",
    }


def tokenize(model: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    f = Fields(body)
    tokens = model.tokenize(
        f.text("content") or "", special=f.flag("parse_special", True), add_bos=f.flag("add_special")
    )
    if not f.flag("with_pieces"):
        return {"tokens": tokens}
    pairs = zip(tokens, model.pieces(tokens), strict=True)
    return {"tokens": [{"id": token, "piece": _piece(data)} for token, data in pairs]}


def _piece(data: bytes) -> str | list[int]:
    """A token's text; its bytes where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def detokenize(model: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    f = Fields(body)
    tokens = f.items("tokens", 10_000_000)
    if not all(type(token) is int for token in tokens):
        raise f.wrong("tokens", "a list of token ids")
    return {"content": b"".join(model.pieces(tokens)).decode(errors="replace")}


def apply_template(model: ServedModel, body: Mapping[str, Any]) -> dict[str, Any]:
    request: Request = parse_chat(body).request
    return {"prompt": model.render(request)}


POSTS: dict[str, tuple[Answer, Mapping[str, Any], tuple[str, ...], str]] = {
    "/tokenize": (
        tokenize, {"content": TEXT, "add_special": FLAG, "parse_special": FLAG, "with_pieces": FLAG}, ("content",),
        "llama-server: a text as token ids",
    ),
    "/detokenize": (
        detokenize, {"tokens": {"type": "array", "items": WHOLE}}, ("tokens",), "llama-server: token ids as a text"
    ),
    "/apply-template": (apply_template, CHAT_FIELDS, ("messages",), "llama-server: messages as a prompt"),
}  # fmt: skip


def error_json(error: ApiError) -> dict[str, Any]:
    return {"error": {"code": error.status, "message": error.message, "type": error.kind}}
