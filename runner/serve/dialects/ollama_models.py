"""Ollama's lists: /api/tags, /api/show, /api/ps, /api/version. One model, always loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_edge.runner.protocol import ModelFacts
from moe_edge.runner.serve.dialects.dialect import Question
from moe_edge.runner.serve.dialects.ollama import timestamp

VERSION = "0.6.3"  # of Ollama's interface, which clients compare; ours is in /props
DIGEST = "0" * 64  # clients want one; the model is not in Ollama's store


def details(facts: ModelFacts) -> dict[str, Any]:
    return {
        "parent_model": "", "format": "gguf", "family": facts.architecture, "families": [facts.architecture],
        "parameter_size": f"{facts.n_params / 1e9:.1f}B", "quantization_level": facts.quantization,
    }  # fmt: skip


def entry(facts: ModelFacts) -> dict[str, Any]:
    """One model of a list. Open WebUI reads both `name` and `model`."""
    return {"name": facts.name, "model": facts.name, "size": facts.size_bytes, "digest": DIGEST,
            "details": details(facts)}  # fmt: skip


def tags(facts: ModelFacts, body: Mapping[str, Any], rest: str) -> dict[str, Any]:
    return {"models": [entry(facts) | {"modified_at": timestamp(facts.created)}]}


def running(facts: ModelFacts, body: Mapping[str, Any], rest: str) -> dict[str, Any]:
    expires = timestamp(4102444800)  # 2100: it is not unloaded
    more = {"expires_at": expires, "size_vram": 0, "context_length": facts.n_ctx}
    return {"models": [entry(facts) | more]}


def show(facts: ModelFacts, body: Mapping[str, Any], rest: str) -> dict[str, Any]:
    """Continue reads `num_ctx` out of `parameters`, whose every line is a name, blanks and a value."""
    return {
        "modelfile": "",
        "license": "",
        "parameters": f"num_ctx {facts.n_ctx}",
        "template": facts.template,
        "details": details(facts),
        "model_info": {
            "general.architecture": facts.architecture,
            "general.parameter_count": facts.n_params,
            f"{facts.architecture}.context_length": facts.n_ctx,
        },
        "capabilities": list(facts.capabilities),
        "modified_at": timestamp(facts.created),
    }


def version(facts: ModelFacts, body: Mapping[str, Any], rest: str) -> dict[str, Any]:
    return {"version": VERSION}


QUESTIONS = (
    Question("/api/tags", tags, words="Ollama: which models there are"),
    Question("/api/ps", running, words="Ollama: which models are loaded"),
    Question("/api/version", version, words="Ollama: of its interface"),
    Question("/api/show", show, method="POST", words="Ollama: about the model"),
)
