"""The dialects: OpenAI, Anthropic, Ollama. This file only collects their paths: ROUTES and QUESTIONS of every file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from moe_edge.runner.serve.dialects.dialect import Question, Route


def _modules() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(__path__):
        yield importlib.import_module(f"{__name__}.{module.name}")


def all_routes() -> tuple[Route, ...]:
    """Every path that generates. Raises ValueError when two files claim one path, which is a fault of ours."""
    found: dict[str, Route] = {}
    for module in _modules():
        for route in getattr(module, "ROUTES", ()):
            if route.path in found:
                raise ValueError(f"two dialects claim {route.path}")
            found[route.path] = route
    return tuple(found.values())


def all_questions() -> tuple[Question, ...]:
    """Every path that is answered from what is known of the model."""
    return tuple(question for module in _modules() for question in getattr(module, "QUESTIONS", ()))
