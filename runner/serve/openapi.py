"""/openapi.json: what can be asked here, made from the same tables that answer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from moe_edge.runner.serve.dialects import all_questions, all_routes
from moe_edge.runner.serve.llama_server import POSTS

PLAIN = {
    "/health": "whether the model is loaded",
    "/v1/health": "whether the model is loaded",
    "/props": "llama-server: settings and template",
    "/metrics": "counts for Prometheus",
    "/moe-edge/facts": "the model and its memory",
    "/moe-edge/picture": "which experts are in memory now",
    "/moe-edge/live": "counters, queue and experts, packed for the page",
}


def description() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, Any] = {path: {"get": _operation(words)} for path, words in PLAIN.items()}
    for question in all_questions():
        body = _body({}, ()) if question.method == "POST" else None
        operation = _operation(question.words, body)
        if "{name}" in question.path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [name]
        paths[question.path] = {question.method.lower(): operation}
    for route in all_routes():
        paths[route.path] = {"post": _operation(route.words, _body(route.fields, route.needed))}
    for path, (_, fields, needed, words) in POSTS.items():
        paths[path] = {"post": _operation(words, _body(fields, needed))}
    return {
        "openapi": "3.1.0",
        "info": {"title": "moe-edge serve", "version": version("moe-edge")},
        "paths": paths,
    }


def _operation(words: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": words,
        "responses": {"200": {"description": "the answer"}, "default": {"description": "an error as JSON"}},
    }
    if body is not None:
        operation["requestBody"] = body
    return operation


def _body(fields: Mapping[str, Any], needed: tuple[str, ...]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": dict(fields)}
    if needed:
        schema["required"] = list(needed)
    return {"required": True, "content": {"application/json": {"schema": schema}}}
