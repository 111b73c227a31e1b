"""The dialects: OpenAI, Anthropic, Ollama. One file each; this one only collects their routes."""

from __future__ import annotations

import importlib
import pkgutil

from moe_edge.runner.serve.dialects.dialect import Route


def all_routes() -> tuple[Route, ...]:
    """The routes of every file of this folder. Raises ValueError when two claim one path, which is a fault of ours."""
    found: dict[str, Route] = {}
    for module in pkgutil.iter_modules(__path__):
        for route in getattr(importlib.import_module(f"{__name__}.{module.name}"), "ROUTES", ()):
            if route.path in found:
                raise ValueError(f"two dialects claim {route.path}")
            found[route.path] = route
    return tuple(found.values())
