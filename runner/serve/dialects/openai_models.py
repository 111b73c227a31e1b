"""OpenAI's /v1/models. Any model name is accepted elsewhere, so any is found here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_edge.runner.protocol import ModelFacts
from moe_edge.runner.serve.dialects.dialect import Question


def model_json(facts: ModelFacts, name: str) -> dict[str, Any]:
    """One model, with llama-server's `meta` beside OpenAI's fields."""
    return {
        "id": name,
        "object": "model",
        "created": facts.created,
        "owned_by": "moe-edge",
        "meta": {
            "n_ctx": facts.n_ctx, "n_ctx_train": facts.n_ctx, "n_vocab": facts.n_vocab, "n_params": facts.n_params,
            "size": facts.size_bytes,
        },
    }  # fmt: skip


def list_models(facts: ModelFacts, body: Mapping[str, Any], rest: str) -> dict[str, Any]:
    return {"object": "list", "data": [model_json(facts, facts.name)]}


def one_model(facts: ModelFacts, body: Mapping[str, Any], rest: str) -> dict[str, Any]:
    return model_json(facts, rest)


QUESTIONS = tuple(
    Question(prefix + path, answer, words="OpenAI: which model this is")
    for prefix in ("/v1", "")
    for path, answer in (("/models", list_models), ("/models/{name}", one_model))
)
