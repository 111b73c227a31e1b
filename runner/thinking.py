"""Whether and how hard a model is to think, as its chat template is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moe_edge.models.errors import UsageError

# What the template gets from us.
RESERVED = ("messages", "tools", "functions", "function_call", "tool_choice", "bos_token", "eos_token")
EXAMPLE = "give an object, like '{\"custom\": true}'"


def thinking_settings(think: bool | None, effort: str | None = None) -> dict[str, Any]:
    """What a template is told. think None: its own default. Templates know three efforts, and thinking or not."""
    told: dict[str, Any] = {}
    if think is not None:
        told |= {"enable_thinking": think, "thinking": think}
    if effort in ("none", "minimal"):
        told |= {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}
    elif effort is not None:
        told["reasoning_effort"] = "high" if effort in ("xhigh", "max") else effort
    return told


def checked_settings(settings: Mapping[str, Any], named: str) -> dict[str, Any]:
    """Settings that somebody gives a template by name. Raises UsageError for those that are ours."""
    if wrong := [name for name in settings if name in RESERVED]:
        raise UsageError(f"{named} has '{wrong[0]}', which is given to the template anyhow")
    return dict(settings)


def parse_settings(text: str, named: str) -> dict[str, Any]:
    """Settings as JSON on a command line. Raises UsageError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{named} {text}: is no JSON ({error}); {EXAMPLE}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{named} {text}: is a {type(found).__name__}; {EXAMPLE}")
    return checked_settings(found, named)
